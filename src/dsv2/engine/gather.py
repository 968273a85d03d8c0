"""Many requests through one engine, a window of them at a time, and their outputs joined to whole answers."""

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from dsv2.engine.answer import joined
from dsv2.engine.request import Output, Request
from dsv2.errors import RequestError
from dsv2.progress import bar

if TYPE_CHECKING:
    from dsv2.engine.engine import Engine

# Requests in the engine for each that can run at once: enough for neighbours to find the prefixes that they share, and few, since each
# holds its tokens in several forms.
_WINDOW = 4
_REFRESH_S = 0.25  # between two changes of the progress line


def run(engine: "Engine", requests: Iterable[Request]) -> Generator[Output, None, None]:
    """Yield the outputs of these requests as they come; closing the iterator aborts those that have not finished.

    Requests join in order, as others finish and constraints are compiled. What else the engine holds advances meanwhile; its outputs are
    kept for who asks for them.

    Raises:
        RequestError: as ``Engine.add``, when it is a request's turn.
    """
    coming = iter(requests)
    unfinished: dict[str, int] = {}  # answers of a request
    waiting: Request | None = None  # the next one, while too many constraints are to be compiled
    try:
        while True:
            while len(unfinished) < _WINDOW * engine.max_batch and (request := waiting or next(coming, None)) is not None:
                waiting = None if engine.has_room(request) else request
                if waiting:
                    break
                engine.add(request)
                unfinished[request.request_id] = request.params.n
            if not unfinished and waiting is None:
                return
            outputs = engine.step_for(unfinished)
            for output in outputs:
                unfinished[output.request_id] -= output.finish_reason is not None
            # what the engine does not hold has finished, or was aborted by somebody else
            unfinished = {name: left for name, left in unfinished.items() if left and engine.holds(name)}
            yield from outputs
    finally:
        for name in unfinished:
            engine.abort(name)


class Gathered:
    """Outputs on their way to whole answers.

    Args:
        requests: that the outputs belong to.

    Raises:
        RequestError: two have the same id.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._parts: dict[str, list[list[Output]]] = {}
        for request in requests:
            if request.request_id in self._parts:
                raise RequestError(f"request_id = {request.request_id!r} occurs twice", hint="give every request its own id")
            self._parts[request.request_id] = [[] for _ in range(request.params.n)]

    def add(self, output: Output) -> list[Output] | None:
        """Take an output; return all answers of its request, each in one, when this was the last that they lacked, and forget them."""
        answers = self._parts[output.request_id]
        answers[output.index].append(output)
        if output.finish_reason is None or not all(parts and parts[-1].finish_reason is not None for parts in answers):
            return None
        del self._parts[output.request_id]
        return [joined(parts) for parts in answers]


def collect(engine: "Engine", requests: Sequence[Request], *, progress: bool = False) -> list[Output]:
    """Run requests to their ends; return one whole output for each answer, in the order of the requests.

    Raises:
        RequestError: as ``Engine.add``; then none of them has run.
    """
    for request in requests:
        engine.check(request)
    gathered = Gathered(requests)
    found: dict[str, list[Output]] = {}
    outputs = run(engine, requests)
    with closing(shown(outputs, sum(request.params.n for request in requests)) if progress else outputs) as coming:
        for output in coming:
            if (answers := gathered.add(output)) is not None:
                found[output.request_id] = answers
    return [answer for request in requests for answer in found.get(request.request_id, ())]


def shown(outputs: Iterable[Output], total: int, *, done: int = 0) -> Generator[Output, None, None]:
    """Pass outputs on under a progress bar of finished answers and new tokens per second.

    Args:
        outputs: as they come.
        total: answers in all.
        done: answers that were there before.
    """
    tokens = finished = 0
    started = changed = time.monotonic()
    with bar(total, "generating", unit="answers", done=done) as progress:
        for output in outputs:
            tokens += len(output.tokens)
            finished += output.finish_reason is not None
            now = time.monotonic()
            if now - changed >= _REFRESH_S:
                progress.advance(finished, tokens_per_s=tokens / (now - started))
                finished, changed = 0, now
            yield output
        progress.advance(finished, tokens_per_s=tokens / max(time.monotonic() - started, 1e-3))
