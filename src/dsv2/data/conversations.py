"""Conversations out of files, one a row, whichever of the usual forms they have, with a report of what was read and what was refused.

    messages         {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}          OpenAI's form; tools also as JSON text
    prompt           {"prompt": ..., "completion": ...}                                             texts, or lists of messages
    sharegpt         {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
    alpaca           {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}

Which form a row has, its fields say; nothing has to be configured. All of them become the messages that ``tokenizer/chat.py`` renders.
A tool call may also be a turn of its own (role tool_call or function_call, whose content is {"name", "arguments"} as JSON): it joins the
assistant's turn before it. A row that does not make a conversation is refused, counted by its reason, and the first place is named.
"""

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv2.data.decompress import DECOMPRESS, import_extra, split_lines
from dsv2.data.documents import SURROGATES, SourceFile, damaged, parse_row, source_files
from dsv2.errors import DataError, did_you_mean

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool_call": "tool_call", "function_call": "tool_call", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
READABLE = ".jsonl (also with .gz or .zst) and .parquet"
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as ``tokenizer/chat.py`` takes them, and where they came from.

    Attributes:
        messages: with role system, user, assistant or tool.
        tools: function schemas in OpenAI's form.
        domain: kind of conversation, as of documents: the row's field ``domain``, else the name of its file or folder.
        place: file and row, for messages.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    domain: str
    place: str


@dataclass(slots=True)
class ReadingReport:
    """What became of the rows of some files; grows while they are read.

    Attributes:
        noun: what the rows are to be, in words.
        rows: how many there were.
        read: rows that gave a conversation, by form.
        refused: rows that did not, by reason.
        first_refused: place of the first row of each reason.
        unused_fields: fields that mean nothing here, and in how many rows.
    """

    noun: str = "conversations"
    rows: int = 0
    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: dict[str, str] = field(default_factory=dict)
    unused_fields: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, place: str) -> None:
        """Count a row that is not used."""
        self.refused[reason] += 1
        self.first_refused.setdefault(reason, place)

    def require_few_refused(
        self, name: str, most: float, *, section: str = "data", room: str = "raise run.seq_len or set data.too_long=cut"
    ) -> None:
        """Refuse files of which too little can be used.

        Args:
            name: of the files, for the message.
            most: share of the rows that may be refused.
            section: of the recipe that says so, for the message.
            room: how rows that are too long are made to fit, for the hint.

        Raises:
            DataError: more are.
        """
        refused = self.refused.total()
        if refused > most * self.rows:
            raise DataError(
                f"{refused:,} of {self.rows:,} {name} rows are refused, more than {section}.max_refused = {most:g}:\n  "
                + "\n  ".join(self.lines()[1:]),
                hint=f"mend the rows, {room} where they are too long, or raise {section}.max_refused",
            )

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        forms = ", ".join(f"{count:,} as {form}" for form, count in self.read.most_common()) or "none"
        found = [f"{self.rows:,} rows, {self.read.total():,} of them {self.noun}: {forms}"]
        found += [f"{count:,} rows refused: {reason} (first: {self.first_refused[reason]})" for reason, count in self.refused.most_common()]
        if self.unused_fields:
            found.append("fields without a use here: " + ", ".join(f"{name} ({n:,})" for name, n in self.unused_fields.most_common(8)))
        return found


class Refused(Exception):
    """A row is no conversation; the text says why, in words that are equal for equal faults."""


def read_conversations(paths: Sequence[str | Path], report: ReadingReport) -> Iterator[Conversation]:
    """Yield the conversations of files and folders, in order, and count in ``report`` what was read and refused.

    Raises:
        DataError: a path is missing, a file is damaged or of another kind, a line is no JSON object; or no row is a conversation.
        MissingExtra: .parquet without pyarrow, .zst without zstandard.
    """
    given = [str(path) for path in paths]
    files, _ = source_files(given)
    for file in files:
        if file.layout == "text":
            raise DataError(f"{file} holds text, not conversations", hint=f"readable are {READABLE}")
        for number, row in rows_of(file):
            place = f"{file}:{number}"
            report.rows += 1
            try:
                form, messages, tools = conversation_of(row, report)
            except Refused as reason:
                report.refuse(str(reason), place)
                continue
            report.read[form] += 1
            domain = row.get("domain")
            yield Conversation(tuple(messages), tuple(tools), domain if isinstance(domain, str) and domain else file.domain, place)
    if not report.read:
        seen = "; ".join(report.lines()[1:]) or "no rows"
        raise DataError(f"no conversation in {', '.join(given) or 'no file'}: {seen}", hint="docs/sft.md shows the forms that are read")


