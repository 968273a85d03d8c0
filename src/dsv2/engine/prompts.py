"""What users write becomes requests: text, token ids or messages, one or many, sampled as the model's authors do where nothing is said."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, SupportsIndex, TypedDict, Unpack

from dsv2.engine.engine import Engine
from dsv2.engine.request import Output, Request, SamplingParams
from dsv2.errors import Dsv2Error, RequestError
from dsv2.tokenizer.chat import Template, render

Prompt = str | Sequence[SupportsIndex]  # text, or token ids
Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | Sequence[SamplingParams]


class RequestOptions(TypedDict, total=False):
    """Fields of ``Request`` that a call gives to all its requests."""

    priority: int
    deadline_s: float | None
    cache_salt: str
    record_experts: bool


@dataclass(frozen=True, slots=True)
class Score:
    """What a model says of given tokens.

    Args:
        tokens: the scored ids.
        logprobs: of each given all before it; natural logarithm, fp32 softmax over the whole vocabulary, as in training.
        greedy: whether each is the most probable token at its place (the lowest id among equals), so what temperature 0 would choose.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def sum(self) -> float:
        """Log-probability of all tokens together, nats."""
        return sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether temperature 0 would have written exactly these tokens."""
        return all(self.greedy)


def score_of(output: Output) -> Score:
    """Read a score off the answer to one of ``RequestBuilder.scored``.

    Raises:
        RequestError: it was ended before all was scored.
    """
    if output.finish_reason not in ("length", "stop"):
        raise RequestError(f"{output.request_id}: ended by {output.finish_reason} before it was scored")
    entries = output.prompt_logprobs or ()
    return Score(
        tuple(entry.token for entry in entries),
        tuple(entry.logprob for entry in entries),
        tuple(entry.top[0][0] == entry.token for entry in entries),
    )


class RequestBuilder:
    """Make requests that an engine accepts, each with an id of its own; may be used from any thread.

    Args:
        engine: that will run them.
        defaults: for calls without parameters; ``max_tokens`` then shrinks to what the context has room for.
    """

    def __init__(self, engine: Engine, defaults: SamplingParams) -> None:
        self._engine, self._defaults = engine, defaults
        self._calls = count(1)

    def prompts(self, prompts: Prompt | Iterable[Prompt], params: Params | None, **options: Unpack[RequestOptions]) -> list[Request]:
        """Return a request for each prompt.

        Raises:
            RequestError: a prompt is neither text nor ids or does not fit, or there are not as many parameters as prompts.
            DataError: a text is no Unicode.
        """
        listed = _listed(prompts)
        return self._requests([self._tokens(prompt, f"prompts[{i}]") for i, prompt in enumerate(listed)], "prompts", params, options)

    def conversations(
        self,
        conversations: Messages | Iterable[Messages],
        params: Params | None,
        template: Template | None,
        tools: Sequence[Mapping[str, Any]] | None,
        **options: Unpack[RequestOptions],
    ) -> list[Request]:
        """Return a request for the next turn of each conversation; raises as ``tokenizer.chat.render`` and ``prompts``."""
        listed: list[Any] = list(conversations)
        if not listed or isinstance(listed[0], Mapping):
            listed = [listed]
        rendered = []
        for i, messages in enumerate(listed):
            try:
                found = render(self._engine.tokenizer, messages, template=template, tools=tools, add_generation_prompt=True)
            except Dsv2Error as error:
                raise type(error)(f"conversations[{i}]: {error.message}", hint=error.hint) from error
            rendered.append(tuple(found.tokens))
        return self._requests(rendered, "conversations", params, options)

    def scored(self, prompts: Prompt | Iterable[Prompt], completions: Prompt | Iterable[Prompt] | None, cache_salt: str) -> list[Request]:
        """Return a request for each prompt whose answer ``score_of`` reads; raises as ``prompts``."""
        tokens = [self._tokens(prompt, f"prompts[{i}]") for i, prompt in enumerate(_listed(prompts))]
        firsts = [1] * len(tokens)
        if completions is not None:
            ends = [self._tokens(end, f"completions[{i}]", add_bos=False) for i, end in enumerate(_listed(completions))]
            if len(ends) != len(tokens):
                raise RequestError(f"{len(ends)} completions for {len(tokens)} prompts", hint="give one completion for each prompt")
            firsts = [len(prompt) for prompt in tokens]
            tokens = [prompt + end for prompt, end in zip(tokens, ends, strict=True)]
        for i, (whole, first) in enumerate(zip(tokens, firsts, strict=True)):
            if not 1 <= first < len(whole):
                what = "completions" if completions is not None and first else "prompts"
                raise RequestError(
                    f"{what}[{i}]: a score needs 1 token to begin with and 1 to score; here are {first} and {len(whole) - first}",
                    hint="begin with the tokenizer's bos_id",
                )
        params = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, prompt_logprobs_from=first) for first in firsts]
        return self._requests(tokens, "prompts", params, {"cache_salt": cache_salt})

    def _tokens(self, prompt: Prompt, place: str, *, add_bos: bool = True) -> tuple[Any, ...]:
        if isinstance(prompt, str):
            return tuple(self._engine.tokenizer.encode(prompt, add_bos=add_bos))
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
            raise RequestError(f"{place} is of type {type(prompt).__name__}; allowed are text and a list of token ids")
        return tuple(prompt)

    def _requests(self, tokens: Sequence[tuple[Any, ...]], place: str, params: Params | None, options: RequestOptions) -> list[Request]:
        call = next(self._calls)
        requests = []
        for i, (prompt, chosen) in enumerate(zip(tokens, self._params(params, tokens, place), strict=True)):
            request = Request(f"{place}[{i}] of call {call}", prompt, chosen, **options)
            self._engine.check(request)
            requests.append(request)
        return requests

    def _params(self, params: Params | None, tokens: Sequence[tuple[Any, ...]], place: str) -> list[SamplingParams]:
        if params is None:
            rooms = [max(1, self._engine.max_len - len(prompt)) for prompt in tokens]
            return [replace(self._defaults, max_tokens=min(self._defaults.max_tokens, room)) for room in rooms]
        listed = [params] * len(tokens) if isinstance(params, SamplingParams) else list(params)
        for one in listed:
            if not isinstance(one, SamplingParams):
                raise RequestError(f"params holds a {type(one).__name__}, not SamplingParams", hint="write SamplingParams(temperature=0)")
        if len(listed) != len(tokens):
            raise RequestError(f"{len(listed)} SamplingParams for {len(tokens)} {place}", hint="give one for all, or one for each")
        return listed


def _listed(prompts: Prompt | Iterable[Prompt]) -> list[Any]:
    """Return a list of prompts; a single one, and arrays and tensors of ids, are understood."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise RequestError(f"prompts is of type {type(prompts).__name__}; allowed are text, a list of token ids, and lists of these")
    listed = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in prompts]
    return [listed] if listed and isinstance(listed[0], SupportsIndex) else listed
