"""What this machine has left, asked before work starts rather than found out in the middle of it."""

import resource
import shutil
import sys
from pathlib import Path

from dsv2.errors import CheckpointError, DataError
from dsv2.files import existing_parent

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes a process can still take, a container's limit included; None where the system does not say."""
    if not _MEMINFO.is_file():  # not Linux
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in _MEMINFO.read_text().splitlines()}
    free = kib["MemAvailable"] * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free


def total_memory() -> int | None:
    """Return the bytes of memory built in; None where the system does not say."""
    if not _MEMINFO.is_file():
        return None
    return int(_MEMINFO.read_text().split()[1]) * 1024  # its first line is MemTotal


def peak_memory() -> int:
    """Return the most bytes that this process has held resident so far, file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def require_memory(num_bytes: int, purpose: str, *, hint: str | None = None) -> None:
    """Refuse work that does not fit.

    Raises:
        CheckpointError: less memory is available.
    """
    free = available_memory()
    if free is not None and num_bytes > free:
        raise CheckpointError(f"{purpose} takes {num_bytes / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are available", hint=hint)


def require_disk(num_bytes: int, path: Path) -> None:
    """Refuse to begin a file or folder that does not fit where it shall lie.

    Raises:
        DataError: less disk is free.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if num_bytes > free:
        raise DataError(
            f"{path} takes {num_bytes / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free",
            hint="free some space, choose another place with --out, or a smaller dtype",
        )
