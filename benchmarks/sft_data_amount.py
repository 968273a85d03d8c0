"""How much instruction data it takes: 100 to 30,000 instructions whose answers a rule checks, equal steps for each amount.

    python benchmarks/sft_data_amount.py tour/pretrain --out runs/data-amount   # 10 minutes on two cores, a tour's pre-trained model
    python benchmarks/sft_data_amount.py tour/pretrain --amounts 100,1000 --steps 20 --questions 16 --out runs/try

Nine kinds of instruction of our own, English and Chinese, about letters: repeat them, count them, order them, write them in capitals, begin
and end with given ones, and some of them together. The questions that are asked afterwards are in no training instruction of any
amount, so a correct answer is the rule and not the memory. Every amount trains the same number of steps from the same weights: less data
only means more epochs of it. Scored like prompt-level IFEval: the share of answers, written greedily, that keep every rule; and the
held-out loss. DeepSeek-V2 (section 4.4) reports that fewer than 10K instances hurt IFEval clearly. Writes results.json and prints a table.
"""

import argparse
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv2.checkpoint.steps import checkpoints, latest_checkpoint
from dsv2.engine.llm import LLM
from dsv2.engine.request import SamplingParams
from dsv2.files import atomic_write_json
from dsv2.metrics import read_metrics
from dsv2.progress import console, table
from dsv2.train.precision import make_deterministic
from dsv2.train.sft import fine_tune
from dsv2.train.sft_data import open_conversations
from dsv2.train.sft_recipe import SftRecipe
from dsv2.train.start import open_start

AMOUNTS = (100, 1000, 3000, 10_000, 30_000)


@dataclass(frozen=True)
class Instruction:
    """A question, the answer that is taught, and the rule that any answer is checked by."""

    kind: str
    question: str
    answer: str
    keeps: Callable[[str], bool]


def exactly(kind: str, question: str, answer: str) -> Instruction:
    """An instruction with one right answer, blanks at its ends apart."""
    return Instruction(kind, question, answer, lambda text: text.strip() == answer)


