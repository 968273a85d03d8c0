"""Let confined processes run beside each other, and hand on what they say, until one ends or enough is known."""

import selectors
import time
from collections.abc import Callable
from typing import Any

from dsv2.tasks.process import Confined

OnMessage = Callable[[list[Confined], int, list[Any]], bool]

_POLL_S = 0.02  # how often files and clocks are looked at


def drive(processes: list[Confined], selector: selectors.BaseSelector, on_message: OnMessage) -> None:
    """Let processes run until one ends or `on_message` says that it is enough.

    Args:
        processes: each just started.
        selector: watches them.
        on_message: gets the processes, the place of the one that sent a message, and the message (a list that begins with a word; what a
            program claims); returns True to stop.
    """
    enough = False
    while not enough:
        ended = any(process.status is not None for process in processes)
        wait_s = 0.0 if ended else max(min(process.deadline for process in processes) - time.monotonic(), 0.0)
        for key, _ in selector.select(min(wait_s, _POLL_S)):
            key.data()
        for place, process in enumerate(processes):
            for message in process.lines():
                enough = enough or on_message(processes, place, message)
                if process.end:  # what follows is not believed
                    break
            process.check()
        enough = enough or ended
