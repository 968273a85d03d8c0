"""Answers of a given form: a constraint compiled to an automaton that says which tokens may come next. The automata are llguidance's.

Compiling runs off the engine's thread under caps of size, depth, work, memory and time, tried first in a process that may die
(``engine/grammar_probe.py``); what fails or takes too long is a ``RequestError`` of that request alone. A matcher steps with its answer,
on the engine's thread.
"""

import json
import math
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv2.engine import grammar_probe
from dsv2.engine.request import Constraint
from dsv2.errors import MissingExtra, RequestError
from dsv2.tokenizer.tokenizer import Tokenizer

MAX_DEPTH = 64  # of arrays and objects in a schema
MAX_CACHED = 64  # compiled constraints
MAX_CACHED_BYTES = 2**28  # that they take, all together
MAX_GRAMMAR_BYTES = 2**26  # that one takes; an ordinary schema 1 to 20 MB, "a multiple of 999,983" 110 MB
MAX_COMPILING = 2  # at a time
MAX_QUEUED = 64
TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 2**30  # address space of the process that tries; an ordinary schema takes some 10 MB, the interpreter 0.2 GB

# llguidance's own limits (its defaults: 1,000,000; 200,000; 50,000; 250,000; 500,000). A lexer state takes 1 to 2 kB.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Between the parts of JSON: unbounded, a small model can go on with blanks for ever.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \t\r\n]{0,32}"}

