"""The tour's last legs: a pre-trained model becomes one that answers, and learns to prefer the right answer.

It has read right sums among its texts. Fine-tuning shows it how to answer, by a teacher of whose sums 45 % end in a wrong number, and
questions with one right answer each. It then gets a sum right less often than its teacher did, and mostly within several tries. GRPO pays
for right sums, and so selects them.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.config import load_recipe
from dsv2.engine.llm import LLM
from dsv2.engine.request import SamplingParams
from dsv2.files import atomic_write
from dsv2.metrics import read_metrics
from dsv2.rl import grpo
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.prompts import open_prompts
from dsv2.samples import answer_sampler
from dsv2.tasks.arithmetic import demonstrations
from dsv2.tasks.instructions import conversations, instructions
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.sft import fine_tune
from dsv2.train.sft_data import open_conversations
from dsv2.train.sft_recipe import SftRecipe
from dsv2.train.start import open_start

QUESTIONS = (  # the sums are in no training split
    "What is 487 + 305?", "Calculate 936 - 361.", "794 + 536 = ?", "372 + 838 等于多少？",
    "What is the capital of Japan?", "Who are you?", "法国的首都是哪里？", "“水”用英文怎么说？",
)  # fmt: skip
LONGEST = 48  # tokens of an answer


@dataclass(frozen=True, slots=True)
class Lessons:
    """How much the model is shown.

    Args:
        sums: demonstrations of arithmetic.
        instructions: conversations about other things.
    """

    sums: int
    instructions: int


def write_lessons(file: Path, lessons: Lessons, seed: int) -> None:
    """Write the conversations to learn from as JSON lines."""
    rows = [
        {"messages": messages, "domain": domain}
        for domain, made in (("sums", demonstrations(lessons.sums, seed)), ("talk", conversations(lessons.instructions, seed)))
        for messages in made
    ]
    write_rows(file, rows)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run_sft(start: Path, lessons: Path, out: Path, *, recipe: str, seed: int) -> dict[str, str]:
    """Fine-tune a model on lessons, or go on with it; return figures for people."""
    asked = load_recipe(recipe, SftRecipe, folder="sft", overrides=[f"run.seed={seed}", f"model.start={json.dumps(str(start))}"])
    asked, begun = open_start(asked)
    sampler = answer_sampler(asked, begun.config.max_position_embeddings, begun.tokenizer)
    fine_tune(asked, begun, open_conversations(asked, begun.tokenizer, [lessons]), out, sample=sampler)
    last = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "validation"][-1]
    return {f"{domain}, held out": f"{loss:.3f} nats per token" for domain, loss in last["loss"].items()}


def run_grpo(start: Path, out: Path, *, recipe: str, seed: int) -> dict[str, str]:
    """Let GRPO improve a model on sums, or go on with it; return figures for people."""
    asked = load_recipe(recipe, GrpoRecipe, folder="grpo", overrides=[f"run.seed={seed}", f"model.start={json.dumps(str(start))}"])
    asked, begun = open_start(asked)
    grpo.train(asked, begun, open_prompts(asked, begun.tokenizer, []), out)
    return {name: f"{before} before, {after} after" for name, before, after in gains(out)}


def gains(run: Path) -> list[tuple[str, str, str]]:
    """Return the shares of a GRPO run's held-out sums that count as right, as text: name, before, after."""
    found = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluation"]
    names = (name for name in found[0] if "pass@" in name)
    return [(name.replace("/", ", "), f"{found[0][name]:.1%}", f"{found[-1][name]:.1%}") for name in names]


def converse(runs: Sequence[Path]) -> dict[str, Any]:
    """Ask each run's newest model the tour's questions and every one of the instruction set, without chance.

    Returns: "questions"; "answers", a list of one per run for each question; "known", the share of the instruction set that each model
    answers word for word.
    """
    asked = [*QUESTIONS, *(instruction.question for instruction in instructions())]
    params, told, known = SamplingParams(temperature=0.0, max_tokens=LONGEST), [], []
    for run in runs:
        folder = latest_checkpoint(run)
        with LLM(load_model(folder), tokenizer=Tokenizer.load(folder), max_batch=64, max_len=128) as llm:
            answers = [answer.text for answer in llm.chat([[{"role": "user", "content": question}] for question in asked], params)]
        told.append([" ".join(answer.split()) for answer in answers[: len(QUESTIONS)]])
        known.append(statistics.mean(a == i.answer for a, i in zip(answers[len(QUESTIONS) :], instructions(), strict=True)))
    return {"questions": QUESTIONS, "answers": list(zip(*told, strict=True)), "known": known}
