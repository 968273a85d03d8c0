"""Asking the C library to keep freed memory for the next step instead of returning it to the system.

A training step allocates and frees the same large buffers again and again. By default glibc maps each anew, and the kernel clears every
page again at first touch: a fifth of a 550M-parameter model's step, and more in a virtual machine that returns free pages to its host.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST_KEPT = 1 << 30  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Set glibc's thresholds so, for the rest of the process; return whether that worked (False where the C library is another)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