# Keywords of JSON Schema that hold one schema, a list of schemas or a mapping to schemas, and the others that llguidance implements,
# refuses by itself, or may ignore because they say nothing about a value. It ignores all that it does not know, so we refuse the rest.
_ONE = {"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"} | {
    "unevaluatedItems",
    "unevaluatedProperties",
}
_LIST = {"allOf", "anyOf", "items", "oneOf", "prefixItems"}
_MAPPING = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
_VALUES = frozenset(
    {"type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength", "minLength"}
    | {"pattern", "format", "maxItems", "minItems", "uniqueItems", "maxContains", "minContains", "maxProperties", "minProperties"}
    | {"required", "dependentRequired", "dependencies", "$ref", "$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor"}
    | {"$anchor", "$id", "$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
)
_KEYWORDS = _ONE | _LIST | _MAPPING | _VALUES


class Matcher:
    """Where one answer stands in its grammar; make it with ``Grammar.matcher``."""

    __slots__ = ("_allowed", "_ended", "_eos_id", "_inner", "_ordinary")

    def __init__(self, inner: Any, ordinary: NDArray[np.bool_], eos_id: int) -> None:
        self._inner = inner
        self._ordinary = ordinary
        self._eos_id = eos_id
        self._allowed: NDArray[np.bool_] | None = None
        self._ended = False

    def allowed(self) -> NDArray[np.bool_]:
        """Return which ids may come next, [num_tokens]: never a marker, the end of sentence exactly where the answer may end.

        Raises:
            RequestError: the grammar is too complex to go on, or nothing may come next.
        """
        if self._allowed is None:
            bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
            if self._inner.is_error() and not self._inner.stop_reason().startswith("NoExtension"):
                raise RequestError("constraint: the grammar is too complex to go on", hint="write a simpler constraint")
            allowed = np.unpackbits(bits, count=self._ordinary.size, bitorder="little").view(np.bool_) & self._ordinary
            allowed[self._eos_id] = self._inner.is_accepting()
            if self._ended or self._inner.is_error() or not allowed.any():
                raise RequestError("constraint: the grammar allows no further token")
            self._allowed = allowed
        return self._allowed

    def accept(self, token: int) -> None:
        """Step over a token.

        Raises:
            RequestError: it is not allowed here.
        """
        if not 0 <= token < self._ordinary.size or not self.allowed()[token]:
            raise RequestError(f"constraint: token {token} is not allowed here")
        if token == self._eos_id:
            self._ended = True
        elif not self._inner.consume_token(token):
            raise RequestError("constraint: the grammar is too complex to go on", hint="write a simpler constraint")
        self._allowed = None


class Grammar:
    """A compiled constraint, shared by all answers that ask for it; ``num_bytes`` is about what it takes."""

    def __init__(self, prototype: Any, ordinary: NDArray[np.bool_], eos_id: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._prototype = prototype
        self._ordinary = ordinary
        self._eos_id = eos_id

    def matcher(self) -> Matcher:
        """Return a matcher at the grammar's beginning."""
        return Matcher(self._prototype.deep_copy(), self._ordinary, self._eos_id)


class Compilation:
    """A constraint on its way to a ``Grammar``; make it with ``GrammarCompiler.submit``."""

    def __init__(self, limit_s: float) -> None:
        self._deadline: float | None = None  # its time runs from when compiling begins
        self._limit_s = limit_s
        self._finished = threading.Event()
        self._outcome: Grammar | Exception | None = None

    def begin(self) -> None:
        """Let its time run, from the thread that compiles."""
        self._deadline = time.monotonic() + self._limit_s

    def settle(self, outcome: Grammar | Exception) -> None:
        """Set the result, from the thread that made it."""
        self._outcome = outcome
        self._finished.set()

    @property
    def left_s(self) -> float:
        """Seconds until its time is over; all that it gets while others are before it."""
        return self._limit_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def ready(self) -> bool:
        """Whether ``result`` returns or raises at once."""
        return self._finished.is_set() or self.left_s == 0

    def wait(self, seconds: float) -> None:
        """Wait until it is ready, at most so long."""
        end = time.monotonic() + seconds
        while not self.ready and (left := end - time.monotonic()) > 0:
            self._finished.wait(min(left, self.left_s))

    def result(self) -> Grammar:
        """Wait for the grammar.

        Raises:
            RequestError: the constraint is wrong, too large or too complex, or its time is over.
            MissingExtra: llguidance is not installed.
        """
        self.wait(math.inf)
        if not self._finished.is_set():
            raise RequestError(f"constraint: not compiled within {self._limit_s:g} s", hint="write a simpler constraint")
        outcome = self._outcome
        if isinstance(outcome, Grammar):
            return outcome
        if isinstance(outcome, RequestError | MissingExtra):
            raise outcome
        raise RequestError(f"constraint: {type(outcome).__name__}: {outcome}") from outcome


class GrammarCompiler:
    """Compile constraints for one tokenizer, off the caller's thread, and keep the latest ones.

    Args:
        tokenizer: the model's.
        time_limit_s: seconds that one may be compiled until it counts as failed.
        on_settled: called after each, from the thread that compiled.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, time_limit_s: float = TIME_LIMIT_S, on_settled: Callable[[], object] = lambda: None
    ) -> None:
        self._tokenizer = tokenizer
        self._on_settled = on_settled
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: Any = None
        self._cache: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._queue: deque[tuple[Constraint, Compilation]] = deque()
        self._under_way: dict[Constraint, Compilation] = {}
        self._threads = 0

    def prepare(self) -> None:
        """Read the vocabulary into llguidance, once; else the first compilation does it, within its time.

        Raises:
            MissingExtra: llguidance is not installed.
        """
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = _read_vocabulary(self._tokenizer)

    def submit(self, constraint: Constraint) -> Compilation:
        """Begin to compile, or find what was compiled before or is under way.

        Raises:
            RequestError: too many wait.
        """
        with self._lock:
            if constraint in self._under_way:  # also one whose time is over: a second try would only take another thread
                return self._under_way[constraint]
            job = Compilation(self._time_limit_s)
            if constraint in self._cache:
                self._cache.move_to_end(constraint)
                job.settle(self._cache[constraint])
                return job
            if len(self._queue) >= MAX_QUEUED:
                raise RequestError(f"constraint: {MAX_QUEUED} others wait to be compiled", hint="try again later")
            self._under_way[constraint] = job
            self._queue.append((constraint, job))
            if self._threads < MAX_COMPILING:
                self._threads += 1
                threading.Thread(target=self._work, name="grammar-compiler", daemon=True).start()
            return job

    def has_room(self, constraint: Constraint) -> bool:
        """Tell whether ``submit`` would take this one."""
        with self._lock:
            return constraint in self._under_way or constraint in self._cache or len(self._queue) < MAX_QUEUED

    def compile(self, constraint: Constraint) -> Grammar:
        """Compile and wait; raises as ``Compilation.result``."""
        return self.submit(constraint).result()

    def _work(self) -> None:
        """Compile what waits until nothing does."""
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                constraint, job = self._queue.popleft()
            job.begin()
            outcome: Grammar | Exception
            try:
                self.prepare()
                outcome = self._build(constraint, job.left_s)
            except Exception as error:  # of any kind: it belongs to the request, and this thread serves others
                outcome = error
            with self._lock:
                if self._under_way.get(constraint) is job:
                    del self._under_way[constraint]
                if isinstance(outcome, Grammar):
                    self._keep(constraint, outcome)
            job.settle(outcome)
            self._on_settled()

    def _keep(self, constraint: Constraint, grammar: Grammar) -> None:
        self._cache[constraint] = grammar
        while len(self._cache) > MAX_CACHED or sum(kept.num_bytes for kept in self._cache.values()) > MAX_CACHED_BYTES:
            self._cache.popitem(last=False)

    def _build(self, constraint: Constraint, limit_s: float) -> Grammar:
        """Compile; raises RequestError."""
        from llguidance import LLMatcher, LLParserLimits

        source = _definition(constraint)
        complaint, num_bytes = _probe(source, limit_s)
        if not complaint and num_bytes > MAX_GRAMMAR_BYTES:
            complaint = f"compiled it takes {num_bytes / 2**20:.0f} MiB; at most {MAX_GRAMMAR_BYTES // 2**20} are allowed"
        if complaint:
            raise RequestError(f"constraint: the {constraint.kind} cannot be used: {complaint}")
        inner = LLMatcher(self._vocabulary, source, log_level=0, limits=LLParserLimits(**_LIMITS))
        if inner.is_error():
            raise RequestError(f"constraint: the {constraint.kind} cannot be used: {_first_words(inner.get_error())}")
        size = self._tokenizer.num_tokens
        ordinary = np.ones(size, np.bool_)
        ordinary[list(self._tokenizer.special_ids.values())] = False
        grammar = Grammar(inner, ordinary, self._tokenizer.eos_id, max(num_bytes, len(source)))
        grammar.matcher().allowed()  # refused here rather than at the first token where nothing matches
        return grammar


class _Vocabulary:
    """The tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.num_tokens)]
        self.special_token_ids = sorted(tokenizer.special_ids.values())

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the ids of a text; a marker's name in it is plain text."""
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"), add_bos=False)


