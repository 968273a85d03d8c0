"""An engine on a thread of its own: requests come from any thread, and what they gain goes to a function given with them.

Between two steps the thread does what others asked for: it adds and aborts requests and runs what must not meet a step. With nothing to do
it sleeps until somebody wakes it.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from dsv2.engine.answer import Dropped
from dsv2.engine.engine import Engine
from dsv2.engine.request import Output, Request
from dsv2.errors import ConfigError, RequestError

_T = TypeVar("_T")
Deliver = Callable[[Output | Exception], object]


class Overloaded(RequestError):
    """More requests than the engine takes at a time; later it may have room."""


@dataclass(slots=True)
class _Accepted:
    """A request whose outputs go to ``deliver``; ``unfinished`` answers lack their last."""

    deliver: Deliver
    unfinished: int


class EngineThread:
    """An engine and the thread that owns it; every method may be called from any thread.

    Each accepted request ends exactly once: with the last output of each of its ``n`` answers, or with one exception. Where one request
    fails, the others go on; where a whole step does, all in the engine end with its exception, and later ones are served.

    Args:
        engine: nobody else may use it from now on.
        max_requests: that may be under way; more are refused.
    """

    def __init__(self, engine: Engine, *, max_requests: int) -> None:
        if max_requests < 1:
            raise ConfigError(f"max_requests = {max_requests} must be at least 1")
        self._engine, self._max_requests = engine, max_requests
        self._accepted: dict[str, _Accepted] = {}  # of the thread alone
        self._changed = threading.Condition()  # guards what follows
        self._errands: deque[Callable[[], None]] = deque()  # only the thread takes from it
        self._num_accepted = 0
        self._closing = self._dropping = False
        engine.on_compiled = self._wake
        self._thread = threading.Thread(target=self._work, name="dsv2-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """Accept requests, all or none.

        Args:
            requests: with ids that nobody else uses.
            deliver: called on the engine's thread with each output, and with an exception when a request cannot go on. It must return at
                once; if it raises, its request is aborted.

        Raises:
            Overloaded: there are ``max_requests`` already.
            RequestError: the engine is closed.
        """

        def add() -> None:
            for request in requests:
                self._add(request, deliver)

        with self._changed:
            self._require_open()
            if self._num_accepted + len(requests) > self._max_requests:
                raise Overloaded(
                    f"{self._num_accepted} requests are under way; with {len(requests)} more they exceed {self._max_requests}",
                    hint="try again later, or raise max_requests",
                )
            self._num_accepted += len(requests)
            self._errands.append(add)
            self._changed.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests before the next step; nothing more of them is delivered. Those that have ended are passed over."""
        names = tuple(request_ids)

        def end() -> None:
            for name in names:
                self._engine.abort(name)
                self._forget(name)

        with self._changed:
            self._errands.append(end)
            self._changed.notify()

    def call(self, function: Callable[[Engine], _T]) -> "Future[_T]":
        """Run a function of the engine between two steps; return its result to come.

        Raises:
            RequestError: the engine is closed.
        """
        result: Future[_T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(function(self._engine))
            except Exception as error:  # of any kind: it belongs to the caller
                result.set_exception(error)

        with self._changed:
            self._require_open()
            self._errands.append(run)
            self._changed.notify()
        return result

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing more, end what was accepted, and give back the engine's threads and memory; return when that is done.

        Args:
            drain: let accepted requests run to their ends; else abort them, with an output that says so. A second call may abort what a
                first one lets run.
        """
        with self._changed:
            self._closing = True
            self._dropping |= not drain
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _require_open(self) -> None:
        if self._closing:
            raise RequestError("the engine is closed", hint="open the model again")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # On the engine's thread --------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # the engine is broken: whoever waits must not wait for ever
            with self._changed:
                self._closing = True
            while self._errands:
                with suppress(Exception):
                    self._errands.popleft()()
            for name in list(self._accepted):
                self._end(name, error)
            raise
        finally:
            self._engine.close()

    def _turn(self) -> bool:
        """Do all errands, then a step; tell whether there may be more to do."""
        with self._changed:
            while not self._errands and not self._dropping and (idle_s := self._idle_s()):
                self._changed.wait(None if idle_s == inf else idle_s)
            closing, dropping = self._closing, self._dropping
        while self._errands:
            self._errands.popleft()()
        if dropping:
            self._drop_all()
        if self._engine.idle_s == 0:
            self._step()
        if not closing or self._accepted:
            return True
        with self._changed:
            return bool(self._errands)

    def _idle_s(self) -> float:
        """Return the seconds to sleep if nobody calls: 0 with work at hand, or with nothing left to do before the end."""
        return 0.0 if self._closing and not self._accepted else self._engine.idle_s

    def _add(self, request: Request, deliver: Deliver) -> None:
        try:
            self._engine.add(request)
        except Exception as error:  # of any kind: it belongs to the request
            self._count_one_less()
            _try(deliver, error)
        else:
            self._accepted[request.request_id] = _Accepted(deliver, request.params.n)

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:  # of any kind
            for output in self._engine.leftovers():
                self._deliver(output)
            # where nobody knows whose it is, it is everybody's
            for name in error.request_ids if isinstance(error, Dropped) else tuple(self._accepted):
                self._end(name, error)
                self._engine.abort(name)
        else:
            for output in outputs:
                self._deliver(output)

    def _deliver(self, output: Output) -> None:
        name = output.request_id
        accepted = self._accepted.get(name)
        if accepted is None:  # aborted
            return
        accepted.unfinished -= output.finish_reason is not None
        if not accepted.unfinished:
            self._forget(name)  # first: whoever has the last output may send the next request at once
        if not _try(accepted.deliver, output):
            self._engine.abort(name)
            self._forget(name)

    def _drop_all(self) -> None:
        for name in list(self._accepted):
            for output in self._engine.abort_answers(name):
                self._deliver(output)
            self._forget(name)

    def _end(self, name: str, error: Exception) -> None:
        if (accepted := self._accepted.get(name)) is not None:
            self._forget(name)
            _try(accepted.deliver, error)

    def _forget(self, name: str) -> None:
        if self._accepted.pop(name, None) is not None:
            self._count_one_less()

    def _count_one_less(self) -> None:
        with self._changed:
            self._num_accepted -= 1


def _try(deliver: Deliver, item: Output | Exception) -> bool:
    """Call a stranger's function; tell whether it took the item, as one of a closed event loop does not."""
    try:
        deliver(item)
    except Exception:
        return False
    return True
