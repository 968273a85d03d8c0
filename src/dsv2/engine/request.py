"""What is asked of the engine and what it answers: small frozen records, checked when they are made.

Every field is honoured or refused. What depends on the model (context length, vocabulary) is checked by ``Engine.add``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, SupportsIndex

from dsv2.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    The filters apply in this order: temperature, then top-k, then top-p over what top-k left. Log-probabilities are the model's
    own: taken before all three.

    Args:
        temperature: divides the logits; 0 takes the most probable token (the lowest id among equals) and draws nothing.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities reach this sum; 1 keeps all.
        max_tokens: end after this many new tokens, the end-of-sentence token included.
        seed: signed 64-bit. The same request with the same seed gives the same text whatever else is running; None draws a new
            seed from the system.
        stop: strings that end the text; the text is cut before the string that is completed first.
        stop_token_ids: ids that end the request, besides the end-of-sentence token.
        ignore_eos: go on after the end-of-sentence token; the other stops keep working.
        logprobs: None gives none; n gives each token's log-probability and those of the n most probable tokens.

    Raises:
        RequestError: a value is out of its range or of the wrong kind.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every field and settle its type."""
        settle = object.__setattr__
        settle(self, "temperature", _real("temperature", self.temperature, zero=True))
        settle(self, "top_k", _whole("top_k", self.top_k, 0))
        settle(self, "top_p", _real("top_p", self.top_p, zero=False, high=1.0))
        settle(self, "max_tokens", _whole("max_tokens", self.max_tokens, 1))
        if self.seed is not None:
            settle(self, "seed", _whole("seed", self.seed, -(2**63), 2**63 - 1))
        settle(self, "stop", _strings("stop", self.stop))
        settle(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos = {self.ignore_eos!r} is not true or false")
        if self.logprobs is not None:
            settle(self, "logprobs", _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS))


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how to go on from it.

    Args:
        request_id: the caller's name for it, unique among the requests that the engine holds.
        tokens: the prompt, beginning-of-sentence token included where the model expects one; at least one id.
        params: how to choose the new tokens.

    Raises:
        RequestError: the id or the prompt is empty, or a token is not an id.
    """

    request_id: str
    tokens: tuple[int, ...]
    params: SamplingParams

    def __post_init__(self) -> None:
        """Check the prompt and make it a tuple of plain integers."""
        if not isinstance(self.request_id, str) or not self.request_id:
            raise RequestError(f"request_id = {self.request_id!r} is not a non-empty string")
        object.__setattr__(self, "tokens", _token_ids("tokens", self.tokens))
        if not self.tokens:
            raise RequestError(
                f"request {self.request_id!r} has an empty prompt; at least 1 token is needed", hint="start with the tokenizer's bos_id"
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a chosen token (natural logarithm, before temperature and filters), and the best alternatives.

    ``top`` holds (token, log-probability) from the most probable down; the chosen token is in it only if it is among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens and text of one request: what one step added, or everything from ``Engine.generate``.

    ``tokens`` holds every id that was drawn, also the one that ended the request; ``text`` leaves out that one, special tokens, and
    the stop string with what follows it. Text that may turn out to be the beginning of a stop string, or part of a character, comes with a
    later output; so ``text`` may be empty although there is a token, and hold several tokens' text later.

    Args:
        finish_reason: None while the request runs; "stop" after an end token or stop string, "length" after ``max_tokens``,
            "abort" after ``Engine.abort``.
        logprobs: one entry per token when the request asked for them, else None.
        prompt_tokens: length of the prompt in tokens.
    """

    request_id: str
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: int


def _whole(name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """Return ``value`` as a plain int within [low, high]; true and false are not numbers here."""
    allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise RequestError(f"{name} = {value!r} is not {allowed}")
    number = index(value)
    if number < low or (high is not None and number > high):
        raise RequestError(f"{name} = {number} is not {allowed}")
    return number


def _real(name: str, value: Any, *, zero: bool, high: float = math.inf) -> float:
    """Return ``value`` as a finite float above 0 (or 0 itself where ``zero`` is true) and up to ``high``."""
    allowed = f"a finite number {'>=' if zero else '>'} 0" + (f" and <= {high:g}" if high < math.inf else "")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number > high or number < 0 or (number == 0 and not zero):
        hint = "use temperature = 0 for the most probable token" if number == 0 else None
        raise RequestError(f"{name} = {value!r} is not {allowed}", hint=hint)
    return number


def _strings(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Return a tuple of non-empty strings; a bare string is refused, since it would pass as its letters."""
    if isinstance(value, str):
        raise RequestError(f"{name} = {value!r} is one string, not a list of strings", hint=f"write {name}=({value!r},)")
    if not isinstance(value, Iterable):
        raise RequestError(f"{name} = {value!r} is not a list of strings")
    strings = tuple(value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} holds {string!r}; every entry must be a non-empty string")
    return strings


def _token_ids(name: str, value: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return a tuple of plain non-negative ints."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RequestError(f"{name} = {value!r} is not a list of token ids", hint="encode text with the tokenizer first")
    tokens = tuple(value)
    plain = tuple(token for token in tokens if type(token) is int and token >= 0)
    if len(plain) == len(tokens):
        return plain
    return tuple(_whole(f"{name}[{i}]", token, 0) for i, token in enumerate(tokens))
