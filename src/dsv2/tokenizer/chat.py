"""Messages to token ids and the loss mask: every prompt format of the DeepSeek-V2 family, and the only place that knows them.

How ids come about. A marker is one id, placed here and never parsed from text; what anybody wrote is encoded with markers off, so
``<\uff5cUser\uff5c>`` in a message stays a row of ordinary tokens and cannot open a role. The result still equals encoding the whole
rendered string with its markers parsed (what transformers' ``apply_chat_template`` does), because text is cut only where the
pre-tokeniser cuts in every context:

    V2.5   at markers alone: all text between two of them is encoded as one run;
    V2     also after the newlines that end a turn (each newline is a piece of its own) and after the colon of ``Assistant:`` (a blank
           follows, which the pre-tokeniser gives to the next word).

The mask. ``loss_mask[i]`` says whether the model should learn to predict ``tokens[i]`` from the tokens before it; it is aligned with the
tokens and not shifted. True is exactly what the model itself writes: the content of an assistant's turn, its tool calls with their
markers, and the EOS after it. The generation prompt (``Assistant:``, the assistant marker, or the marker that closes tool outputs) is
given to the model, hence False. In V2 the blank after ``Assistant:`` belongs to the content: the prompt ends at the colon.

V2 has no defence against content that spells ``\\n\\nAssistant:``, since its roles are ordinary text; V2.5's are markers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, get_args

from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.pretokenize import require_unicode
from dsv2.tokenizer.specials import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEP,
    USER,
)

if TYPE_CHECKING:
    from dsv2.tokenizer.tokenizer import Tokenizer

Template = Literal["v2", "v2.5"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it.

    Args:
        tokens: ids, BOS first.
        loss_mask: same length; True where the token is the model's own to predict.
    """

    tokens: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class _Call:
    kind: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    content: str | None
    calls: tuple[_Call, ...]


@dataclass(frozen=True, slots=True)
class _Text:
    """A run of text that is encoded by itself."""

    text: str
    learn: bool = False


@dataclass(frozen=True, slots=True)
class _Marker:
    name: str
    learn: bool = False


_Segments = Iterator[_Text | _Marker]


def render(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, Any]],
    *,
    template: Template | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    strict_upstream: bool = False,
) -> Rendered:
    """Turn messages into ids and the loss mask (section 4.4 of the specification).

    V2.5 closes and reopens tool calls and outputs per turn and joins several system messages with a blank line, as DeepSeek's later
    templates do. After tool outputs the assistant goes on without its marker, so no generation prompt is added there.

    Args:
        tokenizer: its own template is used unless ``template`` says otherwise.
        messages: records with ``role`` (system, user, assistant; in V2.5 tool) and ``content`` (str). An assistant may have
            ``tool_calls`` in OpenAI's form, with content or with None; ``arguments`` is JSON text or an object. ``name`` and
            ``tool_call_id`` are accepted and, as upstream, have no place in the text.
        template: "v2" (V2, V2-Lite and Coder-V2 chat models of mid 2024) or "v2.5" (0628, 0724, V2.5 and our presets).
        tools: function schemas in OpenAI's form; listed after the system text as V2.5's model card does. V2.5 only.
        add_generation_prompt: end with what makes the model answer.
        strict_upstream: V2.5 exactly as published, with its faults: only the last system message counts, a single tool call is never
            closed, a third one closes twice, calls and outputs of later rounds are never opened, calls beside content are dropped.

    Raises:
        ConfigError: the tokenizer lacks the template's markers, or the template is unknown or has no tools.
        DataError: a message is malformed; names its index.
    """
    template = _resolve(tokenizer, template)
    turns = [_turn(message, index, template) for index, message in enumerate(messages)]
    if not turns:
        raise DataError("there are no messages to render")
    if tools and template == "v2":
        raise ConfigError("template v2 has no tools", hint='use template="v2.5"')
    if template == "v2":
        return _encode(tokenizer, _v2(turns, add_generation_prompt))
    system = [turn.content or "" for turn in turns if turn.role == "system"]
    text = "\n\n".join(system[-1:] if strict_upstream else system)
    if tools:
        text = f"{text}\n\n{_tools_text(tools)}" if text else _tools_text(tools)
    follow = _v25_upstream if strict_upstream else _v25
    return _encode(tokenizer, follow([turn for turn in turns if turn.role != "system"], text, add_generation_prompt))


