"""The engine: requests join, decode together and leave, one step at a time.

    add -> waiting -> (a free row: prefill, first token) -> live -> (decode, one token a step) -> finished

A step decodes one token for every live row, then prefills what waits while rows are free, and returns what each request gained. The
caller's thread does all the work; nothing runs between steps. Live requests fill the rows from 0 on without gaps, so that a step reads
the cache in place.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2.engine.constrain import Grammar, GrammarCompiler
from dsv2.engine.request import FinishReason, Output, Request, TokenLogprob
from dsv2.engine.runner import Runner
from dsv2.engine.sampler import Drawn, NotFinite, SamplerState, draw_seed, sample
from dsv2.engine.slab import LatentSlab
from dsv2.engine.text import TextStream
from dsv2.errors import CheckpointError, ConfigError, RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer


class Engine:
    """A model that serves many requests at once.

    A request's tokens depend on its prompt, parameters and seed alone. The batch enters only through the rounding of matrix products,
    whose order may vary with the number of rows; it can turn a choice between all but equal tokens.

    Args:
        model: used as it is; its weights are read at each step, so a training loop may sample between its own steps.
        tokenizer: the model's.
        max_batch: most requests that decode together; more wait.
        max_len: most tokens of a request, prompt and answer together; None: what the model was made for
            (``max_position_embeddings``). Memory is taken as requests need it, not for this length at once.
        dtype: of the cached latents; None: the model's.

    Raises:
        ConfigError: ``max_batch`` or ``max_len`` is out of range.
        CheckpointError: the tokenizer has ids that the model lacks.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 8,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config, weight = model.config, next(model.parameters())
        longest = config.max_position_embeddings
        if max_batch < 1:
            raise ConfigError(f"max_batch = {max_batch} must be at least 1")
        if max_len is not None and not 1 <= max_len <= longest:
            raise ConfigError(f"max_len = {max_len} is not from 1 to max_position_embeddings = {longest}")
        if tokenizer.num_tokens > config.vocab_size:
            raise CheckpointError(f"the tokenizer has {tokenizer.num_tokens} ids, the model's vocabulary only {config.vocab_size}")
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_len = longest if max_len is None else max_len
        self._slab = LatentSlab(
            config.num_hidden_layers,
            max_batch,
            self.max_len,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            dtype or weight.dtype,
            weight.device,
        )
        self._runner = Runner(model, self._slab)
        self._grammars = GrammarCompiler(tokenizer)
        self._compiled: dict[str, Grammar] = {}  # of waiting requests
        self._ids: set[str] = set()
        self._waiting: deque[Request] = deque()
        self._live: list[_Running] = []  # by row
        self._undelivered: list[Output] = []  # of other requests, made while one was streamed

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to return."""
        return bool(self._live or self._waiting or self._undelivered)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token takes in the latent cache over all layers."""
        return self._slab.bytes_per_token

    def add(self, request: Request) -> None:
        """Accept a request; it starts at the next step with a free row.

        Raises:
            RequestError: its id is taken, it cannot fit into ``max_len`` tokens, it names an id outside the vocabulary, its constraint
                cannot be compiled, or it asks for what this engine does not do.
            MissingExtra: it has a constraint and llguidance is not installed.
        """
        name, params, num_tokens = request.request_id, request.params, self.tokenizer.num_tokens
        if name in self._ids:
            raise RequestError(f"request_id = {name!r} is already running", hint="give every running request its own id")
        if len(request.tokens) + params.max_tokens > self.max_len:
            raise RequestError(
                f"request {name!r}: prompt of {len(request.tokens)} tokens + max_tokens = {params.max_tokens} exceeds"
                f" the context of {self.max_len} tokens",
                hint="shorten the prompt or lower max_tokens",
            )
        biased = tuple(token for token, _ in params.logit_bias)
        for field, ids in (("tokens", request.tokens), ("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
            if ids and max(ids) >= num_tokens:
                raise RequestError(f"request {name!r}: {field} holds id {max(ids)}; the tokenizer has ids 0 to {num_tokens - 1}")
        asked = {"n": params.n > 1, "prompt_logprobs": params.prompt_logprobs is not None, "priority": request.priority != 0}
        asked |= {"deadline_s": request.deadline_s is not None, "record_experts": request.record_experts}
        for field, wanted in asked.items():
            if wanted:
                raise RequestError(f"request {name!r}: this engine does not do {field}", hint=f"leave {field} out")
        if params.constraint is not None:
            self._compiled[name] = self._grammars.compile(params.constraint)
        self._ids.add(name)
        self._waiting.append(request)

    def step(self) -> list[Output]:
        """Advance every live request by one token, start waiting ones while rows are free; return what each gained.

        A request occurs at most once unless outputs were left over from a ``stream``; ``finish_reason`` marks its last one.

        Raises:
            CheckpointError: the logits of a request are not finite. It is dropped; the others are as before the step.
        """
        outputs, self._undelivered = self._undelivered, []
        try:
            if self._live:
                logits = self._runner.decode([running.last_token for running in self._live], [running.cached for running in self._live])
                outputs += self._extend(0, logits)
            while self._waiting and len(self._live) < self.max_batch:
                row, request = len(self._live), self._waiting[0]
                logits = self._runner.prefill(row, request.tokens)
                grammar = self._compiled.pop(request.request_id, None)
                self._live.append(_Running(self._waiting.popleft(), self.tokenizer, grammar))
                outputs += self._extend(row, logits)
        except BaseException:
            self._undelivered = outputs
            raise
        return outputs

    def abort(self, request_id: str) -> Output | None:
        """End a request now; return its last output, with text that was held back, or None if it has finished or never was."""
        self._undelivered = [output for output in self._undelivered if output.request_id != request_id]
        if request_id not in self._ids:
            return None
        self._ids.remove(request_id)
        for row, running in enumerate(self._live):
            if running.request.request_id == request_id:
                self._slab.clear(row)
                self._leave(row)
                return running.output((), running.text.finish(), "abort", ())
        request = next(request for request in self._waiting if request.request_id == request_id)
        self._waiting.remove(request)
        self._compiled.pop(request_id, None)
        return _Running(request, self.tokenizer).output((), "", "abort", ())

    def stream(self, request: Request) -> Iterator[Output]:
        """Add a request and yield its outputs as they come; closing the iterator aborts it.

        Other requests advance meanwhile; what they gain is kept for the next ``step``, ``stream`` or ``generate``.

        Raises:
            RequestError: as ``add``, when the first output is asked for.
        """
        self.add(request)
        finished = False
        try:
            while not finished:
                outputs = self._step_for((request.request_id,))
                for output in outputs:
                    finished = output.finish_reason is not None
                    yield output
                if not outputs and request.request_id not in self._ids:
                    return  # aborted by somebody else
        finally:
            self.abort(request.request_id)

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Run requests to their ends; return one whole output for each, in the order given.

        Raises:
            RequestError: as ``add``; then none of them has run.
        """
        parts: dict[str, list[Output]] = {}
        try:
            for request in requests:
                self.add(request)
                parts[request.request_id] = []
            unfinished = len(requests)
            while unfinished:
                for output in self._step_for(parts):
                    parts[output.request_id].append(output)
                    unfinished -= output.finish_reason is not None
        finally:
            for request_id in parts:
                self.abort(request_id)
        return [_joined(parts[request.request_id]) for request in requests]

    def _step_for(self, request_ids: Collection[str]) -> list[Output]:
        """Step; return the outputs of these requests and keep the others."""
        outputs = self.step()
        self._undelivered = [output for output in outputs if output.request_id not in request_ids]
        return [output for output in outputs if output.request_id in request_ids]

    def _extend(self, first_row: int, logits: Float[Tensor, "batch vocab"]) -> list[Output]:
        """Sample a token for each live row from ``first_row`` on; free the rows that end with it."""
        extended = self._live[first_row:]
        try:
            drawn = sample(logits.cpu().numpy(), [running.sampler for running in extended], num_tokens=self.tokenizer.num_tokens)
        except NotFinite as failure:
            names = [extended[row].request.request_id for row in failure.rows]
            for name in names:
                self.abort(name)
            raise CheckpointError(f"request {', '.join(map(repr, names))}: {failure.message}", hint=failure.hint) from failure
        outputs = [running.take(gained) for running, gained in zip(extended, drawn, strict=True)]
        for row in reversed(range(len(extended))):  # from the end, so that the row that fills a gap is a live one
            if outputs[row].finish_reason is not None:
                self._ids.remove(outputs[row].request_id)
                self._leave(first_row + row)
        return outputs

    def _leave(self, row: int) -> None:
        """Free a row; the last live one moves into the gap."""
        last = len(self._live) - 1
        if row < last:
            self._slab.move(last, row, self._live[last].cached)
            self._live[row] = self._live[last]
        self._live.pop()


class _Running:
    """A request in a row, between its steps."""

    __slots__ = ("last_token", "num_new", "request", "sampler", "text")

    def __init__(self, request: Request, tokenizer: Tokenizer, grammar: Grammar | None = None) -> None:
        params = request.params
        self.request = request
        self.sampler = SamplerState(
            params,
            request.tokens,
            seed=draw_seed(params),
            end_ids=params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, tokenizer.eos_id),
            matcher=None if grammar is None else grammar.matcher(),
        )
        self.text = TextStream(tokenizer.stream(), params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens)
        self.num_new = 0
        self.last_token = -1

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the last drawn one, whose position this is."""
        return len(self.request.tokens) + self.num_new - 1

    def take(self, drawn: Drawn) -> Output:
        """Add a drawn token; return what the request gained, and whether and why it ends."""
        if drawn.error is not None:
            return replace(self.output((), self.text.finish(), "error", ()), error=drawn.error.message)
        (token,) = drawn.tokens
        self.last_token = token
        self.num_new += 1
        reason: FinishReason | None = None
        if self.sampler.ends(token):
            text, reason = self.text.finish(), "stop"
        else:
            text = self.text.push(token)
            if not self.text.stopped and self.num_new == self.request.params.max_tokens:
                text, reason = text + self.text.finish(), "length"
            if self.text.stopped:
                reason = "stop"
        return self.output((token,), text, reason, drawn.logprobs or ())

    def output(self, tokens: tuple[int, ...], text: str, reason: FinishReason | None, logprobs: Sequence[TokenLogprob]) -> Output:
        """Make an output of this request."""
        given = None if self.request.params.logprobs is None else tuple(logprobs)
        return Output(self.request.request_id, tokens, text, reason, given, len(self.request.tokens))


def _joined(parts: Sequence[Output]) -> Output:
    """Join the outputs of one request, in order, into one."""
    last = parts[-1]
    return Output(
        last.request_id,
        tuple(token for part in parts for token in part.tokens),
        "".join(part.text for part in parts),
        last.finish_reason,
        None if last.logprobs is None else tuple(entry for part in parts for entry in part.logprobs or ()),
        last.prompt_tokens,
        error=last.error,
    )
