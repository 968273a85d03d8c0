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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2.data.documents import SURROGATES
from dsv2.data.rows import ReadingReport, Refused, Row, read_rows
from dsv2.errors import did_you_mean

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool_call": "tool_call", "function_call": "tool_call", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")

Message = dict[str, Any]
Tool = Mapping[str, Any]  # a function's schema in OpenAI's form


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
    tools: tuple[Tool, ...]
    domain: str
    place: str


def read_conversations(paths: Sequence[str | Path], report: ReadingReport) -> Iterator[Conversation]:
    """Yield the conversations of files and folders, in order, and count in ``report`` what was read and refused.

    Raises:
        DataError: a path is missing, a file is damaged or of another kind, a line is no JSON object; or no row is a conversation.
        MissingExtra: .parquet without pyarrow, .zst without zstandard.
    """
    return read_rows(paths, report, _conversation, forms="docs/sft.md")


def _conversation(row: Row) -> tuple[str, Collection[str], Conversation]:
    for form, needed, optional, turns in _FORMS:
        if all(name in row.fields for name in needed):
            messages, tools = _whole(turns(row.fields), row.fields.get("tools"))
            return form, {*needed, *optional, "tools", "domain"}, Conversation(messages, tools, row.domain, row.place)
    raise Refused(f"no known form; its fields are {', '.join(sorted(row.fields)[:8]) or 'none'}")


def conversation_of(messages: Any, tools: Any = None) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Return messages and tools, given as a row of the form "messages" has them, as ``tokenizer/chat.py`` takes them.

    Raises:
        Refused: they make no conversation.
    """
    return _whole(_of_messages({"messages": messages}), tools)


def _whole(messages: Sequence[Message], tools: Any) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    joined = _joined(messages)
    answers = [message for message in joined if message["role"] == "assistant"]
    if answers and not any(map(_says_something, answers)):
        raise Refused("the assistant's turns are all empty")
    return tuple(joined), tuple(_tools(tools))


# Rows --------------------------------------------------------------------------------------------------------------------------------


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


def _tools(value: Any) -> list[Tool]:
    """Return function schemas in OpenAI's form; they come also as JSON text, or without the outer {type, function}."""
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else []
    tools: list[Tool] = []
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
