"""Programs that try to break out, and programs that try to be rewarded for nothing.

A program of ESCAPES prints ESCAPED if what it tries succeeds; {secret}, {folder}, {parent} and {port} are filled in. A program of CHEATS is
tested on a function f whose values it cannot compute; whatever it does, it must not pass.
"""

import textwrap

_SYSCALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"

# Maps a page of a file that is open as f, which needs no handle then; the name goes right afterwards. More than any limit here allows.
_HOLD = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
for n in range(64):
    with open('kept', 'w+b') as f:
        f.write(bytes(1 << 20)); f.flush()
        assert libc.mmap(None, ctypes.c_size_t(4096), 1, 2, f.fileno(), ctypes.c_long(0)) not in (None, 2 ** 64 - 1)
    """

_ATTEMPTS = {
    "reads a foreign file": "open({secret!r}).read()",
    "reads /etc/passwd": "open('/etc/passwd').read()",
    "lists the root folder": "import os; os.listdir('/')",
    "reads another process's memory": "open('/proc/{parent}/mem', 'rb')",
    "reads its own memory through /proc": "open('/proc/self/mem', 'rb+')",
    "reads the environment of its parent": "open('/proc/{parent}/environ', 'rb').read()",
    "reads through the root link of /proc": "open('/proc/self/root/etc/passwd').read()",
    "reads an installed package": "import glob, os; open(glob.glob(os.path.dirname(os.__file__) + '/site-packages/*/*')[0]).read()",
    "writes a foreign file": "open({secret!r}, 'w').write('x')",
    "appends to a foreign file by raw call": _SYSCALL + "assert libc.open({secret!r}.encode(), 1025) >= 0",
    "truncates a foreign file": "import os; os.truncate({secret!r}, 0)",
    "removes a foreign file": "import os; os.unlink({secret!r})",
    "renames a foreign file": "import os; os.rename({secret!r}, 'mine')",
    "links to a foreign file": "import os; os.link({secret!r}, 'mine'); open('mine').read()",
    "symlinks to a foreign file": "import os; os.symlink({secret!r}, 'mine'); open('mine').read()",
    "changes the mode of a foreign file": "import os; os.chmod({secret!r}, 0o777)",
    "changes the times of a foreign file": "import os; os.utime({secret!r}, (0, 0))",
    "makes a file beside the foreign one": "open({folder!r} + '/new', 'w')",
    "makes a folder": "import os; os.mkdir('x')",
    "makes a pipe in the file system": "import os; os.mkfifo('x')",
    "makes a device": "import os; os.mknod('x', 0o60600, 2049); open('x').read()",
    "opens the disk": "import glob; open('/dev/vda', 'rb').read(1)",
    "opens the terminal": "open('/dev/tty', 'r+b', 0).write(b'x')",
    "opens shared memory": "open('/dev/shm/dsv2-test', 'w')",
    "opens a TCP connection": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "opens a UDP socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "opens a UNIX socket": "import socket; socket.socket(socket.AF_UNIX)",
    "opens a netlink socket": _SYSCALL + "assert libc.socket(16, 3, 0) >= 0",
    "makes a socket pair": "import socket; socket.socketpair()",
    "forks": "import os; os.fork() or os._exit(0)",
    "forks by raw call": _SYSCALL + "pid = libc.syscall(57); assert pid >= 0\nif pid == 0: import os; os._exit(0)",
    "clones by raw call": _SYSCALL + "assert libc.syscall(56, 17, 0, 0, 0, 0) >= 0",
    "clones by the newer call": _SYSCALL + "assert libc.syscall(435, (ctypes.c_uint64 * 11)(), 88) >= 0",
    "starts a thread": "import threading; threading.Thread(target=print).start()",
    "starts a program": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "starts a program in a process": "import subprocess; subprocess.run(['/bin/true'])",
    "starts a shell": "import os; assert os.system('true') == 0",
    "spawns": "import os; os.posix_spawn('/bin/true', ['true'], {{}})",
    "runs a program from memory": "import os; handle = os.memfd_create('x')",
    "signals its parent": "import os; os.kill({parent}, 0)",
    "kills its parent": "import os; os.kill({parent}, 9)",
    "kills every process": "import os; os.kill(-1, 9)",
    "signals a thread of its parent": _SYSCALL + "assert libc.syscall(234, {parent}, {parent}, 0) == 0",
    "kills through a handle": "import signal, os; signal.pidfd_send_signal(os.pidfd_open({parent}), 0)",
    "has the kernel signal its parent": "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {parent})",
    "traces its parent": _SYSCALL + "assert libc.ptrace(16, {parent}, 0, 0) == 0",
    "reads its parent's memory": _SYSCALL
    + "b = ctypes.create_string_buffer(8); v = (ctypes.c_uint64 * 2)(ctypes.addressof(b), 8)\n"
    + "assert libc.process_vm_readv({parent}, v, 1, v, 1, 0) >= 0",
    "leaves its session": "import os; os.setsid()",
    "changes its user": "import os; os.setuid(0); os.setresuid(1, 1, 1)",
    "makes namespaces": _SYSCALL + "assert libc.unshare(0x10000000) == 0",
    "enters a namespace": _SYSCALL + "assert libc.setns(0, 0) == 0",
    "mounts": _SYSCALL + "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "changes the root": "import os; os.chroot('.')",
    "uses io_uring": _SYSCALL + "assert libc.syscall(425, 8, (ctypes.c_uint32 * 30)()) >= 0",
    "uses bpf": _SYSCALL + "assert libc.syscall(321, 0, (ctypes.c_uint32 * 30)(), 120) >= 0",
    "uses the key ring": _SYSCALL + "assert libc.syscall(250, 0, -3, 0) >= 0",
    "opens by handle": _SYSCALL + "assert libc.syscall(304, -100, (ctypes.c_uint32 * 8)(), 0) >= 0",
    "opens by the newer call": _SYSCALL + "assert libc.syscall(437, -100, {secret!r}.encode(), (ctypes.c_uint64 * 3)(), 24) >= 0",
    "adds to its own limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "lifts its own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "adds a filter of its own": _SYSCALL + "assert libc.prctl(22, 1, 0, 0, 0) == 0",
    "survives its parent": _SYSCALL + "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "makes a timer that kills": _SYSCALL + "assert libc.syscall(222, 0, (ctypes.c_int32 * 16)(0, 0, 9, 0), (ctypes.c_int32 * 2)()) == 0",
    "raises its priority": "import os; os.nice(-10)",
    "takes a whole file's space at once": "import os; os.posix_fallocate(os.open('x', os.O_RDWR | os.O_CREAT), 0, 1000)",
    "keeps files that have no name": _HOLD + "os.unlink('kept')",
    "keeps files that another took the name of": "open('other', 'wb').close()" + _HOLD + "os.rename('kept', 'other')",
    "makes a file without a name": "import os; os.open('.', os.O_TMPFILE | os.O_RDWR)",
    "truncates what is open for reading": "import os; open('kept', 'w').close(); os.open('kept', os.O_RDONLY | os.O_TRUNC)",
    "truncates what is open for nothing": "import os; open('kept', 'w').close(); os.open('kept', os.O_TRUNC | 3)",
    "keeps memory of which it maps a page": """
        import ctypes
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        for n in range(8):
            place = libc.mmap(None, ctypes.c_size_t(1 << 26), 3, 0x21, -1, ctypes.c_long(0))
            assert place not in (None, 2 ** 64 - 1)
            ctypes.memset(place, 1, 1 << 26)
            libc.munmap(ctypes.c_void_p(place + 4096), ctypes.c_size_t((1 << 26) - 4096))""",
    "shares memory of a device": "import mmap, os; mmap.mmap(os.open('/dev/zero', os.O_RDONLY), 4096, prot=mmap.PROT_READ)",
    "fills the kernel's memory with locks": """
        import fcntl, struct
        for n in range(5000):
            fcntl.fcntl(1, fcntl.F_SETLK, struct.pack('hhqqixxxx', fcntl.F_WRLCK, 0, 2 * (5000 - n), 1, 0))""",
    "enlarges a pipe": "import os, fcntl; r, w = os.pipe(); fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 20)",
    "passes open files on": _SYSCALL + "assert any(libc.sendmsg(h, (ctypes.c_uint64 * 7)(), 0) >= 0 for h in range(64))",
    "makes itself wait for a processor": "import os; os.nice(10)",
    "hands its processor to whoever waits": "import os; os.sched_yield()",
    "runs only when nobody else does": "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
    "calls by the numbers of another architecture": _SYSCALL + "assert libc.syscall(0x40000000 + 39) >= 0",
    "calls as a program of 32 bits": """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
        assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0""",
    "writes a large file": "f = open('x', 'wb', 0); [f.write(bytes(1 << 20)) for _ in range(64)]",
    "writes to the processes' inherited files": "import os; [os.write(handle, b'x') for handle in range(5, 256)]",
    "sees an environment": "import os; assert set(os.environ) - {{'PYTHONHASHSEED', 'LC_CTYPE'}}",
    "imports an installed package": "import pytest",
    "imports the judge": "import dsv2",
    "finds modules of the judge": "import sys; assert [name for name in sys.modules if name.startswith('dsv2')]",
}

ESCAPES = {name: textwrap.dedent(code) + "\nprint('ESCAPED')\n" for name, code in _ATTEMPTS.items()}

# name: program, the outcomes it may have
BOMBS: dict[str, tuple[str, set[str]]] = {
    "loops": ("while True: pass", {"timeout"}),
    "loops and ignores signals": (
        """import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
        {"timeout"},
    ),
    "catches everything": (
        """while True:
    try:
        while True: pass
    except BaseException: pass""",
        {"timeout"},
    ),
    "sleeps": ("import time; time.sleep(1000)", {"timeout"}),
    "waits for input": (
        """import sys, os
while True: sys.stdin.read()""",
        {"timeout"},
    ),
    "computes a huge power": ("print(len(str(9 ** 9 ** 9)))", {"memory", "timeout"}),
    "takes memory": ("x = bytearray(1 << 34)", {"memory"}),
    "takes memory step by step": (
        """x = []
while True: x.append(bytearray(1 << 20))""",
        {"memory"},
    ),
    "maps memory": (
        """import mmap
x = [mmap.mmap(-1, 1 << 26) for _ in range(100)]""",
        {"fail", "memory"},
    ),
    "forks without end": (
        """import os
while True:
    try: os.fork()
    except OSError: break
raise SystemExit(1)""",
        {"fail"},
    ),
    "starts threads without end": (
        """import _thread
while True: _thread.start_new_thread(input, ())""",
        {"fail"},
    ),
    "floods its output": ("while True: print('x' * 10000)", {"fail"}),
    "floods its error output": (
        """import sys
while True: sys.stderr.write('x' * 10000)""",
        {"fail"},
    ),
    "floods the channel": (
        r"""import os
for h in range(3, 64):
    try: os.write(h, b'["value",1]\n')
    except OSError: continue
    while True: os.write(h, b'["value",1]\n' * 99)""",
        {"fail"},
    ),
    "fills the disk with files": (
        """n = 0
while True:
    open(str(n), 'wb').write(bytes(100_000)); n += 1""",
        {"fail"},
    ),
    "fills the disk with empty files": (
        """n = 0
while True:
    open(str(n), 'wb').close(); n += 1""",
        {"fail"},
    ),
    "opens files without end": (
        """x = []
while True: x.append(open('/dev/null'))""",
        {"fail"},
    ),
    "overflows the stack": (
        """import sys; sys.setrecursionlimit(10 ** 9)
f = lambda x: [*map(f, [x])]
f(0)""",
        {"fail", "memory"},
    ),
    "crashes": ("import ctypes; ctypes.string_at(0)", {"fail"}),
    "aborts": ("import os; os.abort()", {"fail"}),
    "exits as if killed": ("import os; os._exit(137)", {"fail"}),
    "exits through the raw call as if killed": ("import ctypes; ctypes.CDLL(None).syscall(231, 137); raise SystemExit(1)", {"fail"}),
    "exits with an error": ("raise SystemExit(3)", {"fail"}),
    "sets off an alarm": (
        """import signal; signal.alarm(1)
while True: pass""",
        {"fail", "timeout"},
    ),
    "nests its source": (
        """(((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((())))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))""",
        {"fail", "memory"},
    ),
    "is no text": ("x = '\ud800'", {"fail"}),
}

