"""An LLM for many callers at once: coroutines of any event loop and thread share its batches.

A class beside ``LLM`` rather than methods of it: here a thread owns the engine and the calls only talk to it, there the caller's own thread
does the work, which is simpler to debug and leaves a training loop in charge of when a step may run.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

from dsv2.engine.engine import Engine
from dsv2.engine.gather import Gathered
from dsv2.engine.llm import LLM
from dsv2.engine.native import StackWeights
from dsv2.engine.opening import Dtype, EngineSettings
from dsv2.engine.prompts import Messages, Params, Prompt, RequestOptions, Score, score_of
from dsv2.engine.request import Output, Request, SamplingParams
from dsv2.engine.thread import EngineThread
from dsv2.errors import RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.chat import Template, content_of
from dsv2.tokenizer.tokenizer import Tokenizer


class AsyncLLM:
    """``LLM`` for asyncio; calls take and return what those of ``LLM`` do.

    A call that is cancelled, or a stream that is closed, ends its requests and frees their cache before the next step. A request that fails
    raises in its own call alone. The constructor loads the model and blocks meanwhile. Outputs that nobody reads wait in memory, at most
    those of the requests under way.

    Args:
        model: as for ``LLM``.
        max_requests: under way at a time, waiting ones included; more raise ``engine.thread.Overloaded``.
        tokenizer: as for ``LLM``.
        dtype: as for ``LLM``, also ``verify``.
        settings: of ``Engine``.

    Raises:
        ConfigError: as ``LLM``.
        CheckpointError: as ``LLM``.

    Attributes:
        tokenizer: the model's.
        default_params: how a call without parameters samples.
    """

    def __init__(
        self,
        model: str | Path | Transformer | StackWeights,
        *,
        max_requests: int = 1024,
        tokenizer: Tokenizer | None = None,
        dtype: Dtype = "auto",
        verify: bool = False,
        **settings: Unpack[EngineSettings],
    ) -> None:
        llm = LLM(model, tokenizer=tokenizer, dtype=dtype, verify=verify, **settings)
        self.tokenizer, self.default_params = llm.tokenizer, llm.default_params
        self._builder = llm.builder
        self._thread = EngineThread(llm.engine, max_requests=max_requests)
        # also at the interpreter's end, whose tear-down a step must not run into
        self._closing = weakref.finalize(self, self._thread.close, drain=False)

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        """Close it: let requests finish, or abort them when the block raised."""
        await self.close(drain=kind is None)

    async def close(self, *, drain: bool = True) -> None:
        """Accept nothing more and wait until every accepted request has ended.

        Args:
            drain: let them run to their ends; else they end now, with the finish reason "abort".
        """
        await asyncio.to_thread(self._thread.close, drain=drain)

    async def weights_changed(self, change: Callable[[], object] | None = None) -> None:
        """Say that a model in memory has other weights now; requests under way go on with them.

        Args:
            change: called on the engine's thread between two steps to make the change; None: it was made while nothing was under way.
        """

        def between_steps(engine: Engine) -> None:
            try:
                if change is not None:
                    change()
            finally:  # a change that failed half-way has changed some
                engine.weights_changed()

        await asyncio.wrap_future(self._thread.call(between_steps))

    async def generate(
        self, prompts: Prompt | Iterable[Prompt], params: Params | None = None, **options: Unpack[RequestOptions]
    ) -> list[Output]:
        """Continue prompts; see ``LLM.generate``.

        Raises:
            RequestError: a prompt or parameter cannot be served, there are too many requests, or this is closed; then none has run.
            CheckpointError: the model's logits are not finite.
        """
        return await self._collect(self._builder.prompts(prompts, params, **options))

    async def chat(
        self,
        conversations: Messages | Iterable[Messages],
        params: Params | None = None,
        *,
        template: Template | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """Write the assistant's next turn; see ``LLM.chat``."""
        outputs = await self._collect(self._builder.conversations(conversations, params, template, tools, **options))
        return [replace(output, text=content_of(template or self.tokenizer.template, output.text)) for output in outputs]

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Output, None]:
        """Continue one prompt and yield what each step adds; see ``LLM.stream``. The request is made when the first output is asked for.

        A loop that is left early ends the request when the generator is closed: at once with ``contextlib.aclosing``.
        """
        requests = self._builder.prompts(prompt, params, **options)
        if len(requests) != 1:
            raise RequestError(f"stream takes one prompt; here are {len(requests)}", hint="use generate, or one stream for each")
        async with aclosing(self._outputs(requests)) as outputs:
            async for output in outputs:
                yield output

    async def score(
        self, prompts: Prompt | Iterable[Prompt], completions: Prompt | Iterable[Prompt] | None = None, *, cache_salt: str = ""
    ) -> list[Score]:
        """Return the log-probabilities of given tokens; see ``LLM.score``."""
        return [score_of(output) for output in await self._collect(self._builder.scored(prompts, completions, cache_salt))]

    async def _collect(self, requests: Sequence[Request]) -> list[Output]:
        gathered, found = Gathered(requests), dict[str, list[Output]]()
        async with aclosing(self._outputs(requests)) as outputs:
            async for output in outputs:
                if (answers := gathered.add(output)) is not None:
                    found[output.request_id] = answers
        return [answer for request in requests for answer in found[request.request_id]]

    async def _outputs(self, requests: Sequence[Request]) -> AsyncGenerator[Output, None]:
        """Submit requests and yield their outputs; what has not finished when this is closed is aborted."""
        mailbox = _Mailbox()
        self._thread.submit(requests, mailbox.put)
        unfinished = {request.request_id: request.params.n for request in requests}
        try:
            while unfinished:
                output = await mailbox.get()
                if output.finish_reason is not None:
                    unfinished[output.request_id] -= 1
                    if not unfinished[output.request_id]:
                        del unfinished[output.request_id]
                yield output
        finally:
            if unfinished:
                self._thread.abort(unfinished)


class _Mailbox:
    """Items from the engine's thread for a coroutine of the event loop that is running now."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Output | Exception] = asyncio.Queue()

    def put(self, item: Output | Exception) -> None:
        """Send an item from any thread; raises RuntimeError where the loop is closed."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def get(self) -> Output:
        """Wait for the next item; an exception is raised."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item
