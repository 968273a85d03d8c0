"""Functions of the C library, through the extension module below ctypes: the package on top of it takes each program 2 ms to import."""

from __future__ import annotations

from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO, CFuncPtr, _SimpleCData, dlopen, dlsym, get_errno

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from typing import Any

__all__ = ["address_of", "get_errno", "prctl", "socket", "syscall"]


class _Int(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Address(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "z"


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_library = dlopen(None, 0)  # type: ignore[arg-type]
# They take None, bytes (as their address) and numbers below 2^31, and return an int.
prctl: Any = _Function(dlsym(_library, "prctl"))
socket: Any = _Function(dlsym(_library, "socket"))
syscall: Any = _Function(dlsym(_library, "syscall"))


def address_of(content: bytes) -> bytes:
    """Return the address of bytes as a structure of C holds it; whoever needs it keeps them alive."""
    return bytes(_Address(content))