_EQUAL = """
class Yes:
    def __eq__(self, other): return True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __bool__ = lambda self: True
"""

CHEATS = {
    "returns what equals everything": _EQUAL + "f = lambda x: Yes()",
    "returns a number that equals everything": """class N(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
f = lambda x: N(1)""",
    "returns a list of what equals everything": _EQUAL + "f = lambda x: [Yes()]",
    "returns text that equals everything": """class S(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
f = lambda x: S('')""",
    "exits well": "import sys; sys.exit(0)",
    "exits well at once": "import os; os._exit(0)",
    "exits well when called": """import os
f = lambda x: os._exit(0)""",
    "raises an exit when called": "def f(x): raise SystemExit(0)",
    "raises an assertion": "def f(x): raise AssertionError('passed')",
    "returns nothing": "f = lambda x: None",
    "returns not a number": "f = lambda x: float('nan')",
    "prints passes": "print('passed'); print('[\"pass\"]'); f = lambda x: None",
    "writes passes to every file": r"""import os
for h in range(3, 64):
    try: os.write(h, b'["pass"]\n' * 9)
    except OSError: pass
f = lambda x: None""",
    "writes values to every file": r"""import os
for h in range(3, 64):
    try: os.write(h, b'["value",true]\n' * 9)
    except OSError: pass
f = lambda x: None""",
    "writes rubbish to every file": r"""import os
for h in range(3, 64):
    try: os.write(h, b'\xff[[[\n"' * 9)
    except OSError: pass
f = lambda x: None""",
    "claims to be confined anew": r"""import os
for h in range(3, 64):
    try: os.write(h, b'["ready","bubblewrap"]\n')
    except OSError: pass
f = lambda x: None""",
    "claims a set whose hashes collide": """import os
f = lambda x: {k * (2 ** 61 - 1) for k in range(3000)}""",
    "claims deep nesting": r"""import os
for h in range(3, 64):
    try: os.write(h, b'["value",' + b'[' * 90000 + b'\n')
    except OSError: pass
f = lambda x: None""",
    "claims nesting that ends": r"""import os
for h in range(3, 64):
    try: os.write(h, b'["value",' + b'[' * 9000 + b']' * 9000 + b']\n')
    except OSError: pass
f = lambda x: None""",
    "claims errors without a word": r"""import os
for h in range(3, 64):
    try: os.write(h, b'["raised","",""]\n' * 9)
    except OSError: pass
f = lambda x: None""",
    "raises an error without a word": """def f(x): raise type('', (Exception,), {'__str__': lambda self: 1 / 0})()""",
    "is an error without a word": """raise type('', (Exception,), {'__str__': lambda self: 1 / 0})()""",
    "ends the test's loops": "def f(x): raise StopIteration",
    "returns a number of an object that is a line of the examiner's": r"""import json, os
line = json.dumps(["value", ["o", '0,"x"]],["d"]]\n["pass"]\n', "T"]]) + '\n'
def f(x):
    for h in range(3, 64):
        try: os.write(h, line.encode())
        except OSError: continue
        os.read(h, 1 << 16); os._exit(0)""",
    "returns a type's name that is no name": r"""import os
def f(x):
    for h in range(3, 64):
        try: os.write(h, b'["value",["o",0,["d"]]]\n')
        except OSError: continue
        os.read(h, 1 << 16); os._exit(0)""",
    "searches the frames": """import sys
def f(x):
    frame = sys._getframe(); found = []
    while frame:
        found += [v for v in frame.f_locals.values() if type(v) is int and v > 1000]; frame = frame.f_back
    return found[-1] if found else 0""",
    "searches all objects": """import gc
def f(x):
    found = [v for o in gc.get_objects() if type(o) in (list, tuple, dict)
             for v in (o.values() if type(o) is dict else o) if type(v) is int and 100000 < v < 900000]
    return found[0] if found else 0""",
    "searches the texts": r"""import gc, re
def f(x):
    texts = [str(o) for o in gc.get_objects() if type(o) in (list, tuple, dict)]
    found = [m for t in texts for m in re.findall(r'== (\d{6})', t)]
    return int(found[0]) if found else 0""",
    "searches the command line": r"""import sys
f = lambda x: int(next(iter(__import__('re').findall(r'\d{6}', str(sys.argv + sys.orig_argv))), 0))""",
    "patches assert": """import builtins
builtins.AssertionError = Exception
f = lambda x: None""",
    "patches the compiler": """import builtins
builtins.compile = lambda *a, **k: (lambda: None).__code__
builtins.exec = lambda *a: None
f = lambda x: None""",
    "patches eval": """import builtins
builtins.eval = lambda *a: True
f = lambda x: None""",
    "patches json": """import sys, json
json.dumps = lambda *a, **k: 'true'
sys.modules['json'] = sys
f = lambda x: None""",
    "patches the modules": """import sys
for name in list(sys.modules): sys.modules[name] = sys
f = lambda x: None""",
    "patches the messages": """import sys
for frame in [sys._getframe(n) for n in range(4)]:
    channel = frame.f_locals.get('channel')
    if channel: type(channel).send_raised = type(channel).send_value = lambda self, value: self.send('pass')
f = lambda x: None""",
    "replaces its main module": """import sys
sys.modules['__main__'].__dict__.clear()
f = lambda x: None""",
    "hooks exits": """import atexit, os
atexit.register(os._exit, 0)
f = lambda x: 1 / 0""",
    "does not compile": "def f(x) return 1",
    "defines nothing": "pass",
    "loops": """def f(x):
    while True: pass""",
    "takes memory": "f = lambda x: bytearray(1 << 34)",
    "returns too much": "f = lambda x: 'x' * (1 << 22)",
    "returns itself": """def f(x):
    x = []; x.append(x); return x""",
    "returns what cannot be read": """class D(dict):
    def __iter__(self): raise SystemExit(0)
    items = __iter__
f = lambda x: D(a=1)""",
    "has a bad name": """class E(Exception):
    def __str__(self): raise SystemExit(0)
def f(x): raise E""",
}
