"""The policy that GRPO's demonstration begins with: about 1M parameters, taught three-digit sums by a teacher who errs in 45 %.

python benchmarks/arithmetic_start.py --out runs/start       # tokenizer, initial weights, fine-tuning
dsv2 grpo arithmetic model.start=runs/start/sft --out runs/grpo
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

Chat = list[dict[str, str]]
DEMONSTRATIONS, WRONG, LONGEST = 24_000, 0.45, 48
SHAPE = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.04,
}  # fmt: skip


def make_start(
    out: Path, *, seed: int = 0, epochs: float = 1.5, peak: float = 6e-3, sums: int = DEMONSTRATIONS, more: Sequence[Chat] = (),
    vocab_size: int = 512,
) -> Path:  # fmt: skip
    """Write tokenizer and weights, fine-tune them on so many sums and on more conversations; return the folder of the run."""
    from dsv2.checkpoint.layout import save_checkpoint
    from dsv2.model.accounting import count_parameters
    from dsv2.model.init import initialise
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset
    from dsv2.tasks.arithmetic import demonstrations
    from dsv2.tokenizer.train import train_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    chats = [*demonstrations(sums, seed, WRONG), *more]
    write_chats(out / "demonstrations.jsonl", chats)
    tokenizer = train_tokenizer((chat[0]["content"] + chat[1]["content"] for chat in chats), vocab_size=vocab_size)
    config = preset(
        "nano", vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, q_lora_rank=None, **SHAPE
    )
    print(f"{count_parameters(config).total:,} parameters, vocabulary {tokenizer.num_tokens}")
    model = Transformer(config)
    initialise(model, seed)
    save_checkpoint(out / "initial", model, tokenizer)
    return fine_tuned(out / "initial", out / "demonstrations.jsonl", out / "sft", seed=seed, epochs=epochs, peak=peak)


def fine_tuned(start: Path, chats: Path, out: Path, *, seed: int, epochs: float, peak: float, warmup: int = 50) -> Path:
    """Fine-tune a model on conversations; return the folder of the run."""
    from dsv2.train.sft import fine_tune
    from dsv2.train.sft_data import open_conversations
    from dsv2.train.sft_recipe import SftRecipe
    from dsv2.train.start import open_start

    recipe = SftRecipe.model_validate(
        {
            "model": {"start": str(start)},
            "data": {"validation_share": 0},
            "run": {"epochs": epochs, "seq_len": 128, "precision": "fp32", "seed": seed, "checkpoint_every": 100_000, "keep": 1},
            "batch": {"sequences": 32, "micro_sequences": 32},
            "learning_rate": {"peak": peak, "warmup_steps": warmup, "decay": "cosine", "final_share": 0.05},
            "optimizer": {"kind": "muon"},
            "balance": {"expert": 0.01},
        }
    )
    recipe, opened = open_start(recipe)
    fine_tune(recipe, opened, open_conversations(recipe, opened.tokenizer, [chats]), out)
    return out


def write_chats(file: Path, chats: Sequence[Chat]) -> None:
    """Write conversations as JSON lines."""
    file.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats), encoding="utf-8")


def answered(run: Path, *, prompts: int = 200, samples: int = 8, seed: str = "held out") -> dict[str, float]:
    """Return how a run's newest model answers held-out questions: mean reward, pass@1, pass@samples, and greedily."""
    from dsv2.engine.llm import LLM
    from dsv2.engine.request import SamplingParams
    from dsv2.rl.rollout import draw
    from dsv2.tasks.arithmetic import final_number, problems

    asked = list(problems(prompts, 1, split="test"))
    questions = [[{"role": "user", "content": problem.question}] for problem in asked]
    examples = [{"messages": chat, "answer": problem.answer} for chat, problem in zip(questions, asked, strict=True)]
    with LLM(run, dtype="fp32", max_batch=64, max_len=128) as llm:
        drawn = draw(llm, examples, group_size=samples, max_tokens=LONGEST, seed=seed)
        greedy = llm.chat(questions, SamplingParams(temperature=0, max_tokens=LONGEST))
    right = [[final_number(r.text) == r.example["answer"] for r in drawn[i : i + samples]] for i in range(0, len(drawn), samples)]
    return {
        "pass@1": sum(map(sum, right)) / len(drawn),
        f"pass@{samples}": sum(map(any, right)) / len(right),
        "greedy": sum(final_number(o.text) == p.answer for o, p in zip(greedy, asked, strict=True)) / len(asked),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--peak", type=float, default=6e-3)
    arguments = parser.parse_args()
    began = time.perf_counter()
    run = make_start(arguments.out, seed=arguments.seed, epochs=arguments.epochs, peak=arguments.peak)
    took = time.perf_counter() - began
    print(f"{took:.0f} s; " + ", ".join(f"{name} {value:.3f}" for name, value in answered(run).items()))


if __name__ == "__main__":
    main()