def _read_vocabulary(tokenizer: Tokenizer) -> Any:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise MissingExtra("llguidance", "constrain", "a constraint") from error
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.num_tokens, eos_token=tokenizer.eos_id)


def _probe(source: str, limit_s: float) -> tuple[str, int]:
    """Compile a grammar in llguidance's form in a process of limited memory and time; return what is wrong ("": nothing) and its bytes."""
    import llguidance

    job = {
        "packages": str(Path(llguidance.__file__).parents[1]),
        "source": source,
        "limits": _LIMITS,
        "memory_bytes": MEMORY_LIMIT_BYTES,
        "cpu_s": math.ceil(limit_s) + 1,
    }
    command = [sys.executable, "-I", grammar_probe.__file__]
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"it was not compiled within {limit_s:.1f} s", 0
    if done.returncode:
        return "compiling it takes too much memory or time", 0
    answer = json.loads(done.stdout)
    return _first_words(answer["complaint"]), answer["grown_bytes"]


def _definition(constraint: Constraint) -> str:
    """Return the constraint in llguidance's own form; a schema is checked first."""
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return str(LLMatcher.grammar_from_regex(constraint.source))
    if constraint.kind == "grammar":
        return str(LLMatcher.grammar_from_lark(constraint.source))
    schema: Any = {"type": "object"}
    if constraint.kind == "json_schema":
        try:
            schema = json.loads(constraint.source, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"constraint: the schema is no JSON: {error}") from error
        if not isinstance(schema, dict):
            raise RequestError(f"constraint: the schema is a JSON {type(schema).__name__}, not an object")
        _check_depth(schema)
        _check_keywords(schema)
    text = json.dumps(schema)
    return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    """Refuse what is nested deeper than ``MAX_DEPTH``."""
    level, depth = [value], 0
    while level := [
        child for node in level if isinstance(node, dict | list) for child in (node.values() if isinstance(node, dict) else node)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"constraint: the schema is nested deeper than {MAX_DEPTH} levels", hint="use $defs and $ref")


def _check_keywords(schema: Any) -> None:
    """Refuse keywords of no JSON Schema, which would be ignored, wherever a schema stands."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            unknown = sorted(set(node) - _KEYWORDS)
            if unknown:
                raise RequestError(f"constraint: the schema has the keyword {unknown[0]!r}, which is not supported", hint="leave it out")
            waiting += _inner_schemas(node)


def _inner_schemas(node: dict[str, Any]) -> Iterator[Any]:
    for keyword, value in node.items():
        if keyword in _MAPPING and isinstance(value, dict):
            yield from value.values()
        elif keyword in _LIST and isinstance(value, list):
            yield from value
        elif keyword in _ONE:
            yield value


def _first_words(message: str) -> str:
    """Return the beginning of a library's message, on one line."""
    return " ".join(message.split())[:300]
