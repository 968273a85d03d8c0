"""Whether a run fits in memory; and asking the C library to keep freed memory for the next step instead of returning it to the system.

A training step allocates and frees the same large buffers again and again. By default glibc maps each anew, and the kernel clears every
page again at first touch: a fifth of a 550M-parameter model's step, and more in a virtual machine that returns free pages to its host.
"""

import ctypes
import os

import torch

from dsv2.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST_KEPT = 1 << 30  # bytes; mallopt takes an int


def require_training_memory(needed: int, *, hint: str) -> None:
    """Refuse a run on a CPU whose weights, gradients and moments need more bytes than the machine has.

    Raises:
        ConfigError: they do.
    """
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available() and needed > present:
        raise ConfigError(
            f"weights, gradients and moments take {needed / 1e9:,.0f} GB; this machine has {present / 1e9:,.0f} GB", hint=hint
        )


def keep_freed_memory() -> bool:
    """Set glibc's thresholds so, for the rest of the process; return whether that worked (False where the C library is another)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
