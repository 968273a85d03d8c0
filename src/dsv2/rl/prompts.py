"""Prompts to answer: of a task of ours, or of files; some held out, the others in an order that is computed, not stored."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dsv2.data.conversation_rows import render_row
from dsv2.data.conversations import conversation_of
from dsv2.data.order import canonical, content_lot, permute
from dsv2.data.rows import ReadingReport, Refused, Row, read_rows
from dsv2.errors import ConfigError, DataError
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.rollout import Example
from dsv2.tasks.arithmetic import Problem, problems
from dsv2.tokenizer.tokenizer import Tokenizer

_ENOUGH = 20_000  # problems of a task that makes its own


class Prompts:
    """Examples in an order of their own in each epoch.

    Args:
        training: to learn from.
        held_out: to evaluate on.
        seed: of the order.
        report: what was read and refused, as lines of text.

    Attributes:
        left_out: how many more there were before ``without``.
    """

    left_out = 0

    def __init__(self, training: Sequence[Example], held_out: Sequence[Example], seed: int, report: Sequence[str] = ()) -> None:
        if not training:
            read = f": {'; '.join(report)}" if report else ""
            raise DataError(f"there is no prompt to learn from{read}", hint="give more rows, or lower task.held_out")
        self.held_out, self.report, self._training, self._seed = list(held_out), tuple(report), list(training), seed

    def __len__(self) -> int:
        return len(self._training)

    @property
    def fingerprint(self) -> str:
        """Hash of all of them: equal fingerprints are equal prompts."""
        return hashlib.sha256(json.dumps([self._training, self.held_out], sort_keys=True).encode()).hexdigest()

    def without(self, keys: Collection[str], key: Callable[[Example], str]) -> "Prompts":
        """Return the prompts but for those with one of these keys.

        Raises:
            DataError: none is left to learn from.
        """
        training, held_out = ([example for example in side if key(example) not in keys] for side in (self._training, self.held_out))
        kept = Prompts(training, held_out, self._seed, self.report)
        kept.left_out = len(self._training) + len(self.held_out) - len(training) - len(held_out)
        return kept

    def take(self, first: int, count: int) -> list[Example]:
        """Return examples number ``first`` to ``first + count - 1`` of an endless sequence."""
        places = np.arange(first, first + count, dtype=np.uint64)
        size = np.uint64(len(self._training))
        chosen = permute(places % size, places // size, size=len(self._training), seed=self._seed)
        return [self._training[int(index)] for index in chosen]


def open_prompts(recipe: GrpoRecipe, tokenizer: Tokenizer, files: Sequence[Path]) -> Prompts:
    """Make or read the prompts that a recipe asks for, and see that each can be answered.

    A row of a file has "messages" (the conversation to answer) or "prompt" (the same, or what the user says), perhaps "tools", and whatever
    its rewards want: "answer", "tests". One that has neither, that cannot be rendered or is answered already, or that leaves no room for an
    answer is refused and counted. Held out are those whose messages have the lowest lots: no conversation is on both sides.

    Args:
        recipe: with its lengths, as ``train.start.open_start`` returns it.
        tokenizer: of the model.
        files: of prompts; none for a task that makes its own.

    Raises:
        ConfigError: a task is named beside files, or neither; or the tokenizer's template is none of ours.
        DataError: more rows are refused than ``task.max_refused``, one is too long where ``task.too_long`` is "error", or too few are left.
    """
    section, seed = recipe.task, recipe.run.seed
    if bool(section.name) == bool(files):
        raise ConfigError("prompts come from files or from a task: give one of them", hint='--data FILE.jsonl, or task.name="arithmetic"')
    if section.name == "arithmetic":
        training = [_asked(problem) for problem in problems(_ENOUGH, seed, digits=section.digits, split="train")]
        held_out = [_asked(problem) for problem in problems(section.held_out, seed, digits=section.digits, split="test")]
        longest = max(training, key=lambda example: len(example["messages"][0]["content"]))
        _require_room(longest, recipe, tokenizer, "the task's longest prompt")
        return Prompts(training, held_out, seed)
    report = ReadingReport("prompts", rest="fields that only rewards may read")
    examples = sorted(read_rows(files, report, partial(_example, recipe, tokenizer), forms="docs/grpo.md"), key=_place)
    report.require_few_refused("prompt", section.max_refused, section="task", room="raise run.seq_len or lower rollout.max_tokens")
    border = min(section.held_out, len(examples))
    while 0 < border < len(examples) and examples[border]["messages"] == examples[border - 1]["messages"]:
        border += 1  # the same question again: on the same side
    return Prompts(examples[border:], examples[:border], seed, report.lines())


def _asked(problem: Problem) -> Example:
    return {"messages": [{"role": "user", "content": problem.question}], "answer": str(problem.answer)}


def _example(recipe: GrpoRecipe, tokenizer: Tokenizer, row: Row) -> tuple[str, Collection[str], Example]:
    """Return a row's form, the fields that it knows, and the example: all of the row, its messages and tools as they are rendered.

    Raises:
        Refused: it is no conversation that waits for an answer, or leaves no room for one.
        DataError: it leaves none, and may not be left out.
    """
    form = next((name for name in ("messages", "prompt") if name in row.fields), None)
    if form is None:
        raise Refused(f'a row needs "messages" or "prompt"; here are {", ".join(sorted(row.fields)) or "none"}')
    given = row.fields[form]
    messages, tools = conversation_of([{"role": "user", "content": given}] if isinstance(given, str) else given, row.fields.get("tools"))
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise Refused("its last turn is of neither the user nor a tool: there is nothing to answer")
    known = {form, "tools"}
    example = {name: value for name, value in row.fields.items() if name not in known} | {"messages": list(messages)}
    if tools:
        example["tools"] = list(tools)
    _require_room(example, recipe, tokenizer, row.place)
    return form, known, example


def _require_room(example: Example, recipe: GrpoRecipe, tokenizer: Tokenizer, place: str) -> None:
    """See that a prompt can be rendered and leaves room for an answer.

    Raises:
        Refused: it cannot, or does not and may be left out.
        DataError: it does not, and may not be left out.
    """
    length = len(render_row(tokenizer, example["messages"], tools=example.get("tools", ()), add_generation_prompt=True).tokens)
    longest, room = recipe.rollout.max_tokens, recipe.run.seq_len - recipe.rollout.max_tokens
    if length <= room:
        return
    if recipe.task.too_long == "refuse" and not recipe.task.name:
        raise Refused(f"longer than {room} tokens, which run.seq_len = {recipe.run.seq_len} leaves beside rollout.max_tokens = {longest}")
    raise DataError(
        f"{place} takes {length:,} tokens; with rollout.max_tokens = {longest} that is beyond run.seq_len = {recipe.run.seq_len}",
        hint="raise run.seq_len or lower rollout.max_tokens; with task.too_long=refuse such prompts of files are left out",
    )


def _place(example: Example) -> tuple[int, int]:
    """Return where an example stands: by its messages, then by the rest of its row, never by its place in a file."""
    return content_lot(canonical(example["messages"])), content_lot(canonical(example))
