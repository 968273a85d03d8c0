"""What is asked of the engine and what it answers: small frozen records, checked when they are made.

Every field is honoured or refused. What depends on the model (context length, vocabulary) is checked by ``require_fit`` when an
engine is asked.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, get_args

from dsv2.errors import RequestError

if TYPE_CHECKING:
    from numpy import integer
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
ConstraintKind = Literal["json_schema", "json_object", "regex", "grammar"]
MAX_LOGPROBS = 20
MAX_SAMPLES = 128  # of one request
MAX_STOPS, MAX_STOP_LEN = 16, 256  # strings, characters
MAX_STOP_TOKENS = 1024
MAX_BIASES, MAX_BIAS = 1024, 100.0
MAX_SALT_LEN = 256  # characters
MAX_PRIORITY = 100
# Characters of a constraint's source: a schema or grammar of 64 KiB is a large one, a regular expression of 8 KiB a very large one.
MAX_SOURCE_LEN: dict[ConstraintKind, int] = {"json_schema": 65536, "json_object": 0, "regex": 8192, "grammar": 65536}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A form that the answer must have; the engine compiles it (``engine/constrain.py``) and draws only tokens that keep to it.

    Args:
        kind: "json_schema", "json_object" (any JSON object), "regex" (the whole answer matches; Rust's syntax without look-around and
            back-references) or "grammar" (Lark).
        source: the schema as JSON text or as a mapping, the regular expression, the grammar; empty for "json_object".

    Raises:
        RequestError: the kind is unknown, or the source is of the wrong type, empty where it is needed, or too long.
    """

    kind: ConstraintKind
    source: str = ""

    def __post_init__(self) -> None:
        """Check kind and size; a mapping becomes JSON text, so that a constraint can be hashed."""
        if self.kind not in get_args(ConstraintKind):
            raise RequestError(f"constraint.kind = {self.kind!r} is not one of {', '.join(get_args(ConstraintKind))}")
        source: Any = self.source
        if self.kind == "json_schema" and isinstance(source, Mapping):
            try:
                source = json.dumps(dict(source), ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(f"constraint: the schema is no JSON: {error}") from error
            object.__setattr__(self, "source", source)
        if not isinstance(source, str):
            raise RequestError(f"constraint.source is a {type(source).__name__}, not a string")
        if (limit := MAX_SOURCE_LEN[self.kind]) < len(source):
            raise RequestError(f"constraint: the {self.kind} has {len(source)} characters; at most {limit} are allowed")
        if not source and self.kind in ("json_schema", "grammar"):
            raise RequestError(f"constraint: the {self.kind} is empty")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    A row of logits goes through these in order: bias, repetition, frequency and presence penalty; ids that the constraint or
    ``min_tokens`` forbid; temperature, top-k, top-p over what top-k left, min-p over what top-p left. At each border the lower id stays
    among equals. Log-probabilities are the model's own: taken before all of these.

    Args:
        temperature: divides the logits; 0 takes the most probable token (the lowest id among equals) and draws nothing.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep the tokens with at least this share of the best token's probability; 0 keeps all.
        presence_penalty: subtracted once from the logit of each token that was generated, -2 to 2 (OpenAI's definition).
        frequency_penalty: subtracted as often as the token was generated, -2 to 2 (OpenAI's definition).
        repetition_penalty: divides a positive and multiplies a negative logit of each token of prompt and answer, 0.01 to 100
            (Keskar et al. 2019, section 4.1, with the sign rule of vLLM and transformers); 1 does nothing.
        logit_bias: id -> number from -100 to 100 that is added to its logit; kept as pairs, by id; at most 1024.
        max_tokens: end after this many new tokens, the end-of-sentence token included.
        min_tokens: before this many new tokens no end token is drawn and no stop string counts that is complete by then.
        seed: signed 64-bit. The same request with the same seed gives the same text whatever else is running; None draws a new
            seed from the system.
        stop: strings that end the text; the text is cut before the string that is completed first. At most 16 of 256 characters.
        include_stop: leave the stop string in the text.
        stop_token_ids: ids that end the request, besides the end-of-sentence token; at most 1024.
        ignore_eos: go on after the end-of-sentence token; the other stops keep working.
        logprobs: None gives none; n gives each token's log-probability and those of the n most probable tokens; at most 20.
        prompt_logprobs: the same for the tokens of the prompt after its first.
        prompt_logprobs_from: only for those from this position of the prompt on, counted from 0; what lies before may come from the cache.
        n: answers to the prompt, 1 to 128; each draws from a stream of its own, made of the seed and its index.
        constraint: form that the answer must have. It decides where the answer may end, so ``min_tokens`` and ``ignore_eos`` are
            refused beside it.
        stop_regex: Python regular expression: the answer ends with the token behind which its text, the last 256 characters of it, ends in
            a match, which stays in the text. One that ends inside a token does not count; empty: none.

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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    include_stop: bool = False
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0
    n: int = 1
    constraint: Constraint | None = None
    stop_regex: str = ""

    def __post_init__(self) -> None:
        """Check every field and settle its type."""
        settle = object.__setattr__
        settle(self, "temperature", _real("temperature", self.temperature, 0))
        settle(self, "top_k", _whole("top_k", self.top_k, 0))
        settle(self, "top_p", _real("top_p", self.top_p, 0, 1, above_low=True))
        settle(self, "min_p", _real("min_p", self.min_p, 0, 1))
        settle(self, "presence_penalty", _real("presence_penalty", self.presence_penalty, -2, 2))
        settle(self, "frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2, 2))
        settle(self, "repetition_penalty", _real("repetition_penalty", self.repetition_penalty, 0.01, 100))
        settle(self, "logit_bias", _biases(self.logit_bias))
        settle(self, "max_tokens", _whole("max_tokens", self.max_tokens, 1))
        settle(self, "min_tokens", _whole("min_tokens", self.min_tokens, 0, self.max_tokens))
        if self.seed is not None:
            settle(self, "seed", _whole("seed", self.seed, -(2**63), 2**63 - 1))
        settle(self, "stop", _strings("stop", self.stop))
        settle(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestError(f"stop_token_ids holds {len(self.stop_token_ids)} ids; at most {MAX_STOP_TOKENS} are allowed")
        _flag("ignore_eos", self.ignore_eos)
        _flag("include_stop", self.include_stop)
        _check_regex("stop_regex", self.stop_regex)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                settle(self, name, _whole(name, value, 0, MAX_LOGPROBS))
        settle(self, "prompt_logprobs_from", _whole("prompt_logprobs_from", self.prompt_logprobs_from, 0))
        if self.prompt_logprobs_from and self.prompt_logprobs is None:
            raise RequestError(
                f"prompt_logprobs_from = {self.prompt_logprobs_from} without prompt_logprobs", hint="set prompt_logprobs, to 0 at least"
            )
        settle(self, "n", _whole("n", self.n, 1, MAX_SAMPLES))
        self._check_constraint()

    def _check_constraint(self) -> None:
        if self.constraint is None:
            return
        if not isinstance(self.constraint, Constraint):
            raise RequestError(f"constraint = {self.constraint!r} is not a Constraint", hint='write Constraint("json_schema", schema)')
        for name in ("min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} = {getattr(self, name)} cannot be kept beside a constraint, which decides where the answer may end",
                    hint=f"leave {name} out, or write the least length into the constraint",
                )


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how to go on from it.

    Args:
        request_id: the caller's name for it, unique among the requests that the engine holds.
        tokens: the prompt, beginning-of-sentence token included where the model expects one; at least one id.
        params: how to choose the new tokens.
        priority: a higher one is served first; among equals the one that was accepted first; -100 to 100.
        deadline_s: the request ends with finish reason "deadline" this many seconds after it was accepted; None: no limit.
        cache_salt: cached prompt tokens are shared only among requests of the same salt; at most 256 characters.
        record_experts: give the routed expert ids of every token.

    Raises:
        RequestError: the id or the prompt is empty, a token is not an id, or a field is out of its range.
    """

    request_id: str
    tokens: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    record_experts: bool = False

    def __post_init__(self) -> None:
        """Check every field; the prompt becomes a tuple of plain integers."""
        if not isinstance(self.request_id, str) or not self.request_id:
            raise RequestError(f"request_id = {self.request_id!r} is not a non-empty string")
        object.__setattr__(self, "tokens", _token_ids("tokens", self.tokens))
        if not self.tokens:
            raise RequestError(
                f"request {self.request_id!r} has an empty prompt; at least 1 token is needed", hint="start with the tokenizer's bos_id"
            )
        object.__setattr__(self, "priority", _whole("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY))
        if self.deadline_s is not None:
            object.__setattr__(self, "deadline_s", _real("deadline_s", self.deadline_s, 0, above_low=True))
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_LEN:
            raise RequestError(f"cache_salt = {str(self.cache_salt)[:40]!r} is not a string of at most {MAX_SALT_LEN} characters")
        _flag("record_experts", self.record_experts)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token (natural logarithm, before bias, penalties, temperature and filters), and the best alternatives.

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
            "abort" after ``Engine.abort``, "deadline" after ``deadline_s`` seconds, "error" when it could not go on.
        logprobs: one entry per token when the request asked for them, else None.
        prompt_tokens: length of the prompt in tokens.
        index: which of the request's ``n`` answers this is, from 0.
        prompt_logprobs: one entry per token of the prompt, from its second or ``prompt_logprobs_from`` on, when the request asked for them,
            else None.
        cached_tokens: tokens of the prompt that were found in the cache.
        experts: ids of the routed experts, [token, MoE layer, chosen expert], when the request asked for them, else None.
        error: what was wrong when ``finish_reason`` is "error", else None.
    """

    request_id: str
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: int
    index: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int = 0
    experts: "NDArray[integer[Any]] | None" = field(default=None, compare=False)
    error: str | None = None


def require_fit(request: Request, *, max_len: int, num_tokens: int) -> None:
    """Refuse a request that a model cannot serve.

    Args:
        request: checked by itself.
        max_len: most tokens, prompt and answer together.
        num_tokens: ids that have a token.

    Raises:
        RequestError: it is longer, or names another id or a place behind its prompt.
    """
    name, params, length = request.request_id, request.params, len(request.tokens)
    if length + params.max_tokens > max_len:
        raise RequestError(
            f"request {name!r}: prompt of {length} tokens + max_tokens = {params.max_tokens} exceeds the context of {max_len} tokens",
            hint="shorten the prompt or lower max_tokens",
        )
    if params.prompt_logprobs_from >= length:
        raise RequestError(
            f"request {name!r}: prompt_logprobs_from = {params.prompt_logprobs_from} lies behind the prompt of {length} tokens"
        )
    biased = [token for token, _ in params.logit_bias]
    for field_name, ids in (("tokens", request.tokens), ("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
        if ids and max(ids) >= num_tokens:
            raise RequestError(f"request {name!r}: {field_name} holds id {max(ids)}; the tokenizer has ids 0 to {num_tokens - 1}")


def _whole(name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """Return ``value`` as a plain int within [low, high]; true and false are not numbers here."""
    allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise RequestError(f"{name} = {value!r} is not {allowed}")
    number = index(value)
    if number < low or (high is not None and number > high):
        raise RequestError(f"{name} = {number} is not {allowed}")
    return number


def _real(name: str, value: Any, low: float, high: float = math.inf, *, above_low: bool = False) -> float:
    """Return ``value`` as a finite float within [low, high], or within (low, high] where ``above_low`` is true."""
    allowed = f"a finite number {'>' if above_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high or (above_low and number == low):
        hint = "use temperature = 0 for the most probable token" if name == "top_p" and number == 0 else None
        raise RequestError(f"{name} = {value!r} is not {allowed}", hint=hint)
    return number


def _flag(name: str, value: Any) -> None:
    """Refuse what is not exactly true or false."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} = {value!r} is not true or false")


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Return pairs of id and bias by id, from a mapping or from pairs; an id may occur once."""
    wrong = RequestError(f"logit_bias = {str(value)[:80]!r} is not a mapping from token ids to numbers")
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise wrong
    try:
        pairs = [(token, bias) for token, bias in (value.items() if isinstance(value, Mapping) else value)]
    except (TypeError, ValueError):
        raise wrong from None
    if len(pairs) > MAX_BIASES:
        raise RequestError(f"logit_bias holds {len(pairs)} ids; at most {MAX_BIASES} are allowed")
    biases: dict[int, float] = {}
    for token, bias in pairs:
        plain = _whole("logit_bias: id", token, 0)
        if plain in biases:
            raise RequestError(f"logit_bias names id {plain} twice")
        biases[plain] = _real(f"logit_bias[{plain}]", bias, -MAX_BIAS, MAX_BIAS)
    return tuple(sorted(biases.items()))


def at_the_end(regex: str) -> re.Pattern[str]:
    """Return a pattern whose ``search`` finds a match of ``regex`` that a text ends in."""
    return re.compile(rf"(?:{regex})\Z")


def _check_regex(name: str, value: Any) -> None:
    """Refuse what is no regular expression; one that matches the empty text would end every answer at its first token."""
    if not isinstance(value, str):
        raise RequestError(f"{name} = {value!r} is not a string")
    if len(value) > MAX_STOP_LEN:
        raise RequestError(f"{name} = {value!r} has {len(value)} characters; at most {MAX_STOP_LEN} are allowed")
    try:
        empty = value and at_the_end(value).search("")
    except (re.error, RecursionError) as error:
        raise RequestError(f"{name} = {value!r} is not a regular expression: {error}") from error
    if empty:
        raise RequestError(f"{name} = {value!r} matches the empty text, in which every text ends", hint="let it need a character")


def _strings(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Return a tuple of non-empty strings; a bare string is refused, since it would pass as its letters."""
    if isinstance(value, str):
        raise RequestError(f"{name} = {value!r} is one string, not a list of strings", hint=f"write {name}=({value!r},)")
    if not isinstance(value, Iterable):
        raise RequestError(f"{name} = {value!r} is not a list of strings")
    strings = tuple(value)
    if len(strings) > MAX_STOPS:
        raise RequestError(f"{name} holds {len(strings)} strings; at most {MAX_STOPS} are allowed")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} holds {string!r}; every entry must be a non-empty string")
        if len(string) > MAX_STOP_LEN:
            raise RequestError(f"{name} holds a string of {len(string)} characters; at most {MAX_STOP_LEN} are allowed")
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
