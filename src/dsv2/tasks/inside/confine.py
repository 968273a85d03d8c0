"""Take from the running process what a strange program must not have: limits, another user, files, system calls. Linux.

Everything here only ever takes away, and what it took is tried out before it is believed. Sources: seccomp(2), prctl(2), setrlimit(2),
capabilities(7).
"""

from __future__ import annotations

import os
import resource

from dsv2.tasks.inside import landlock, libc

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
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def give_up_privileges(scratch: str) -> None:
    """As root, become a user that owns only the scratch folder, or, where that user could not read the interpreter, root without powers."""
    if os.geteuid() != 0:
        return
    uid = _UNSHARED_UID + os.getpid()
    if all(os.stat(folder).st_mode & 0o001 for folder in _ancestors(os.path.dirname(os.__file__))):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(-1, -1, uid)  # to find out whether it may, before the folder is another's
            if scratch:
                os.chown(scratch, uid, uid)
            os.setresuid(uid, uid, uid)
            return
        except OSError:
            pass  # a container, or bubblewrap, that maps few users; the folder is still root's
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = 0x20080522.to_bytes(8, "little")  # _LINUX_CAPABILITY_VERSION_3, this process
    if libc.syscall(_CAPSET.get(os.uname().machine, -1), header, bytes(24)) != 0:
        raise OSError(libc.get_errno(), "capset")


def _ancestors(path: str) -> Iterator[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the thread that started this process ends; a parent that ended before (`parent` not 0) ends it now."""
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    if parent and os.getppid() != parent:
        os._exit(1)


def confine(rules: int, instructions: bytes | None) -> str:
    """Apply Landlock and seccomp as far as the kernel has them.

    Args:
        rules: handle of the Landlock rule set, which is closed; -1 where the kernel has none.
        instructions: the seccomp filter; None for a machine without one.

    Returns:
        The level reached, one of LEVELS; each part counts only if forbidden things are refused afterwards.
    """
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return LEVELS[0]
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody's to trace, nor its files in /proc to read
    fenced = False
    if rules >= 0:
        fenced = landlock.restrict(rules) and _refused(lambda: os.open("/", os.O_RDONLY), 13)  # EACCES
        os.close(rules)
    if instructions is None or not _seccomp(instructions):
        return LEVELS[0]
    return LEVELS[2] if fenced else LEVELS[1]


def _seccomp(instructions: bytes) -> bool:
    program = (len(instructions) // 8).to_bytes(8, "little") + libc.address_of(instructions)  # struct sock_fprog
    if libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0) != 0:  # SECCOMP_MODE_FILTER
        return False
    return libc.socket(1, 1, 0) == -1 and libc.get_errno() == 1 and _refused(lambda: os.kill(os.getpid(), 0), 1)  # EPERM


def _refused(attempt: Callable[[], object], errno: int) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno == errno
    return False
