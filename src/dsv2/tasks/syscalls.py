"""The system calls that a confined program may make, and how a seccomp filter says so.

An allow list: what is not named here, and every call that a newer kernel adds, fails with EPERM. Numbers are those of Linux's
asm/unistd_64.h (x86-64) and asm-generic/unistd.h (aarch64); None where an architecture lacks the call.
"""

import struct
from functools import cache

# name of the machine (os.uname): its place in the pairs below, AUDIT_ARCH_* of linux/audit.h
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Files are Landlock's business; these calls reach them only through paths and open files. Missing on purpose: all that starts, traces or
# signals a process or thread, sockets, mounts, namespaces, memfd_create, fallocate (space without writing), chmod, chown and xattr
# (which Landlock does not know), links, folders, prctl, seccomp and setrlimit, timers that choose their signal, io_uring, bpf, keys, and
# unlink and rename: a mapping keeps a file that has no name any more, where nobody counts it.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "lseek": (8, 62), "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83), "umask": (95, 166),
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None), "getitimer": (36, 102), "setitimer": (38, 103),
    "alarm": (37, None), "restart_syscall": (219, 128), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "set_robust_list": (273, 99), "rseq": (334, 293), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "getrusage": (98, 165), "getrlimit": (97, 163),
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278), "getcpu": (309, 168), "arch_prctl": (158, None),
}  # fmt: skip

# Only with these second arguments. fcntl without F_SETOWN and F_SETSIG, which make the kernel signal another process, and without locks,
# of which millions fit into no limit.
_BY_SECOND_ARGUMENT = {
    "ioctl": ((16, 29), (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
    "fcntl": ((72, 25), (0, 1, 2, 3, 4, 1030, 1032)),  # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
}
_OPENS = (((2, None), 1), ((257, 56), 2))  # open, openat; which argument the flags are
_TMPFILE = 0x400000  # a file without a name
_WRITES_AND_TRUNCATES = 0x203  # O_ACCMODE | O_TRUNC
_TRUNCATES_ONLY = (0x200, 0x203)  # not opened for writing, which Landlock before version 3 does not see
_MMAP = (9, 222)
_SHARED = 1  # of its memory all stays for as long as one page is mapped, and the limit of the address space counts that page
_PRLIMIT64 = (302, 261)
_CLONE3 = (435, 435)
_EXITS = ((60, 93), (231, 94))  # exit, exit_group

# The exit status by which a shell, and bubblewrap, report SIGKILL. A program may not choose it: it would look like a machine that failed.
KILLED_STATUS = 137

_LOAD, _EQUAL, _ANY, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_ALU|AND|K, BPF_RET|K
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


@cache
def seccomp_filter(machine: str) -> bytes | None:
    """Return the filter as an array of struct sock_filter; None for a machine whose numbers are not known here."""
    if machine not in ARCHITECTURES:
        return None
    which, audit_arch = ARCHITECTURES[machine]
    program: list[Instruction] = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, audit_arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    for pair in _ALLOWED.values():
        program += _for_call(pair[which], [(_RETURN, 0, 0, _ALLOW)])
    for pair, values in _BY_SECOND_ARGUMENT.values():
        program += _for_call(pair[which], [_argument(1), *_allow_if_among(values), (_RETURN, 0, 0, _EPERM)])
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)
    for pair, place in _OPENS:
        truncating = [(_AND, 0, 0, _WRITES_AND_TRUNCATES), *(step for mode in _TRUNCATES_ONLY for step in ((_EQUAL, 0, 1, mode), refuse))]
        program += _for_call(pair[which], [_argument(place), (_ANY, 0, 1, _TMPFILE), refuse, *truncating, allow])
    program += _for_call(_MMAP[which], [_argument(3), (_ANY, 0, 1, _SHARED), refuse, allow])
    # reading limits: the pointer to new ones is null in both its halves
    null = [_argument(2), (_EQUAL, 1, 0, 0), refuse, _argument(2, high=True), *_allow_if_among((0,)), refuse]
    program += _for_call(_PRLIMIT64[which], null)
    for pair in _EXITS:
        status = [_argument(0), (_AND, 0, 0, 0xFF), (_EQUAL, 0, 1, KILLED_STATUS), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
        program += _for_call(pair[which], status)
    program += _for_call(_CLONE3[which], [(_RETURN, 0, 0, _ENOSYS)])  # the C library then tries clone, which is refused
    program.append((_RETURN, 0, 0, _EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _for_call(number: int | None, block: list[Instruction]) -> list[Instruction]:
    """Guard a block that ends with a return: it is stepped over unless the call in the accumulator has this number."""
    return [] if number is None else [(_EQUAL, 0, len(block), number), *block]


def _argument(place: int, *, high: bool = False) -> Instruction:
    """Load half of a 64-bit argument; the kernel's registers lie in little-endian order on both machines."""
    return _LOAD, 0, 0, _ARGUMENTS + 8 * place + 4 * high


def _allow_if_among(values: tuple[int, ...]) -> list[Instruction]:
    return [instruction for value in values for instruction in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
