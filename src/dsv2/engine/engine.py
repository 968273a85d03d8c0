"""The engine: requests join, run together and leave, one step at a time.

    add -> (constraint compiled) -> scheduler -> a plan of chunks -> stack: one call -> sampler -> Outputs

A step is one call of the layer stack over the chunks that the scheduler chose: a token, with drafts, of every answer that is being
written, and pieces of prompts. The caller's thread does all the work; nothing runs between steps.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from itertools import count
from math import inf
from pathlib import Path

import numpy as np

from dsv2.engine.answer import MOST_DRAFTED, Answer, Dropped, PromptRecord
from dsv2.engine.blocks import BlockPool
from dsv2.engine.constrain import Compilation, Grammar, GrammarCompiler
from dsv2.engine.gather import collect, run
from dsv2.engine.native import Answered, Piece, StackWeights
from dsv2.engine.pieces import pieces_of
from dsv2.engine.request import FinishReason, Output, Request, require_fit
from dsv2.engine.sampler import NotFinite, draw_seed, read_logprobs, sample
from dsv2.engine.scheduler import Scheduler
from dsv2.engine.sequence import Chunk, Plan
from dsv2.engine.sequence import Sequence as Row
from dsv2.engine.settings import Backend, CacheKind, require_settings
from dsv2.engine.stack import Stack, is_fp32, open_stack, open_tier, plan_cache
from dsv2.errors import CheckpointError, ConfigError, MissingExtra, RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

_SCORED_ROWS = 128  # rows of logits kept at a time where a whole prompt's are wanted
_DRAFTING_UP_TO = 4  # answers at once: in larger batches a step is bound by arithmetic, and drafts only add to it


class Engine:
    """A model that serves many requests at once.

    A request's text depends on its prompt, parameters and seed alone, whatever shares its steps. (On GPUs and without a C++ compiler,
    where torch computes, the rounding of products may vary with the batch.)

    Args:
        model: a model, read in place at each step, so that a training loop may sample between its own steps (``weights_changed``); or a
            packed one (``engine.weights``).
        tokenizer: the model's.
        max_batch: most answers written at once; more wait.
        max_len: most tokens of a request, prompt and answer together; None: what the model was made for (``max_position_embeddings``), or
            what the cache holds if that is less.
        cache: bits of the latent cache; "auto": as the weights.
        cache_gb: its size in 1e9 bytes; None: for all requests at full length, at most half of the available memory.
        threads: that work on a step; None: as torch is set.
        backend: "native", "torch", or "auto": native where it can run.
        reuse: share cached prefixes between requests of equal ``cache_salt``.
        disk_cache: folder that takes what leaves the cache, and at ``close`` all that is in it, to be found again; engines may share it.
            None: what leaves is forgotten.
        disk_cache_gb: most that lies there, 1e9 bytes.
        weights_id: names the model's weights (``checkpoint.identity.weights_id`` of their folder), so that a later engine finds what lies
            there; a packed model knows its own. None: it serves this engine alone and is removed at ``close``.
        speculate: verify guesses from the text so far, while that pays.
        max_step_s: seconds that a step may take while answers are being written; prompts are cut to fit.

    Raises:
        ConfigError: an argument is out of range.
        CheckpointError: the tokenizer has ids that the model lacks.
    """

    def __init__(
        self,
        model: Transformer | StackWeights,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 8,
        max_len: int | None = None,
        cache: CacheKind = "auto",
        cache_gb: float | None = None,
        threads: int | None = None,
        backend: Backend = "auto",
        reuse: bool = True,
        disk_cache: Path | None = None,
        disk_cache_gb: float = 10.0,
        weights_id: str | None = None,
        speculate: bool = True,
        max_step_s: float = 0.25,
    ) -> None:
        config = model.config
        longest = config.max_position_embeddings
        given: dict[str, object] = {"max_batch": max_batch, "max_len": max_len, "threads": threads, "cache": cache, "cache_gb": cache_gb}
        given |= {"backend": backend, "disk_cache_gb": disk_cache_gb, "max_step_s": max_step_s}
        require_settings(given, frozenset(given))
        if max_len is not None and max_len > longest:
            raise ConfigError(f"max_len = {max_len} is not from 1 to max_position_embeddings = {longest}")
        if tokenizer.num_tokens > config.vocab_size:
            raise CheckpointError(f"the tokenizer has {tokenizer.num_tokens} ids, the model's vocabulary only {config.vocab_size}")
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        asked = longest if max_len is None else max_len
        self.cache = plan_cache(config, cache, max_batch=max_batch, max_len=asked, cache_gb=cache_gb, fp32=is_fp32(model))
        if max_len is not None and max_len > self.cache.num_tokens:
            raise ConfigError(
                f"max_len = {max_len} tokens do not fit into a cache of {self.cache.num_tokens}", hint="raise cache_gb or lower max_len"
            )
        self.max_len = min(asked, self.cache.num_tokens)
        self._stack: Stack = open_stack(model, self.cache, backend=backend, threads=threads, num_tokens=tokenizer.num_tokens)
        self._tier = open_tier(disk_cache, disk_cache_gb, model, self.cache, self._stack, weights_id=weights_id, reuse=reuse)
        pool = BlockPool(self.cache.num_blocks, reuse=reuse, tier=self._tier)
        self._scheduler = Scheduler(pool, max_sequences=max_batch, max_step_s=max_step_s)
        self._speculate = speculate
        self.on_compiled: Callable[[], object] = lambda: None  # called from another thread when a constraint is ready
        self._grammars = GrammarCompiler(tokenizer, on_settled=lambda: self.on_compiled())
        self._requests: dict[str, list[Answer]] = {}  # unfinished answers
        self._answers: dict[int, Answer] = {}  # by sequence
        self._compiling: deque[tuple[Request, Compilation, float | None]] = deque()  # with its deadline
        self._behind: deque[tuple[Answer, list[Answer]]] = deque()  # an answer that records its prompt, and those that wait for it
        self._numbers = count()
        self._nonce = secrets.token_hex(8)  # numbers begin anew in each engine, and a disk outlives them
        self._undelivered: list[Output] = []  # of other requests, made while one was streamed

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to return."""
        return bool(self._requests or self._undelivered)

    @property
    def idle_s(self) -> float:
        """Seconds that ``step`` would only wait: 0 with work at hand, else until a constraint is late; infinity without any."""
        if self._answers or self._undelivered:
            return 0.0
        now = time.monotonic()
        return min((_wait_s(job, deadline, now) for _, job, deadline in self._compiling), default=inf)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token takes in the latent cache over all layers."""
        return self.cache.bytes_per_token

    def close(self) -> None:
        """Give back threads and cache, to the disk if there is a place for it; the engine is of no use afterwards."""
        if self._tier is not None:
            self._tier.close(self._scheduler.pool.save)
        self._stack.close()

    def weights_changed(self) -> None:
        """Forget all cached latents: they belong to weights that are no more. Running requests go on with the new ones.

        To be called after weights were changed in place or given other memory, before the next step.
        """
        self._stack.weights_changed()
        self._scheduler.reset_cache()

    def add(self, request: Request) -> None:
        """Accept a request; it starts at a later step.

        Raises:
            RequestError: its id is taken, it cannot fit into ``max_len`` tokens, or it names an id outside the vocabulary.
        """
        self.check(request)
        constraint = request.params.constraint
        job = None if constraint is None else self._grammars.submit(constraint)
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        self._requests[request.request_id] = []
        if job is None:
            self._start(request, None, deadline)
        else:
            self._compiling.append((request, job, deadline))

    def has_room(self, request: Request) -> bool:
        """Tell whether a request may be added now; else too many constraints of others wait to be compiled."""
        return request.params.constraint is None or self._grammars.has_room(request.params.constraint)

    def check(self, request: Request) -> None:
        """Raise the RequestError that ``add`` would."""
        if request.request_id in self._requests:
            raise RequestError(f"request_id = {request.request_id!r} is already running", hint="give every running request its own id")
        require_fit(request, max_len=self.max_len, num_tokens=self.tokenizer.num_tokens)

    def _start(self, request: Request, grammar: Grammar | None, deadline: float | None) -> None:
        """Hand a request's answers to the scheduler."""
        params, seed = request.params, draw_seed(request.params)
        recorded = params.prompt_logprobs is not None
        # what is recorded of every token must be computed: a prefix of another request's would leave it out
        salt = f"recorded {self._nonce} {next(self._numbers)}" if request.record_experts else f"shared {request.cache_salt}"
        prompt = PromptRecord()
        for index in range(params.n):
            number = next(self._numbers)
            row = Row(
                number, list(request.tokens), len(request.tokens) + params.max_tokens, salt=salt, priority=request.priority,
                deadline=deadline, all_logits=recorded and not index,
            )  # fmt: skip
            speculate = self._speculate and params.max_tokens > 1
            answer = Answer(request, index, row, self.tokenizer, seed=seed, grammar=grammar, speculate=speculate, prompt=prompt)
            row.num_scored = answer.first_scored
            self._requests[request.request_id].append(answer)
            self._answers[number] = answer
        first, *others = self._requests[request.request_id]
        self._scheduler.add(first.seq)
        if recorded:
            self._behind.append((first, others))
        else:
            self._add_rows(others)

    def _add_rows(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            if answer.seq.seq_id in self._answers:  # not aborted
                self._scheduler.add(answer.seq)

    def _start_behind(self) -> None:
        """Start the other answers to prompts whose log-probabilities the first one has recorded, or will not."""
        for _ in range(len(self._behind)):
            first, others = self._behind.popleft()
            if first.seq.seq_id in self._answers and not first.num_new:
                self._behind.append((first, others))
            else:
                self._add_rows(others)

    def step(self) -> list[Output]:
        """Run one step; return what each answer gained.

        An answer occurs at most once unless outputs were left over from a ``stream``; ``finish_reason`` marks its last one.

        Raises:
            CheckpointError: the logits of a request are not finite. It is dropped; the others are as before the step.
        """
        outputs = self.leftovers()
        try:
            outputs += self._start_compiled(wait=not outputs)
            self._start_behind()
            plan = self._scheduler.schedule(time.monotonic())
            outputs += [self._finished(self._answers[row.seq_id], "deadline") for row in plan.expired]
            if plan.chunks:
                outputs += self._run(plan)
        except BaseException:
            self._undelivered = outputs
            raise
        return outputs

    def _start_compiled(self, *, wait: bool) -> list[Output]:
        """Start requests whose constraint is ready; wait for the first where that is allowed and there is nothing else to do."""
        failed: list[Output] = []
        if wait and self._compiling:
            self._compiling[0][1].wait(self.idle_s)
        for _ in range(len(self._compiling)):
            request, job, deadline = self._compiling.popleft()
            if deadline is not None and time.monotonic() >= deadline:
                failed += self._unstarted(request, "deadline")
            elif not job.ready:
                self._compiling.append((request, job, deadline))
            else:
                try:
                    self._start(request, job.result(), deadline)
                except (RequestError, MissingExtra) as error:
                    failed += self._unstarted(request, "error", str(error))
        return failed

    def _unstarted(self, request: Request, reason: FinishReason, error: str | None = None) -> list[Output]:
        """End a request whose constraint was being compiled."""
        name, length = request.request_id, len(request.tokens)
        del self._requests[name]
        self._compiling = deque(entry for entry in self._compiling if entry[0] is not request)
        return [Output(name, (), "", reason, None, length, index, error=error) for index in range(request.params.n)]

    def _run(self, plan: Plan) -> list[Output]:
        started = time.perf_counter()
        pieces: list[Piece] = []
        for chunk in plan.chunks:
            pieces += self._scored(chunk) if chunk.seq.all_logits else pieces_of(chunk, chunk.start)
        want_experts = any(self._answers[chunk.seq.seq_id].request.record_experts for chunk in plan.chunks)
        answered = self._stack.step(pieces, want_experts=want_experts)
        self._scheduler.observe(plan, time.perf_counter() - started)
        if answered.experts is not None:
            self._record_experts(plan, answered.experts)
        return self._settle(plan, answered)

    def _scored(self, chunk: Chunk) -> list[Piece]:
        """Run a chunk all of whose logits are wanted but for its last rows, and read off what they say of the prompt."""
        answer, start = self._answers[chunk.seq.seq_id], chunk.start
        first = answer.first_scored
        end, prompt_len = start + chunk.length, chunk.seq.prompt_len
        top = answer.request.params.prompt_logprobs
        known = min(end, prompt_len - 1)  # the row of position p tells of token p + 1
        assert top is not None
        while start < known:
            wanted = max(start, first)
            stop = min(known, wanted + _SCORED_ROWS)
            rows = self._stack.step(pieces_of(chunk, start, stop, wanted_from=wanted), want_experts=answer.request.record_experts)
            if rows.experts is not None:
                answer.record_experts(start, list(rows.experts.transpose(1, 0, 2)))
            try:
                read = read_logprobs(rows.logits, chunk.seq.tokens[wanted + 1 : stop + 1], top, num_tokens=self.tokenizer.num_tokens)
            except NotFinite as failure:
                raise self._dropped([answer], failure) from failure
            answer.prompt.logprobs[wanted - first :] = read  # what stood there was before a preemption
            start = stop
        return pieces_of(chunk, start) if start < end else pieces_of(chunk, end - 1)

    def _record_experts(self, plan: Plan, experts: np.ndarray) -> None:
        row = 0
        for chunk in plan.chunks:
            answer = self._answers[chunk.seq.seq_id]
            first = chunk.start if not chunk.seq.all_logits else self._first_left(chunk)
            length = chunk.start + chunk.length - first
            if answer.request.record_experts:
                answer.record_experts(first, list(experts[:, row : row + length].transpose(1, 0, 2)))
            row += length

    def _first_left(self, chunk: Chunk) -> int:
        """Return the first position of a scored chunk that runs in the common step."""
        end = chunk.start + chunk.length
        return min(max(chunk.start, min(end, chunk.seq.prompt_len - 1)), end - 1)

    def _settle(self, plan: Plan, answered: Answered) -> list[Output]:
        """Sample for every chunk that reached the end of its known tokens; move the scheduler on."""
        ends = [chunk for chunk in plan.chunks if chunk.start + chunk.length >= len(chunk.seq.tokens)]
        answers = [self._answers[chunk.seq.seq_id] for chunk in ends]
        drafts = [chunk.seq.draft for chunk in ends]
        try:
            drawn = sample(
                answered.logits,
                [answer.sampler for answer in answers],
                num_tokens=self.tokenizer.num_tokens,
                drafts=drafts if any(drafts) else None,
                best=(answered.best, answered.best_logit),
            )
        except NotFinite as failure:
            raise self._dropped([answers[row] for row in failure.rows], failure) from failure
        for chunk in plan.chunks:
            if chunk.start + chunk.length < len(chunk.seq.tokens):
                self._scheduler.advance(chunk.seq)
        outputs = []
        for answer, gained, draft in zip(answers, drawn, drafts, strict=True):
            output = answer.take(gained, len(draft))
            outputs.append(output)
            self._scheduler.advance(answer.seq, output.tokens)
            if output.finish_reason is not None:
                self._forget(answer)
                self._scheduler.finish(answer.seq)
        self._draft()
        return outputs

    def _draft(self) -> None:
        """Let answers guess their next tokens, while few are being written."""
        running = self._scheduler.num_running
        if not self._speculate or not 0 < running <= _DRAFTING_UP_TO:
            return
        costs = self._scheduler.costs
        per_step = [costs.base / running + costs.row * (1 + drafted) for drafted in range(MOST_DRAFTED + 1)]
        for answer in self._answers.values():
            if answer.num_new and len(answer.seq.tokens) - answer.seq.num_computed == 1:  # not while it is computed a second time
                answer.seq.draft = answer.draft(per_step)

    def _dropped(self, answers: Sequence[Answer], failure: NotFinite) -> Dropped:
        """Drop requests whose logits are not finite; return the error that says so."""
        names = list(dict.fromkeys(answer.request.request_id for answer in answers))
        for name in names:
            self.abort(name)
        return Dropped(names, failure)

    def _forget(self, answer: Answer) -> None:
        del self._answers[answer.seq.seq_id]
        unfinished = self._requests[answer.request.request_id]
        unfinished.remove(answer)
        if not unfinished:
            del self._requests[answer.request.request_id]

    def _finished(self, answer: Answer, reason: str) -> Output:
        """End an answer that the scheduler has let go of."""
        self._forget(answer)
        return answer.output((), answer.text.finish(), reason, ())  # type: ignore[arg-type]

    def abort(self, request_id: str) -> Output | None:
        """End a request now; return the last output of its first unfinished answer, or None if it has finished or never was."""
        return next(iter(self.abort_answers(request_id)), None)

    def abort_answers(self, request_id: str) -> list[Output]:
        """End a request now; return the last output of each of its unfinished answers."""
        self._undelivered = [output for output in self._undelivered if output.request_id != request_id]
        answers = list(self._requests.get(request_id, ()))
        if request_id in self._requests and not answers:  # its constraint is being compiled
            (request,) = (request for request, _, _ in self._compiling if request.request_id == request_id)
            return self._unstarted(request, "abort")
        for answer in answers:
            self._scheduler.cancel(answer.seq.seq_id)
        return [self._finished(answer, "abort") for answer in answers]

    def stream(self, request: Request) -> Generator[Output, None, None]:
        """Add a request and yield its outputs as they come; closing the iterator aborts it.

        Other requests advance meanwhile; what they gain is kept for the next ``step``, ``stream`` or ``generate``.

        Raises:
            RequestError: as ``add``, when the first output is asked for.
        """
        return run(self, [request])

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Run requests to their ends; return one whole output for each answer, in the order given.

        Raises:
            RequestError: as ``add``; then none of them has run.
        """
        return collect(self, requests)

    def leftovers(self) -> list[Output]:
        """Return the outputs that no call has returned yet, such as those of a step that raised."""
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def holds(self, request_id: str) -> bool:
        """Tell whether a request has not finished yet."""
        return request_id in self._requests

    def step_for(self, request_ids: Collection[str]) -> list[Output]:
        """Step; return the outputs of these requests and keep the others."""
        outputs = self.step()
        self._undelivered = [output for output in outputs if output.request_id not in request_ids]
        return [output for output in outputs if output.request_id in request_ids]


def _wait_s(job: Compilation, deadline: float | None, now: float) -> float:
    """Return the seconds until a compilation has to be looked at if it does not end before."""
    return 0.0 if job.ready else min(job.left_s, inf if deadline is None else max(0.0, deadline - now))
