"""Work that is timed while nothing else runs: waits for a quiet machine, tells how much others took of it, tries again if that was much.

Two threads that wait for each other fall apart when a third one takes a core for a moment, so a figure taken beside other work says
nothing. ``MOST`` of the machine is what others may take; what is still above it after all tries is to be thrown away.
"""

import os
import resource
import time
from collections.abc import Callable
from typing import TypeVar

MOST = 0.10  # of the machine, taken by others
TRIES, LONGEST_WAIT_S = 3, 30.0

T = TypeVar("T")


def busy_s() -> float:
    """Return the seconds for which this machine's processors have been at work, whoever's, those that the host took away included."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, *interrupts = (int(word) for word in file.readline().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def children_s() -> float:
    """Return the processor time of this process and of those that it waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime + time.process_time()


def others_share(work: Callable[[], T], own_s: Callable[[], float] = time.process_time) -> tuple[T, float]:
    """Return what work returns, and the share of the machine that others took meanwhile."""
    started, busy, own = time.monotonic(), busy_s(), own_s()
    result = work()
    own, busy, wall = own_s() - own, busy_s() - busy, time.monotonic() - started
    return result, max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def quietly(work: Callable[[], T], own_s: Callable[[], float] = time.process_time) -> tuple[T, float]:
    """Do work on a quiet machine, again where others disturbed it; return what it returned last, and the others' share then.

    Args:
        work: should last a second at least, as the kernel counts in hundredths.
        own_s: processor seconds that are not others'.
    """
    for _ in range(TRIES):
        end = time.monotonic() + LONGEST_WAIT_S
        while others_share(lambda: time.sleep(0.5), own_s)[1] > MOST / 2 and time.monotonic() < end:
            pass
        result, others = others_share(work, own_s)
        if others <= MOST:
            break
    return result, others
