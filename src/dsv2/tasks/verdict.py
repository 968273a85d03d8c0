"""What came of a program, and how much it may take: the records of this room."""

from dataclasses import dataclass
from typing import Literal

from dsv2.errors import ConfigError

# What the program did: pass, fail, timeout, memory. What the machine did: infrastructure, which says nothing about the program.
Outcome = Literal["pass", "fail", "timeout", "memory", "infrastructure"]

MIB = 2**20
_LEAST = {"cpu_s": 1, "wall_s": 0.1, "memory_bytes": 64 * MIB, "output_bytes": 1, "scratch_bytes": 0, "open_files": 16}


@dataclass(frozen=True)
class Limits:
    """What a confined program may take. It has one process with one thread.

    Args:
        cpu_s: processor time in whole seconds, of which the interpreter's start takes some 0.02.
        wall_s: seconds on the clock from the moment it is confined, for a program that sleeps. Larger than ``cpu_s``, so that a busy
            machine does not change verdicts.
        memory_bytes: address space; an empty interpreter takes 20 MiB.
        output_bytes: of standard output, of standard error, and of each value that a function returns.
        scratch_bytes: of all files that it writes; 0: it can write none.
        open_files: at a time.

    Raises:
        ConfigError: a limit is too small for any program.
    """

    cpu_s: int = 3
    wall_s: float = 10.0
    memory_bytes: int = 512 * MIB
    output_bytes: int = MIB
    scratch_bytes: int = 4 * MIB
    open_files: int = 32

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} is {getattr(self, name)}; a confined program needs at least {least:,}")


@dataclass(frozen=True)
class Verdict:
    """What came of a program.

    Args:
        outcome: "infrastructure" means that nothing is known about the program: it has no score, not a score of 0.
        detail: one line on what went wrong; "" after a pass.
        passed: how many tests it passed.
        total: how many there are.
        stdout: what it wrote, at most Limits.output_bytes.
        stderr: the end of what it wrote there.
        cpu_s: processor time.
        wall_s: time from start to end, the interpreter's start included.
        level: how it was confined, one of LEVELS; "" if it was not started.
    """

    outcome: Outcome
    detail: str = ""
    passed: int = 0
    total: int = 1
    stdout: str = ""
    stderr: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    level: str = ""

    @property
    def score(self) -> float | None:
        """1 for a pass, 0 for what the program did wrong, None where nothing is known."""
        return None if self.outcome == "infrastructure" else float(self.outcome == "pass")
