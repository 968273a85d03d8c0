"""Prompts to answer: of a task of ours, or of files; some held out, the others in an order that is computed, not stored."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv2.data.conversations import rows_of
from dsv2.data.documents import source_files
from dsv2.data.order import permute
from dsv2.errors import ConfigError, DataError
from dsv2.rl.grpo_recipe import TaskSection
from dsv2.rl.rollout import Example
from dsv2.tasks.arithmetic import problems

_ENOUGH = 20_000  # problems of a task that makes its own


class Prompts:
    """Examples in an order of their own in each epoch.

    Args:
        training: to learn from.
        held_out: to evaluate on.
        seed: of the order.
    """

    def __init__(self, training: Sequence[Example], held_out: Sequence[Example], seed: int) -> None:
        if not training:
            raise DataError("there is no prompt to learn from", hint="give more rows, or lower task.held_out")
        self.held_out, self._training, self._seed = list(held_out), list(training), seed

    def __len__(self) -> int:
        return len(self._training)

    @property
    def fingerprint(self) -> str:
        """Hash of all of them: equal fingerprints are equal prompts."""
        return hashlib.sha256(json.dumps([self._training, self.held_out], sort_keys=True).encode()).hexdigest()

    def take(self, first: int, count: int) -> list[Example]:
        """Return examples number ``first`` to ``first + count - 1`` of an endless sequence."""
        places = np.arange(first, first + count, dtype=np.uint64)
        size = np.uint64(len(self._training))
        chosen = permute(places % size, places // size, size=len(self._training), seed=self._seed)
        return [self._training[int(index)] for index in chosen]


def open_prompts(section: TaskSection, files: Sequence[Path], seed: int) -> Prompts:
    """Make or read the prompts that a recipe asks for.

    A row of a file has "messages" (the conversation to answer) or "prompt" (what the user says), and whatever its rewards want:
    "answer", "tests".

    Raises:
        ConfigError: a task is named beside files, or neither.
        DataError: a row is malformed, or there are too few.
    """
    if bool(section.name) == bool(files):
        raise ConfigError("prompts come from files or from a task: give one of them", hint='--data FILE.jsonl, or task.name="arithmetic"')
    if section.name == "arithmetic":
        return Prompts(
            [_asked(problem.question, problem.answer) for problem in problems(_ENOUGH, seed, digits=section.digits, split="train")],
            [_asked(problem.question, problem.answer) for problem in problems(section.held_out, seed, digits=section.digits, split="test")],
            seed,
        )
    sources, _ = source_files([str(file) for file in files])
    examples = [_checked(row, f"{file}:{number}") for file in sources for number, row in rows_of(file)]
    examples.sort(
        key=lambda example: hashlib.sha256(json.dumps(example, sort_keys=True).encode()).digest()
    )  # held out by content, not by place
    return Prompts(examples[section.held_out :], examples[: section.held_out], seed)


def _asked(question: str, answer: str) -> Example:
    return {"messages": [{"role": "user", "content": question}], "answer": str(answer)}


def _checked(row: Example, where: str) -> Example:
    row = dict(row)
    if "messages" not in row:
        if not isinstance(row.get("prompt"), str):
            raise DataError(f'{where}: a row needs "messages" or "prompt"; here are {", ".join(sorted(row))}')
        row["messages"] = [{"role": "user", "content": row.pop("prompt")}]
    return row
