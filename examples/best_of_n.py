"""Write eight answers to each prompt and keep the one that the model finds likeliest, per token.

python examples/best_of_n.py runs/nano 'Once upon a time' 'The river'
"""

import sys

import dsv2

N = 8


def mean_logprob(answer: dsv2.Output) -> float:
    """Return the mean log-probability of an answer's tokens; longer answers are not worse for their length."""
    entries = answer.logprobs or ()
    return sum(entry.logprob for entry in entries) / len(entries)


def main(path: str, *prompts: str) -> None:
    """Print each prompt with its best answer, and how far the worst one was from it."""
    params = dsv2.SamplingParams(temperature=0.8, n=N, max_tokens=48, seed=1, logprobs=0)
    with dsv2.LLM(path, max_batch=N) as llm:
        answers = llm.generate(prompts, params)
    for place, prompt in enumerate(prompts):
        ranked = sorted(answers[N * place : N * (place + 1)], key=mean_logprob)
        print(f"{prompt}{ranked[-1].text}\n  {mean_logprob(ranked[-1]):.2f} a token, the worst {mean_logprob(ranked[0]):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
