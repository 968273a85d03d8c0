"""Asking the C library to keep freed memory for the next step instead of returning it to the system.

A training step allocates and frees the same large buffers again and again. By default glibc maps each anew, and the kernel clears every
page again at first touch.
"""

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Set glibc's thresholds so; return whether that worked (False where the C library is another)."""
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
