"""A model and its engine behind four calls: generate, chat, stream, score. For one thread; ``async_llm.py`` is for many callers."""

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

from dsv2.checkpoint.generation import sampling_defaults
from dsv2.checkpoint.identity import weights_id
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.engine.engine import Engine
from dsv2.engine.gather import collect
from dsv2.engine.native import StackWeights
from dsv2.engine.opening import Dtype, EngineSettings, open_weights
from dsv2.engine.prompts import Messages, Params, Prompt, RequestBuilder, RequestOptions, Score, score_of
from dsv2.engine.request import Output, SamplingParams
from dsv2.engine.settings import require_settings
from dsv2.errors import ConfigError, RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.chat import Template, content_of
from dsv2.tokenizer.tokenizer import Tokenizer


class LLM:
    """A language model that answers.

    Prompts are text (the beginning-of-sentence token goes in front) or token ids as they are; a call takes one or a list, and all that
    belongs to one call runs as one batch. Without ``SamplingParams`` a call samples as ``default_params`` says, the folder's
    generation_config.json, and ends where the context does; with them, everything is as they say.

    Keyword arguments of the calls, for all their requests: ``priority``, ``deadline_s`` (counted from when a request's turn comes),
    ``cache_salt``, ``record_experts``; see ``Request``.

    Args:
        model: a model folder, a packed one, a run or tour (its latest checkpoint), or a model id on the hub. Or a model in memory, which is
            read where it lies: after its weights were changed, call ``weights_changed``.
        tokenizer: of a model in memory; None: the folder's.
        dtype: of a folder's weights in memory: "fp32", "bf16", "int8"; "auto": the first of these that fits, a packed folder as it is.
        verify: of a folder: compare the hashes of its files with its manifest's, a packed one's while it is read.
        settings: of ``Engine``: max_batch, max_len, cache, cache_gb, threads, backend, reuse, speculate, max_step_s,
            disk_cache, disk_cache_gb, weights_id (of a folder: its own).

    Raises:
        CheckpointError: there is no whole model, or it does not fit into memory.
        ConfigError: an argument is out of range, or a model in memory comes without tokenizer, with a dtype or to be verified.

    Attributes:
        engine: that does the work.
        tokenizer: the model's.
        default_params: how a call without parameters samples; to change one value of them: ``dataclasses.replace``.
        builder: makes requests of prompts.
    """

    def __init__(
        self,
        model: str | Path | Transformer | StackWeights,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: Dtype = "auto",
        verify: bool = False,
        **settings: Unpack[EngineSettings],
    ) -> None:
        require_settings(settings, EngineSettings.__optional_keys__)
        self.default_params = SamplingParams()
        if isinstance(model, str | Path):
            folder = latest_checkpoint(model)
            tokenizer = tokenizer or Tokenizer.load(folder)
            self.default_params = SamplingParams(**sampling_defaults(folder))
            model = open_weights(folder, dtype, verify=verify)
            settings.setdefault("weights_id", weights_id(folder))
        elif verify:
            raise ConfigError("verify = True beside a model in memory, which has no files", hint="leave verify out")
        elif dtype != "auto":
            raise ConfigError(f"dtype = {dtype!r} beside a model in memory, whose weights stay as they are", hint="leave dtype out")
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer", hint="LLM(model, tokenizer=Tokenizer.load(folder))")
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, **settings)
        self.builder = RequestBuilder(self.engine, self.default_params)
        self._in_use, self._closed = threading.RLock(), False

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give back threads and cache; nothing can be asked afterwards."""
        if not self._closed:
            with self._alone():
                self._closed = True
                self.engine.close()

    def weights_changed(self) -> None:
        """Say that the weights of a model in memory are others now, so that what the cache holds of the old ones is not used again.

        Nothing is copied: a step reads the model's own memory. To be called after each optimiser step that is followed by a request.
        """
        with self._alone():
            self.engine.weights_changed()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: Params | None = None,
        *,
        progress: bool = False,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """Continue prompts.

        Args:
            prompts: text or token ids, or a list of them.
            params: for all, or one for each.
            progress: show a bar on stderr.
            options: fields of ``Request``.

        Returns:
            whole answers in the order of the prompts, ``params.n`` for each. One whose constraint cannot be met has the finish reason
            "error".

        Raises:
            RequestError: a prompt or parameter cannot be served; then nothing has run. Or this object is in use by another thread.
            CheckpointError: the model's logits are not finite.
        """
        with self._alone():
            return collect(self.engine, self.builder.prompts(prompts, params, **options), progress=progress)

    def chat(
        self,
        conversations: Messages | Iterable[Messages],
        params: Params | None = None,
        *,
        template: Template | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """Write the assistant's next turn.

        Args:
            conversations: messages with ``role`` and ``content`` as ``tokenizer.chat.render`` takes them, or a list of such lists.
            params: for all, or one for each.
            template: "v2" or "v2.5"; None: the tokenizer's.
            tools: function schemas in OpenAI's form, for all.
            progress: show a bar on stderr.
            options: fields of ``Request``.

        Returns:
            as ``generate``; ``text`` is the content of the turn.

        Raises:
            DataError: a message is malformed.
            ConfigError: the tokenizer has no such template.
            RequestError: as ``generate``.
        """
        with self._alone():
            requests = self.builder.conversations(conversations, params, template, tools, **options)
            outputs = collect(self.engine, requests, progress=progress)
        return [replace(output, text=content_of(template or self.tokenizer.template, output.text)) for output in outputs]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> Generator[Output, None, None]:
        """Continue one prompt and yield what each step adds; closing the iterator ends the request and frees its cache.

        For a chat, give the ids of ``tokenizer.chat.render(..., add_generation_prompt=True)``.

        Raises:
            RequestError: as ``generate``, at once; or there is not exactly one prompt.
        """
        requests = self.builder.prompts(prompt, params, **options)
        if len(requests) != 1:
            raise RequestError(f"stream takes one prompt; here are {len(requests)}", hint="use generate, or one stream for each")
        return self._streamed(self.engine.stream(requests[0]))

    def _streamed(self, outputs: Generator[Output, None, None]) -> Generator[Output, None, None]:
        try:
            while True:
                with self._alone():  # not while the caller has the output: it may ask for other things then
                    output = next(outputs, None)
                if output is None:
                    return
                yield output
        finally:
            with self._in_use:
                outputs.close()

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        completions: Prompt | Iterable[Prompt] | None = None,
        *,
        cache_salt: str = "",
        progress: bool = False,
    ) -> list[Score]:
        """Return the log-probabilities of given tokens: of each completion behind its prompt, or of each prompt after its first token.

        A completion's text is encoded by itself. What prompts have in common is computed once. The context holds one token less than for
        ``generate``.

        Args:
            prompts: text or token ids, or a list of them.
            completions: as many; None: the prompts themselves.
            cache_salt: prefixes are shared only with requests of the same one.
            progress: show a bar on stderr.

        Raises:
            RequestError: there is nothing to score or nothing before it, or as ``generate``.
            CheckpointError: the model's logits are not finite.
        """
        with self._alone():
            requests = self.builder.scored(prompts, completions, cache_salt)
            return [score_of(output) for output in collect(self.engine, requests, progress=progress)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise RequestError("this LLM is in use by another thread", hint="use dsv2.AsyncLLM, which many threads may share")
        try:
            if self._closed:
                raise RequestError("this LLM is closed", hint="open the model again")
            yield
        finally:
            self._in_use.release()
