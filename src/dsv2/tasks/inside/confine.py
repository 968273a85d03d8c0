"""Take from the running process what a strange program must not have: limits, another user, Landlock, seccomp. Linux, through ctypes.

Everything here only ever takes away, and what it took is tried out before it is believed. Sources: landlock(7), seccomp(2), prctl(2),
setrlimit(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

from dsv2.tasks.inside.syscalls import seccomp_filter

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# From weak to strong. "rlimits" keeps an honest program from harm by accident, no more.
LEVELS = ("rlimits", "seccomp", "landlock+seccomp", "bubblewrap+landlock+seccomp")

_UNSHARED_UID = 1_900_000_000  # plus the process id: a user that owns nothing and shares its limits with nobody
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_PR_SET_THP_DISABLE = 41
_SIGKILL = 9  # the module signal is slow to import; Python itself ignores SIGXFSZ, so that too large a file is an OSError
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every machine

# LANDLOCK_ACCESS_FS_*: what a rule set of each version of the kernel's interface can handle
_WRITE, _READ_FILE, _READ_DIR, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
_HANDLED_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_HANDLED_TCP = 0x3  # bind and connect, from version 4 on
_SCOPED = 0x3  # abstract sockets and signals, from version 6 on

_libc = ctypes.CDLL(None, use_errno=True)


def limit_resources(cpu_s: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Set the limits of setrlimit(2): no core file, no second process or thread; SIGXCPU at `cpu_s`, SIGKILL one second later."""
    for which, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, open_files, open_files),
        (resource.RLIMIT_NPROC, 1, 1),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        resource.setrlimit(which, (soft, hard))
    # of a page of 2 MiB all stays while 4 KiB are mapped, and the limit of the address space counts those
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def give_up_privileges(scratch: str) -> None:
    """As root, become a user that owns only the scratch folder, or, where that user could not read the interpreter, root without powers."""
    if os.geteuid() != 0:
        return
    uid = _UNSHARED_UID + os.getpid()
    if all(os.stat(folder).st_mode & 0o001 for folder in _ancestors(os.path.dirname(os.__file__))):
        if scratch:
            os.chown(scratch, uid, uid)
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            return
        except OSError:
            pass  # a container that maps few users
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if _libc.syscall(_CAPSET.get(os.uname().machine, -1), header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _ancestors(path: str) -> Iterator[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the thread that started this process ends; a parent that ended before (`parent` not 0) ends it now."""
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    if parent and os.getppid() != parent:
        os._exit(1)


def confine(scratch: str) -> str:
    """Apply Landlock and seccomp as far as the kernel has them.

    Args:
        scratch: the one folder with files to write, or "".

    Returns:
        The level reached, one of LEVELS; each part counts only if forbidden things are refused afterwards.
    """
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return LEVELS[0]
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody's to trace, nor its files in /proc to read
    fenced = _landlock(scratch)
    if not _seccomp():
        return LEVELS[0]
    return LEVELS[2] if fenced else LEVELS[1]


class _RuleSet(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def _landlock(scratch: str) -> bool:
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = _HANDLED_FILES[min(version, 5)]
    rules = _RuleSet(handled, _HANDLED_TCP if version >= 4 else 0, _SCOPED if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = _libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    if handle < 0:
        return False
    for path, allowed in _readable():
        _allow(handle, path, allowed & handled)
    if scratch:
        _allow(handle, scratch, (_WRITE | _READ_FILE | _READ_DIR | _MAKE_FILE | _TRUNCATE) & handled)
    restricted = _libc.syscall(_LANDLOCK_RESTRICT, handle, 0) == 0
    os.close(handle)
    return restricted and _refused(lambda: os.open("/", os.O_RDONLY), 13)  # EACCES


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
    _libc.syscall(_LANDLOCK_ADD, rules, 1, ctypes.byref(_PathRule(allowed, folder)), 0)
    os.close(folder)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p)]


def _seccomp() -> bool:
    instructions = seccomp_filter(os.uname().machine)
    if instructions is None:
        return False
    program = _Program(len(instructions) // 8, instructions)
    if _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) != 0:  # SECCOMP_MODE_FILTER
        return False
    return _libc.socket(1, 1, 0) == -1 and ctypes.get_errno() == 1 and _refused(lambda: os.kill(os.getpid(), 0), 1)  # EPERM


def _refused(attempt: Callable[[], object], errno: int) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno == errno
    return False
