"""Memory in huge pages: anonymous, private, never copied to disk.

Two threads read 2 MiB pages about twice as fast as 4 KiB ones in a virtual machine; the kernel gives them to who asks (transparent huge
pages are "madvise" by default).
"""

import ctypes
import mmap

_HUGE = 2 << 20


class HugeMemory:
    """Zeroed memory that begins at a huge page's border; pages are taken when they are first written.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        # private: shared memory gets no huge pages
        self._pages = mmap.mmap(-1, -(-size // _HUGE) * _HUGE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self._shift = -start % _HUGE
        self.address = start + self._shift
        self.size = size

    def view(self) -> memoryview:
        """Return all of it as writable bytes."""
        return memoryview(self._pages)[self._shift : self._shift + self.size]
