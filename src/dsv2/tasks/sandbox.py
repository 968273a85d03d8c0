"""Run a program that nobody trusts, as fast as an interpreter starts, and say what came of it (docs/sandbox.md).

Each program gets a fresh interpreter without environment, packages, network, other processes or files beyond Python's own library. It is
confined before it is sent there. What confines it is looked for each time, and less than what was asked for is an infrastructure outcome.
"""

import contextlib
import selectors
import time
from collections.abc import Sequence
from typing import Any

from dsv2.errors import ConfigError, did_you_mean
from dsv2.tasks.bubblewrap import bubblewrap
from dsv2.tasks.event_loop import OnMessage, drive
from dsv2.tasks.inside.confine import LEVELS
from dsv2.tasks.process import Confined
from dsv2.tasks.scratch import scratch_folder
from dsv2.tasks.verdict import Limits, Outcome, Verdict

__all__ = ["LEVELS", "REQUIRED", "Limits", "Verdict", "converse", "run", "strongest_level", "verdict_of"]

REQUIRED = "landlock+seccomp"
_DEFAULT = Limits()

Job = tuple[object, ...]


def run(program: str, *, stdin: str = "", limits: Limits = _DEFAULT, level: str = REQUIRED) -> Verdict:
    """Run a whole program under confinement.

    Args:
        program: Python source.
        stdin: its standard input.
        limits: what it may take.
        level: the least confinement it may run under, one of LEVELS. A weaker one than the default is your own explicit choice.

    Returns:
        pass if it ended with exit status 0; its output is in ``stdout``.

    Raises:
        ConfigError: no such level.
    """
    failures: list[str] = []
    begun = time.monotonic()

    def on_message(processes: list[Confined], _: int, message: list[Any]) -> bool:
        if failures:
            processes[0].kill("wrote to the channel")
        failures.append(str(message[1]) if len(message) > 1 else "")
        return False

    try:
        (process,) = converse([("script", program)], on_message, stdin=stdin.encode(errors="surrogatepass"), limits=limits, level=level)
    except OSError as error:
        return Verdict("infrastructure", f"no process could be started: {error}")
    if process.died_of() is None and process.status != 0:
        outcome: Outcome = "memory" if "MemoryError" in failures else "fail"
        return verdict_of(process, begun, outcome, _last_line(process) or f"exit status {process.status}")
    return verdict_of(process, begun, "pass", "", passed=int(process.died_of() is None))


def verdict_of(process: Confined, begun: float, outcome: Outcome, detail: str, *, passed: int = 0, total: int = 1) -> Verdict:
    """Return what came of a process that has ended: what it died of if that says it all, else the given outcome."""
    outcome, detail = process.died_of() or (outcome, detail)
    return Verdict(
        outcome,
        _one_line(detail),
        passed=0 if outcome == "infrastructure" else passed,
        total=total,
        stdout=process.stdout.decode(errors="replace"),
        stderr=process.stderr.decode(errors="replace"),
        cpu_s=process.cpu_s,
        wall_s=time.monotonic() - begun,
        level=process.level,
    )


def _one_line(detail: str) -> str:
    """Return what a program said so that it can be shown: it may hold line ends, half characters or a terminal's commands."""
    return "".join(character if character.isprintable() else " " for character in detail[:500])


def _last_line(process: Confined) -> str:
    return next(iter(process.stderr.decode(errors="replace").strip().splitlines()[-1:]), "")


def converse(jobs: Sequence[Job], on_message: OnMessage, *, stdin: bytes = b"", limits: Limits, level: str) -> list[Confined]:
    """Run one process a job, all at once, until one of them ends or `on_message` returns True; see `event_loop.drive`.

    Returns:
        The processes, ended.

    Raises:
        OSError: one could not be started.
        ConfigError: no such level.
    """
    if level not in LEVELS:
        raise ConfigError(f"there is no confinement level {level!r}; allowed: {', '.join(LEVELS)}", hint=did_you_mean(level, LEVELS))
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        processes: list[Confined] = []
        for job in jobs:
            scratch = stack.enter_context(scratch_folder(limits.scratch_bytes))
            wrapper = bubblewrap(scratch)
            process = Confined(job, selector, stdin=stdin, limits=limits, level=level, wrapper=wrapper, scratch=scratch)
            stack.callback(process.close)
            processes.append(process)
        drive(processes, selector, on_message)
    return processes


def strongest_level() -> str:
    """Return the level that programs run under on this machine; "" if none can be started."""
    return run("", level=LEVELS[0]).level
