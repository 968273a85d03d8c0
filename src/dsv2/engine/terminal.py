"""The engine at a terminal: the stages of ``dsv2 generate`` and ``dsv2 chat``. Text goes to stdout, everything about it to stderr."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Unpack

from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.engine.batch import generate_files
from dsv2.engine.engine import Engine
from dsv2.engine.opening import Dtype, EngineSettings, open_weights, sampling_of
from dsv2.engine.request import Output, Request, SamplingParams
from dsv2.errors import ConfigError, DataError, Dsv2Error, RequestError
from dsv2.progress import say
from dsv2.tokenizer.chat import Template, content_of, render, stop_ids
from dsv2.tokenizer.recognise import is_ours
from dsv2.tokenizer.tokenizer import Tokenizer

HELP = """\
/help   this list
/reset  forget the conversation
/exit   leave (Ctrl-D does, too)
Ctrl-C  stop the answer"""


def generate(
    path: str | Path,
    *,
    prompt: str | None = None,
    files: Sequence[str | Path] = (),
    out: Path | None = None,
    max_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    dtype: Dtype = "auto",
    verify: bool = False,
    as_json: bool = False,
    **settings: Unpack[EngineSettings],
) -> None:
    """Continue a text on stdout as it is drawn, with speeds on stderr at the end; or answer files of prompts.

    Args:
        path: a checkpoint folder, a run (its latest checkpoint) or a tour (that of its pre-training).
        prompt: the text; "-" reads it from stdin, without its last newline.
        files: of prompts instead; see ``batch.generate_files``.
        out: where their answers go.
        max_tokens: at most so many new tokens; fewer, with a message, where the model's context ends before.
        temperature: see ``SamplingParams``, also for ``top_k``, ``top_p`` and ``seed``; None: as generation_config.json says.
        dtype: of the weights in memory; "auto": the first of fp32, bf16, int8 that fits.
        verify: compare the hashes of the model's files with its manifest's, a packed one's while it is read.
        as_json: print one JSON object at the end instead of the text as it comes.
        settings: of the engine; ``max_batch`` goes with files.

    Raises:
        CheckpointError: no checkpoint is there, or it is damaged or cannot be verified.
        ConfigError: there is neither a prompt nor files, or what goes with the one is given to the other.
        DataError: a line of a file cannot be used.
        RequestError: a parameter is out of range, or the prompt fills the context.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    if files:
        if out is None or prompt is not None or as_json:
            hint = "dsv2 generate PATH FILE... --out ANSWERS.jsonl"
            raise ConfigError("files of prompts need --out, and neither --prompt nor --json goes with them", hint=hint)
        generate_files(path, files, out, sampling=sampling, dtype=dtype, verify=verify, **settings)
        return
    if prompt is None:
        raise ConfigError("there is neither --prompt nor a file of prompts", hint="dsv2 generate PATH --prompt TEXT")
    if out is not None or "max_batch" in settings:
        raise ConfigError("--out and --max-batch go with files of prompts; there are none", hint="dsv2 generate --help")
    folder = latest_checkpoint(path)
    params = sampling_of(folder, sampling)
    engine = open_engine(folder, dtype, verify=verify, **settings)
    tokens = engine.tokenizer.encode(_read_stdin() if prompt == "-" else prompt)
    room = engine.max_len - len(tokens)
    if room < 1:
        raise RequestError(
            f"the prompt takes {len(tokens)} tokens; the context holds {engine.max_len}, one of them new", hint="shorten the prompt"
        )
    if room < max_tokens:
        say(f"the context of {engine.max_len} tokens leaves room for {room} new ones, not {max_tokens}")
    request = Request("generate", tuple(tokens), replace(params, max_tokens=min(max_tokens, room)))
    answer = write_answer(engine, request, (lambda text: None) if as_json else _write)
    if as_json:
        _write(json.dumps(answer.as_dict() | {"cache_bytes_per_token": engine.cache_bytes_per_token}, ensure_ascii=False))
    _write("\n")
    say(answer.speeds())


def chat(
    path: str | Path,
    *,
    system: str | None = None,
    template: Template | None = None,
    max_tokens: int = 512,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    dtype: Dtype = "auto",
    verify: bool = False,
    **settings: Unpack[EngineSettings],
) -> None:
    """Talk with a model, line by line; from a pipe each line of stdin is a user's turn and stdout holds the answers alone.

    When the conversation outgrows the context, its oldest turns are left out, and a message says so. Ctrl-C stops an answer; what was
    said of it stays in the conversation.

    Args:
        path: as for ``generate``.
        system: text in front of the conversation; it is never left out.
        template: prompt format; None: the one the tokenizer was saved with.
        max_tokens: most tokens of an answer.
        temperature: as for ``generate``, also ``top_k`` and ``top_p``.
        seed: of the first answer; each later one adds 1.
        dtype: as for ``generate``, also ``verify`` and ``settings``.

    Raises:
        CheckpointError: as for ``generate``.
        ConfigError: the tokenizer has no such template.
        RequestError: a parameter is out of range.
    """
    folder = latest_checkpoint(path)
    params = sampling_of(folder, {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens, "seed": seed})
    engine = open_engine(folder, dtype, verify=verify, **settings)
    conversation = Conversation(engine, params, system=system, template=template)
    own = engine.tokenizer.published_template
    if template is None and own is not None and not is_ours(own):
        say(f"the folder's chat template is not one of ours word for word; it is read as {engine.tokenizer.template}, --template chooses")
    if sys.stdin.isatty():
        say("/help lists what you can type")
    for line in _lines():
        command = line.strip()
        if command == "/exit":
            break
        if command == "/reset":
            conversation.reset()
            say("the conversation is forgotten")
        elif command.startswith("/") and command[1:].isalpha():
            say(HELP if command == "/help" else f"unknown command {command}\n{HELP}")
        elif command:
            try:
                conversation.ask(line)
            except Dsv2Error as error:
                say(f"error: {error}")


