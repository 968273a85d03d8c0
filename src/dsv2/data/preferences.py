"""Judged answers out of files, one comparison or one judgement a row, with a report of what was read and what was refused.

    pair     {"messages": [...], "chosen": ..., "rejected": ...}     "prompt" instead of "messages"; without either, what both begin with
    label    {"messages": [..., the answer], "label": true}          or {"messages" or "prompt", "completion": ..., "label": ...}
    score    the same with "score": a number

"messages" and "prompt" are a text or messages, and so are the answers; "tools" as in conversations. The fields say which form a row has.
A row that is none of them, whose answers are empty, or whose two answers are equal is refused, counted by its reason, and the first place
is named.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2.data.conversations import Message, Tool, conversation_of
from dsv2.data.rows import ReadingReport, Refused, Row, read_rows
from dsv2.files import atomic_write

_PROMPTS, _KNOWN = ("messages", "prompt"), {"messages", "prompt", "chosen", "rejected", "completion", "label", "score", "tools", "domain"}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a conversation.

    Attributes:
        prompt: the conversation before it.
        messages: what the assistant says, last of all; tool calls and their outputs may come before.
        tools: function schemas in OpenAI's form.
    """

    prompt: tuple[Message, ...]
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """Answers to one prompt with what somebody thinks of them.

    Attributes:
        answers: two, the better one first; or one.
        score: of a single answer: a number, or 1 and 0 for good and bad; None where two are compared.
        domain: the row's field ``domain``, else the name of its file or folder.
        place: file and row, for messages.
    """

    answers: tuple[Answer, ...]
    score: float | None
    domain: str
    place: str

    @property
    def is_pair(self) -> bool:
        """Whether two answers are compared."""
        return self.score is None


def read_preferences(paths: Sequence[str | Path], report: ReadingReport) -> Iterator[Preference]:
    """Yield the judged answers of files and folders, in order, and count in ``report`` what was read and refused.

    Raises:
        DataError: a path is missing, a file is damaged or of another kind, a line is no JSON object; or no row is a judgement.
        MissingExtra: .parquet without pyarrow, .zst without zstandard.
    """
    return read_rows(paths, report, _preference, forms="docs/reward.md")


def _preference(row: Row) -> tuple[str, Collection[str], Preference]:
    form, answers, score = _judged(row.fields)
    return form, _KNOWN, Preference(answers, score, row.domain, row.place)


def _judged(row: Mapping[str, Any]) -> tuple[str, tuple[Answer, ...], float | None]:
    """Return a row's form, its answers, and the score of a single one.

    Raises:
        Refused: it is no judgement of answers.
    """
    if "chosen" in row and "rejected" in row:
        answers = _pair(row)
        if answers[0] == answers[1]:
            raise Refused("chosen and rejected are equal")
        return "pair", answers, None
    form = next((name for name in ("label", "score") if name in row), None)
    if form is None or not any(name in row for name in _PROMPTS):
        raise Refused(f"no known form; its fields are {', '.join(sorted(row)[:8]) or 'none'}")
    return form, (_single(row),), _score(row[form], form)


def _pair(row: Mapping[str, Any]) -> tuple[Answer, ...]:
    chosen, rejected = (_turns(row[name], "assistant", name) for name in ("chosen", "rejected"))
    given = _prompt(row)
    if given is None:  # whole conversations: they part where the answers begin, at the latest before the last turn
        most = min(len(chosen), len(rejected)) - 1
        shared = next((n for n in range(most) if chosen[n] != rejected[n]), most)
        given, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif given and chosen[: len(given)] == given and rejected[: len(given)] == given:
        chosen, rejected = chosen[len(given) :], rejected[len(given) :]  # the answers repeat the prompt
    return tuple(_answer(given, turns, row.get("tools")) for turns in (chosen, rejected))


def _single(row: Mapping[str, Any]) -> Answer:
    given = _prompt(row) or []
    if "completion" in row:
        return _answer(given, _turns(row["completion"], "assistant", "completion"), row.get("tools"))
    return _answer(given[:-1], given[-1:], row.get("tools"))


def _prompt(row: Mapping[str, Any]) -> list[Any] | None:
    name = next((name for name in _PROMPTS if name in row), None)
    return None if name is None else _turns(row[name], "user", name)


def _turns(value: Any, role: str, name: str) -> list[Any]:
    """Return the messages that a field means: a text is one of ``role``."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise Refused(f"{name} is of type {type(value).__name__}, neither text nor messages")
    return turns


def _answer(prompt: list[Any], turns: list[Any], tools: Any) -> Answer:
    """Check both parts as one conversation, and cut it again."""
    if not prompt:
        raise Refused("there is no prompt")
    before, checked_tools = conversation_of(prompt, tools)
    whole, _ = conversation_of([*prompt, *turns], tools)
    messages = whole[len(before) :]
    if whole[: len(before)] != before or not messages or messages[-1]["role"] != "assistant":
        raise Refused("the answer does not end with a turn of the assistant")
    if not messages[-1].get("tool_calls") and not (messages[-1].get("content") or "").strip():
        raise Refused("an answer is empty")
    return Answer(before, messages, checked_tools)


def _score(value: Any, name: str) -> float:
    if name == "label" and value not in (0, 1):  # True and False are
        raise Refused("label is neither true (1) nor false (0)")
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise Refused(f"{name} is no finite number")


def write_preferences(file: Path, preferences: Sequence[Preference]) -> None:
    """Write judged answers as lines that ``read_preferences`` reads back.

    Raises:
        DataError: the disk is full or may not be written.
    """
    atomic_write(file, "".join(json.dumps(_row(preference), ensure_ascii=False) + "\n" for preference in preferences))


def _row(preference: Preference) -> dict[str, Any]:
    first = preference.answers[0]
    row: dict[str, Any] = {"messages": list(first.prompt), "domain": preference.domain}
    if first.tools:
        row["tools"] = list(first.tools)
    if preference.is_pair:
        return row | {"chosen": list(first.messages), "rejected": list(preference.answers[1].messages)}
    return row | {"completion": list(first.messages), "score": preference.score}
