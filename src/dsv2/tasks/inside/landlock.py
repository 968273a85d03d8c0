"""Landlock: which files a process can reach. Linux; source: landlock(7)."""

from __future__ import annotations

import os
import sys

from dsv2.tasks.inside import libc

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterator

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same on every machine

# LANDLOCK_ACCESS_FS_*: what a rule set of each version of the kernel's interface can handle
_WRITE, _READ_FILE, _READ_DIR, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
_HANDLED_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_HANDLED_TCP = 0x3  # bind and connect, from version 4 on
_SCOPED = 0x3  # abstract sockets and signals, from version 6 on


def rule_set(scratch: str) -> int:
    """Make a rule set that leaves what an interpreter reads and one folder; it confines nobody yet.

    Args:
        scratch: the one folder with files to write, or "".

    Returns:
        Its handle, which other programs do not inherit; -1 where the kernel has no Landlock.
    """
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 1:
        return -1
    handled = _HANDLED_FILES[min(version, 5)]
    rules = (handled, _HANDLED_TCP, _SCOPED)[: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = b"".join(rule.to_bytes(8, "little") for rule in rules)  # struct landlock_ruleset_attr
    handle = int(libc.syscall(_CREATE, attributes, len(attributes), 0))
    if handle >= 0:
        for path, allowed in _readable():
            _allow(handle, path, allowed & handled)
        if scratch:
            _allow(handle, scratch, (_WRITE | _READ_FILE | _READ_DIR | _MAKE_FILE | _TRUNCATE) & handled)
    return handle


def restrict(rules: int) -> bool:
    """Confine this process to a rule set, for good; tell whether the kernel did."""
    return bool(libc.syscall(_RESTRICT, rules, 0) == 0)


def _readable() -> Iterator[tuple[str, int]]:
    """Yield what an interpreter reads: its library without installed packages, shared objects, time zones, three devices."""
    library = os.path.dirname(os.__file__)
    yield library, _READ_DIR  # imports list it
    for name in os.listdir(library):
        if name not in ("site-packages", "dist-packages"):  # a package may bring the answers to its questions
            yield f"{library}/{name}", _READ_FILE | _READ_DIR
    for path in sys.path:  # lib-dynload may lie elsewhere
        if path.endswith("lib-dynload"):
            yield path, _READ_FILE | _READ_DIR
    triplet = getattr(sys.implementation, "_multiarch", "")
    for folder in ("/lib64", "/usr/lib64", f"/lib/{triplet}", f"/usr/lib/{triplet}", "/usr/share/zoneinfo"):
        yield folder, _READ_FILE | _READ_DIR
    for file in ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"):
        yield file, _READ_FILE
    yield "/dev/null", _READ_FILE | _WRITE


def _allow(rules: int, path: str, allowed: int) -> None:
    try:
        folder = os.open(path, os.O_PATH)
    except OSError:
        return  # not on this system
    if not os.path.isdir(path):
        allowed &= ~_READ_DIR
    rule = allowed.to_bytes(8, "little") + folder.to_bytes(4, "little")  # struct landlock_path_beneath_attr
    libc.syscall(_ADD, rules, 1, rule, 0)
    os.close(folder)