def open_engine(folder: Path, dtype: Dtype = "auto", *, verify: bool = False, **settings: Unpack[EngineSettings]) -> Engine:
    """Load a checkpoint's model and tokenizer for one request at a time, and say what its cache takes."""
    settings.setdefault("max_batch", 1)
    engine = Engine(open_weights(folder, dtype, verify=verify), Tokenizer.load(folder), **settings)
    say(f"cache: {engine.cache}")
    return engine


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A whole answer and how long it took: up to its first token, and from there to its end, in seconds."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float

    def as_dict(self) -> dict[str, object]:
        """Return the fields of ``dsv2 generate --json``."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_s": round(self.prompt_tokens / self.prefill_s, 1),
            "decode_tokens_per_s": round((len(self.tokens) - 1) / self.decode_s, 1) if len(self.tokens) > 1 else None,
        }

    def speeds(self) -> str:
        """Describe both halves in words; the first new token counts to the prefill, which computes it."""
        said = f"prompt {self.prompt_tokens} tokens, {self.prompt_tokens / self.prefill_s:.1f} tokens/s"
        if len(self.tokens) > 1:
            said += f"; answer {len(self.tokens)} tokens, {(len(self.tokens) - 1) / self.decode_s:.1f} tokens/s"
        return f"{said}; ended by {self.finish_reason}"


def write_answer(engine: Engine, request: Request, write: Callable[[str], None], stop: threading.Event | None = None) -> WholeAnswer:
    """Run one request, handing its text to ``write`` as it becomes certain; once ``stop`` is set it is aborted."""
    outputs: list[Output] = []
    started = first = time.perf_counter()
    for output in engine.stream(request):
        if not outputs:
            first = time.perf_counter()
        outputs.append(output)
        write(output.text)
        if stop is not None and stop.is_set() and (last := engine.abort(request.request_id)) is not None:
            outputs.append(last)
            write(last.text)
    return WholeAnswer(
        "".join(output.text for output in outputs),
        tuple(token for output in outputs for token in output.tokens),
        outputs[-1].finish_reason or "abort",
        len(request.tokens),
        first - started,
        time.perf_counter() - first,
    )


class Conversation:
    """The turns so far, and as many of the latest as fit into the context."""

    def __init__(self, engine: Engine, params: SamplingParams, *, system: str | None, template: Template | None) -> None:
        self.engine = engine
        self.params = replace(params, stop_token_ids=stop_ids(engine.tokenizer))
        self.template = template or engine.tokenizer.template
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict[str, str]] = []
        self.num_asked = 0
        self.prompt([{"role": "user", "content": ""}])  # a template that does not fit is refused before the first question

    def reset(self) -> None:
        """Forget the turns, not the system text."""
        self.turns = []

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        """Return the ids that ask the model to answer the last of these turns."""
        return render(self.engine.tokenizer, self.system + turns, template=self.template, add_generation_prompt=True).tokens

    def ask(self, text: str) -> WholeAnswer:
        """Write the model's answer to stdout and keep both in the conversation.

        Raises:
            RequestError: the message alone does not fit into the context; it is not kept.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        turns, tokens = self._fitted(turns)
        seed = self.params.seed
        params = replace(
            self.params,
            max_tokens=min(self.params.max_tokens, self.engine.max_len - len(tokens)),
            seed=None if seed is None else seed + self.num_asked,
        )
        self.num_asked += 1
        with interruptible() as stop:
            answer = write_answer(self.engine, Request(f"turn-{self.num_asked}", tuple(tokens), params), _write, stop)
        _write("\n")
        if answer.finish_reason != "stop":
            say("(stopped)" if answer.finish_reason == "abort" else f"(cut after {params.max_tokens} tokens)")
        self.turns = [*turns, {"role": "assistant", "content": content_of(self.template, answer.text)}]
        return answer

    def _fitted(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """Leave out the oldest questions with their answers until an answer of reasonable length fits."""
        context = self.engine.max_len
        reserved = min(self.params.max_tokens, max(1, context // 4))
        kept, tokens = turns, self.prompt(turns)
        while len(tokens) + reserved > context and len(kept) > 1:
            kept = kept[2:]
            tokens = self.prompt(kept)
        if len(tokens) >= context:
            raise RequestError(f"the message takes {len(tokens)} tokens; the context holds {context}", hint="send a shorter one")
        if len(kept) < len(turns):
            say(f"(the context of {context} tokens is full: the oldest {len(turns) - len(kept)} turns are left out from now on)")
        return kept, tokens


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C set a flag instead of raising in the middle of a step; a second one raises.

    Outside the main thread, where signals do not arrive, the flag stays unset.
    """
    flag = threading.Event()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def _lines() -> Iterator[str]:
    """Yield the user's lines until the end of stdin, asking for each when a person types them."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
    while True:
        try:
            line = input("> ") if typed else _decoded(sys.stdin.buffer.readline())
        except KeyboardInterrupt:
            if not typed:
                raise
            say("\n/exit or Ctrl-D leaves")
            continue
        except EOFError:
            say("")
            return
        if not typed and not line:
            return
        yield line.removesuffix("\n")


def _read_stdin() -> str:
    return _decoded(sys.stdin.buffer.read()).removesuffix("\n")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
