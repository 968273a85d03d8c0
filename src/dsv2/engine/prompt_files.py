"""Files of prompts: JSON lines, or plain text with a prompt a line. All lines are read and checked before anything runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv2.engine.request import Constraint, SamplingParams
from dsv2.errors import DataError, Dsv2Error, did_you_mean
from dsv2.tokenizer.chat import render
from dsv2.tokenizer.tokenizer import Tokenizer

_PROMPTS = ("prompt", "messages", "tokens")  # a line has one of them
_CHAT = ("template", "tools")  # beside messages
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_KNOWN = ("id", *_PROMPTS, *_CHAT, *_SAMPLING)


@dataclass(frozen=True, slots=True)
class PromptLine:
    """A line of a file of prompts.

    Args:
        place: "FILE:LINE".
        name: its "id", or else its place.
        asked: what stands there: "prompt", "messages" or "tokens", and what goes with messages.
        params: how to answer it.
        own_length: it has a ``max_tokens`` of its own, which does not shrink to what the context has room for.
    """

    place: str
    name: str | int
    asked: Mapping[str, Any]
    params: SamplingParams
    own_length: bool

    def tokens(self, tokenizer: Tokenizer) -> Sequence[Any]:
        """Return the ids of the prompt.

        Raises:
            Dsv2Error: a message is malformed, or a text no Unicode; without the place.
        """
        if "tokens" in self.asked:
            return list(self.asked["tokens"])
        if "prompt" in self.asked:
            return tokenizer.encode(self.asked["prompt"])
        chat: dict[str, Any] = {name: self.asked.get(name) for name in _CHAT}
        return render(tokenizer, self.asked["messages"], add_generation_prompt=True, **chat).tokens


def read_prompts(files: Sequence[Path], params: SamplingParams) -> list[PromptLine]:
    """Read files of prompts.

    A line of a .jsonl file is an object with "prompt" (text), "messages" (as ``tokenizer.chat.render`` takes them, with "template" and
    "tools") or "tokens" (ids); "id" (text or a whole number) and fields of ``SamplingParams`` may stand beside it. A line of a .txt file is
    a prompt. Empty lines are passed over. Where ``params`` has a seed, a line without its own gets that plus its number among all lines,
    counted from 0.

    Args:
        files: .jsonl or .txt.
        params: for what lines leave open.

    Raises:
        DataError: a line cannot be used; names its file and number. Or there is no line, or two have one id.
    """
    lines: list[PromptLine] = []
    places: dict[str | int, str] = {}
    for file in files:
        for number, text in _texts(file):
            place = f"{file}:{number}"
            try:
                line = _line(place, _object(text) if file.suffix == ".jsonl" else {"prompt": text}, params, len(lines))
            except Dsv2Error as error:
                raise DataError(f"{place}: {error.message}", hint=error.hint) from error
            if line.name in places:
                raise DataError(f"{place}: id {line.name!r} is that of {places[line.name]} as well", hint="give every line its own id")
            places[line.name] = place
            lines.append(line)
    if not lines:
        raise DataError(f"there is no prompt in {', '.join(map(str, files))}")
    return lines


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, with their numbers from 1."""
    if file.suffix not in (".jsonl", ".txt"):
        raise DataError(f"{file} is neither .jsonl nor .txt", hint="write one JSON object or one prompt a line")
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number}: not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of the line") from error
        if text.strip():
            yield number, text


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"a JSON {type(row).__name__}, not an object", hint='write {"prompt": "..."}')
    return row


def _line(place: str, row: Mapping[str, Any], params: SamplingParams, number: int) -> PromptLine:
    unknown = [name for name in row if name not in _KNOWN]
    if unknown:
        raise DataError(f"the field {unknown[0]!r} is unknown", hint=did_you_mean(unknown[0], _KNOWN))
    asked = {name: row[name] for name in (*_PROMPTS, *_CHAT) if name in row}
    given = [name for name in _PROMPTS if name in row]
    if len(given) != 1:
        raise DataError(f"it has {' and '.join(given) or 'none'} of prompt, messages, tokens; exactly one is needed")
    for name, kind in (("prompt", str), ("messages", list), ("tokens", list), ("tools", list), ("template", str)):
        if name in asked and not isinstance(asked[name], kind):
            raise DataError(f"{name} is a JSON {type(asked[name]).__name__}, not a {'text' if kind is str else 'list'}")
    extra = [name for name in _CHAT if name in row]
    if extra and given != ["messages"]:
        raise DataError(f"{extra[0]} goes with messages, not with {given[0]}")
    name = row.get("id", place)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"id = {name!r} is neither text nor a whole number")
    chosen = {name: row[name] for name in _SAMPLING if name in row}
    if isinstance(chosen.get("constraint"), dict):
        chosen["constraint"] = _constraint(chosen["constraint"])
    if isinstance(chosen.get("logit_bias"), dict):  # keys of a JSON object are text
        chosen["logit_bias"] = {int(key) if key.isascii() and key.isdigit() else key: bias for key, bias in chosen["logit_bias"].items()}
    if isinstance(chosen.get("stop"), str):
        raise DataError(
            "stop is a JSON text, not a list of texts", hint=f'write "stop": {json.dumps([chosen["stop"]], ensure_ascii=False)}'
        )
    if params.seed is not None:
        chosen.setdefault("seed", params.seed + number)
    return PromptLine(place, name, asked, replace(params, **chosen), "max_tokens" in row)


def _constraint(value: dict[str, Any]) -> Constraint:
    if not {"kind"} <= set(value) <= {"kind", "source"}:
        raise DataError(f"constraint has the fields {', '.join(value) or 'none'}; it needs kind, and source but for json_object")
    return Constraint(**value)