def render_fim(tokenizer: "Tokenizer", prefix: str, suffix: str, middle: str | None = None) -> Rendered:
    """Render fill-in-the-middle in prefix, suffix, middle order (Coder-V2 report, section 3.1.2).

    Args:
        tokenizer: must have the FIM markers.
        prefix: text before the hole.
        suffix: text after it.
        middle: the answer, followed by EOS, both in the loss mask; None leaves the prompt for it. In pre-training all tokens are
            learnt: take ``tokens`` alone.

    Raises:
        ConfigError: the tokenizer has no FIM markers.
        DataError: a lone surrogate.
    """
    segments: list[_Text | _Marker] = [_Marker(BOS), _Marker(FIM_BEGIN), _Text(prefix), _Marker(FIM_HOLE), _Text(suffix), _Marker(FIM_END)]
    if middle is not None:
        segments += [_Text(middle, learn=True), _Marker(EOS, learn=True)]
    return _encode(tokenizer, iter(segments))


def stop_ids(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Return the ids that end an assistant's turn: EOS in every template."""
    return (tokenizer.eos_id,)


def content_of(template: Template | None, text: str) -> str:
    """Return an answer's content for the conversation: in V2 the model writes the blank behind "Assistant:" itself, and ``render`` too."""
    return text.removeprefix(" ") if template == "v2" else text


def chat_template(template: Template) -> str:
    """Return the Jinja text for tokenizer_config.json; it renders what ``render`` does, for messages that spell no marker.

    Raises:
        ConfigError: no template has this name.
    """
    _require_known(template)
    return files("dsv2.tokenizer").joinpath(f"{template}.jinja").read_text(encoding="utf-8").rstrip("\n")


def _resolve(tokenizer: "Tokenizer", template: Template | None) -> Template:
    chosen = template or tokenizer.template
    if chosen is None:
        raise ConfigError("this tokenizer's chat template is neither V2's nor V2.5's", hint='choose with template="v2" or "v2.5"')
    _require_known(chosen)
    return chosen


def _require_known(template: str) -> None:
    if template not in get_args(Template):
        raise ConfigError(f"template {template!r} is unknown", hint=f"use one of {', '.join(get_args(Template))}")


def _encode(tokenizer: "Tokenizer", segments: _Segments) -> Rendered:
    tokens: list[int] = []
    mask: list[bool] = []
    for segment in segments:
        if isinstance(segment, _Text):
            tokens += tokenizer.encode(segment.text, add_bos=False)
        elif segment.name in tokenizer.special_ids:
            tokens.append(tokenizer.special_ids[segment.name])
        else:
            raise ConfigError(f"the tokenizer has no marker {segment.name}", hint="use a V2.5 tokenizer, or the template v2")
        mask += [segment.learn] * (len(tokens) - len(mask))
    return Rendered(tokens, mask)


# Messages ---------------------------------------------------------------------------------------------------------------------------

_ROLES = {"v2": ("system", "user", "assistant"), "v2.5": ("system", "user", "assistant", "tool")}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


def _turn(message: Mapping[str, Any], index: int, template: Template) -> _Turn:
    """Check one message and give it a fixed form."""
    if not isinstance(message, Mapping):
        raise DataError(f"message {index} is of type {type(message).__name__}, expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES[template]:
        raise DataError(f"message {index} has role {role!r}; template {template} knows {', '.join(_ROLES[template])}")
    unknown = [key for key in message if key not in _KEYS]
    if unknown:
        raise DataError(f"message {index} has the field {unknown[0]!r}; known are {', '.join(_KEYS)}")
    raw_calls = message.get("tool_calls") or []
    if not isinstance(raw_calls, Sequence):
        raise DataError(f"tool_calls of message {index} is of type {type(raw_calls).__name__}, expected a list")
    if raw_calls and (role != "assistant" or template == "v2"):
        raise DataError(f"message {index} (role {role}) has tool_calls, which only the assistant of template v2.5 may have")
    calls = tuple(_call(call, f"tool call {rank} of message {index}") for rank, call in enumerate(raw_calls))
    if content is not None or not calls:
        require_unicode(content, f"content of message {index}")
    return _Turn(role, content, calls)


def _call(call: Any, where: str) -> _Call:
    try:
        kind, name, arguments = call.get("type") or "function", call["function"]["name"], call["function"]["arguments"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is not of the form {{type, function: {{name, arguments}}}}: {type(error).__name__} {error}") from error
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    for field, value in (("type", kind), ("name", name), ("arguments", arguments)):
        require_unicode(value, f"{field} of {where}")
    return _Call(kind, name, arguments)


def _tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the section that lists functions, as in V2.5's model card."""
    lines = ["## Tools\n\n### Function\n\nYou have the following functions available:\n"]
    for index, tool in enumerate(tools):
        try:
            name, schema = tool["function"]["name"], json.dumps(tool["function"], indent=4, ensure_ascii=False)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"tool {index} is not of the form {{type, function: {{name, ...}}}}: {type(error).__name__} {error}") from error
        lines.append(f"- `{name}`:\n```json\n{schema}\n```")
    return "\n".join(lines)


# V2 ---------------------------------------------------------------------------------------------------------------------------------


def _v2(turns: Sequence[_Turn], add_generation_prompt: bool) -> _Segments:
    yield _Marker(BOS)
    for turn in turns:
        if turn.role == "system":
            yield _Text(f"{turn.content}\n\n")
        elif turn.role == "user":
            yield _Text(f"User: {turn.content}\n\n")
        else:
            yield _Text("Assistant:")
            yield _Text(f" {turn.content}", learn=True)
            yield _Marker(EOS, learn=True)
    if add_generation_prompt:
        yield _Text("Assistant:")  # no blank after it: with one, V2-Lite changes language or repeats itself


# V2.5 -------------------------------------------------------------------------------------------------------------------------------


def _v25(turns: Sequence[_Turn], system: str, add_generation_prompt: bool) -> _Segments:
    in_outputs = False
    yield _Marker(BOS)
    yield _Text(system)
    for turn in turns:
        if turn.role == "tool":
            yield _Text("\n") if in_outputs else _Marker(OUTPUTS_BEGIN)
            yield from _output(turn)
        elif turn.role == "user":
            if in_outputs:
                yield _Marker(OUTPUTS_END)
            yield from (_Marker(USER), _Text(turn.content or ""))
        else:
            yield _Marker(OUTPUTS_END if in_outputs else ASSISTANT)
            yield _Text(turn.content or "", learn=True)
            yield from _calls(turn.calls)
            yield _Marker(EOS, learn=True)
        in_outputs = turn.role == "tool"
    if in_outputs:
        yield _Marker(OUTPUTS_END)
    elif add_generation_prompt:
        yield _Marker(ASSISTANT)


def _output(turn: _Turn) -> _Segments:
    yield _Marker(OUTPUT_BEGIN)
    yield _Text(turn.content or "")
    yield _Marker(OUTPUT_END)


def _calls(calls: Sequence[_Call]) -> _Segments:
    for rank, call in enumerate(calls):
        yield _Text("\n", learn=True) if rank else _Marker(CALLS_BEGIN, learn=True)
        yield from _one_call(call)
    if calls:
        yield _Marker(CALLS_END, learn=True)


def _one_call(call: _Call) -> _Segments:
    yield _Marker(CALL_BEGIN, learn=True)
    yield _Text(call.kind, learn=True)
    yield _Marker(SEP, learn=True)
    yield _Text(f"{call.name}\n```json\n{call.arguments}\n```", learn=True)
    yield _Marker(CALL_END, learn=True)


def _v25_upstream(turns: Sequence[_Turn], system: str, add_generation_prompt: bool) -> _Segments:
    """Follow the published template state for state; its two "first" flags are never reset."""
    first_call, first_output, in_outputs = True, True, False
    yield _Marker(BOS)
    yield _Text(system)
    for turn in turns:
        if turn.role == "tool":
            yield _Marker(OUTPUTS_BEGIN) if first_output else _Text("\n")
            yield from _output(turn)
            first_output = False
        elif turn.role == "user":
            yield from (_Marker(USER), _Text(turn.content or ""))
        elif turn.content is not None:
            yield _Marker(OUTPUTS_END if in_outputs else ASSISTANT)
            yield from (_Text(turn.content, learn=True), _Marker(EOS, learn=True))
        for call in turn.calls if turn.content is None else ():
            if first_call:
                yield from (_Marker(ASSISTANT), _Marker(CALLS_BEGIN, learn=True), *_one_call(call))
                first_call = False
            else:
                yield from (_Text("\n", learn=True), *_one_call(call), _Marker(CALLS_END, learn=True), _Marker(EOS, learn=True))
        in_outputs = turn.role == "tool"
    if in_outputs:
        yield _Marker(OUTPUTS_END)
    elif add_generation_prompt:
        yield _Marker(ASSISTANT)