def rows_of(file: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the fields of each row; a blank line has a number and is left out."""
    if file.layout == "parquet":
        yield from enumerate(_parquet(file), 1)
        return
    try:
        with nullcontext(sys.stdin.buffer) if file.path is None else file.path.open("rb") as raw:
            for number, line in enumerate(split_lines(DECOMPRESS[file.compression](raw)), 1):
                row = parse_row(_decode(line, file, number), f"{file}:{number}")
                if row is not None:
                    yield number, row
    except (EOFError, OSError, zlib.error) as error:
        raise damaged(file, error) from error


def _decode(line: bytes, file: SourceFile, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}:{number}: invalid UTF-8 at byte {error.start} of the line", hint="convert the file to UTF-8") from None


def _parquet(file: SourceFile) -> Iterator[dict[str, Any]]:
    pyarrow = import_extra("pyarrow", f"reading {file}")
    parquet = import_extra("pyarrow.parquet", f"reading {file}")
    try:
        with parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(file, error) from error


# Rows --------------------------------------------------------------------------------------------------------------------------------


def conversation_of(row: Mapping[str, Any], report: ReadingReport) -> tuple[str, list[Message], list[Mapping[str, Any]]]:
    """Return a row's form, messages and tools, and count in ``report`` the fields without a use.

    Raises:
        Refused: it is no conversation.
    """
    present = {name: value for name, value in row.items() if value is not None}  # parquet fills absent fields with null
    for form, needed, optional, turns in _FORMS:
        if all(name in present for name in needed):
            known = {*needed, *optional, "tools", "domain"}
            report.unused_fields.update(name for name in present if name not in known)
            messages = _joined(turns(present))
            answers = [message for message in messages if message["role"] == "assistant"]
            if answers and not any(map(_says_something, answers)):
                raise Refused("the assistant's turns are all empty")
            return form, messages, _tools(present.get("tools"))
    fields = ", ".join(sorted(present)[:8]) or "none"
    raise Refused(f"no known form; its fields are {fields}")


def _of_messages(row: Mapping[str, Any]) -> list[Message]:
    return [_message(message, "role", "content") for message in _list(row["messages"], "messages")]


def _of_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = [_message(turn, "from", "value") for turn in _list(row["conversations"], "conversations")]
    return _system(row) + turns


def _of_prompt(row: Mapping[str, Any]) -> list[Message]:
    found: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[name]
        found += [_message(m, "role", "content") for m in value] if isinstance(value, list) else [_turn(role, value, name)]
    return found


def _of_alpaca(row: Mapping[str, Any]) -> list[Message]:
    found = _system(row)
    for pair in _list(row.get("history", []), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused("history is not a list of [question, answer]")
        found += [_turn("user", pair[0], "history"), _turn("assistant", pair[1], "history")]
    question, more = _text(row["instruction"], "instruction"), _text(row.get("input", ""), "input")
    return [
        *found,
        _turn("user", f"{question}\n\n{more}" if more else question, "instruction"),
        _turn("assistant", row["output"], "output"),
    ]


_FORMS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any]], list[Message]]], ...] = (
    ("messages", ("messages",), (), _of_messages),
    ("sharegpt", ("conversations",), ("system",), _of_sharegpt),
    ("prompt", ("prompt", "completion"), (), _of_prompt),
    ("alpaca", ("instruction", "output"), ("input", "system", "history"), _of_alpaca),
)


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [_turn("system", row["system"], "system")] if row.get("system") else []


def _turn(role: str, value: Any, name: str) -> Message:
    return {"role": role, "content": _text(value, name)}


def _message(message: Any, role_field: str, text_field: str) -> Message:
    """Return a message with OpenAI's field names, our names of roles, and without fields that are null."""
    if not isinstance(message, Mapping):
        raise Refused(f"a message is of type {type(message).__name__}, not an object")
    ours = {role_field: "role", text_field: "content"}
    given: Message = {ours.get(str(name), str(name)): value for name, value in message.items() if value is not None}
    unknown = next((name for name in given if name not in _MESSAGE_FIELDS), None)
    if unknown is not None:
        raise Refused(f"a message has the field {unknown!r}; known are {', '.join(_MESSAGE_FIELDS)}")
    role = given.get("role")
    if role not in ROLES:
        near = did_you_mean(role, ROLES) if isinstance(role, str) else None
        raise Refused(f"a message has the role {role!r}{'; ' + near if near else ''}")
    given["role"] = ROLES[role]
    if "content" in given or not given.get("tool_calls"):
        given["content"] = _text(given.get("content"), "content")
    return given


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} is of type {type(value).__name__}, not text")
    if SURROGATES.search(value):
        raise Refused(f"{name} holds half a surrogate pair")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(f"{name} is of type {type(value).__name__}, not a list")
    return value


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(f"{name} is no valid JSON") from None


def _tools(value: Any) -> list[Mapping[str, Any]]:
    """Return function schemas in OpenAI's form; they come also as JSON text, or without the outer {type, function}."""
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else []
    tools: list[Mapping[str, Any]] = []
    for tool in _list(value or [], "tools"):
        if not isinstance(tool, Mapping):
            raise Refused("a tool is no object")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Refused("a tool has no name")
        tools.append({"type": "function", "function": function})
    return tools


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Put each call that is a turn of its own into the assistant's turn that it belongs to."""
    found: list[Message] = []
    for message in messages:
        if message["role"] != "tool_call":
            found.append(message)
            continue
        calls = _calls(message["content"])
        if found and found[-1]["role"] == "assistant":
            found[-1] = found[-1] | {"tool_calls": [*found[-1].get("tool_calls", []), *calls]}
        else:
            found.append({"role": "assistant", "tool_calls": calls})
    return found


def _calls(text: str) -> list[Message]:
    value = _json(text, "a tool call")
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        raise Refused('a tool call is not of the form {"name": ..., "arguments": ...}')
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


def _says_something(message: Message) -> bool:
    return bool(message.get("tool_calls")) or bool((message.get("content") or "").strip())