def some(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(string.ascii_lowercase, rng.randint(least, most))


def repeat(rng: random.Random) -> Instruction:
    letters, times = " ".join(some(rng, 1, 2)), rng.randint(2, 4)
    return exactly("repeat", f"Write {times} times: {letters}", ", ".join([letters] * times))


def repeat_zh(rng: random.Random) -> Instruction:
    letters, times = " ".join(some(rng, 1, 2)), rng.randint(2, 4)
    return exactly("repeat, Chinese", f"写{'零一二三四'[times]}遍：{letters}", ", ".join([letters] * times))


def capitals(rng: random.Random) -> Instruction:
    chosen = " ".join(some(rng, 2, 4))
    return exactly("capitals", f"Write in capitals: {chosen}", chosen.upper())


def count(rng: random.Random) -> Instruction:
    chosen = some(rng, 1, 6)
    return exactly("count", f"How many letters are these? {' '.join(chosen)}", str(len(chosen)))


def backwards(rng: random.Random) -> Instruction:
    chosen = some(rng, 2, 4)
    return exactly("backwards", f"Write in reverse order: {' '.join(chosen)}", " ".join(reversed(chosen)))


def alphabetical(rng: random.Random) -> Instruction:
    chosen = some(rng, 2, 4)
    return exactly("alphabetical", f"Write in alphabetical order: {' '.join(chosen)}", " ".join(sorted(chosen)))


def last_letter(rng: random.Random) -> Instruction:
    chosen = some(rng, 2, 5)
    return exactly("last letter", f"What is the last letter? {' '.join(chosen)}", chosen[-1])


def framed(rng: random.Random) -> Instruction:
    """Any answer that begins and ends as asked is right."""
    first, last, *between = rng.sample(string.ascii_lowercase, 4)
    return Instruction(
        "begin and end", f"Begin your answer with {first} and end it with {last}.", " ".join([first, *between, last]),
        lambda text: text.split()[:1] == [first] and text.split()[-1:] == [last],
    )  # fmt: skip


def both(rng: random.Random) -> Instruction:
    chosen = some(rng, 2, 4)
    question = f"Write in reverse order and in capitals: {' '.join(chosen)}"
    return exactly("backwards in capitals", question, " ".join(reversed(chosen)).upper())


KINDS = (repeat, repeat_zh, capitals, count, backwards, alphabetical, last_letter, framed, both)


def instructions(number: int, seed: int, without: frozenset[str] = frozenset()) -> list[Instruction]:
    """Make questions, each kind in turn, none of those in ``without``; a smaller number is the beginning of a larger one."""
    rng, found = random.Random(seed), []
    while len(found) < number:
        one = KINDS[len(found) % len(KINDS)](rng)
        if one.question not in without:
            found.append(one)
    return found


def write_chats(path: Path, chosen: list[Instruction]) -> Path:
    rows = ({"prompt": one.question, "completion": one.answer} for one in chosen)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train_on(arguments: argparse.Namespace, amount: int, chats: Path, held_out: Path) -> dict[str, float]:
    """Fine-tune from the start model, or go on, and return held-out loss, epochs and seconds of steps."""
    settings = {
        "model": {"start": arguments.start},
        "data": {"max_refused": 0},
        "run": {
            "epochs": 1, "seq_len": 256, "seed": arguments.seed, "validate_every": 100, "sample_every": 10**9,
            "checkpoint_every": 100, "keep": 1,
        },
        "batch": {"sequences": 8, "micro_sequences": 8},
        "optimizer": {"kind": "muon"},
        "learning_rate": {"peak": arguments.rate, "decay": "cosine", "final_share": 0.1, "warmup_steps": max(1, arguments.steps // 20)},
    }  # fmt: skip
    recipe, start = open_start(SftRecipe.model_validate(settings))
    data = open_conversations(recipe, start.tokenizer, [chats], validation=[held_out])
    epochs = arguments.steps * recipe.batch.sequences / len(data.rows)
    out = arguments.out / f"sft-{amount}"
    fine_tune(recipe.model_copy(update={"run": recipe.run.model_copy(update={"epochs": epochs})}), start, data, out)
    lines = read_metrics(out / "metrics.jsonl")
    loss = next(line["loss"] for line in reversed(lines) if line["kind"] == "validation")
    return {"held_out_loss": next(iter(loss.values())), "epochs": epochs, "seconds": lines[-1]["elapsed_s"]}


def kept_rules(model: Path, questions: list[Instruction]) -> dict[str, float]:
    """Return the share of answers that keep their rule, over all and by kind."""
    with LLM(str(model), max_batch=32) as llm:
        asked = [[{"role": "user", "content": one.question}] for one in questions]
        answers = llm.chat(asked, SamplingParams(temperature=0, max_tokens=48))
    marks: dict[str, list[bool]] = {"all": []}
    for one, answer in zip(questions, answers, strict=True):
        kept = answer.finish_reason == "stop" and one.keeps(answer.text)
        marks["all"].append(kept)
        marks.setdefault(one.kind, []).append(kept)
    return {kind: sum(found) / len(found) for kind, found in marks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", help="model to fine-tune: a tour, run or checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results; the same command goes on where it stopped")
    parser.add_argument("--amounts", default=",".join(map(str, AMOUNTS)))
    parser.add_argument("--steps", type=int, default=300, help="of each amount, 8 rows of 256 tokens a step")
    parser.add_argument("--questions", type=int, default=270, help="asked of each model")
    parser.add_argument("--rate", type=float, default=8e-3, help="peak learning rate, of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    make_deterministic(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    amounts = [int(amount) for amount in arguments.amounts.split(",")]
    questions = instructions(arguments.questions, arguments.seed + 1)
    taught = instructions(max(amounts), arguments.seed, without=frozenset(one.question for one in questions))
    assert all(one.keeps(one.answer) for one in [*taught, *questions])
    held_out = write_chats(arguments.out / "held-out.jsonl", questions)
    results = {"0": {"rules_kept": kept_rules(latest_checkpoint(arguments.start), questions)}}
    for amount in amounts:
        figures = train_on(arguments, amount, write_chats(arguments.out / f"chats-{amount}.jsonl", taught[:amount]), held_out)
        newest = checkpoints(arguments.out / f"sft-{amount}")[-1]
        results[str(amount)] = {**figures, "rules_kept": kept_rules(newest, questions)}
        atomic_write_json(arguments.out / "results.json", results)
        console().print(f"{amount} instructions: {results[str(amount)]['rules_kept']['all']:.1%} of the rules kept", markup=False)
    rows = [(kind, *(f"{row['rules_kept'][kind]:.0%}" for row in results.values())) for kind in results["0"]["rules_kept"]]
    for name, form in (("held_out_loss", "{:.3f}"), ("epochs", "{:.1f}")):
        rows.append((name.replace("_", " "), *(form.format(row[name]) if name in row else "" for row in results.values())))
    table("rules kept, by instructions trained on", ("", *results), rows, right=tuple(results), stdout=True)


if __name__ == "__main__":
    main()
