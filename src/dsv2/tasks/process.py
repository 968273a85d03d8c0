"""One confined process as seen from outside: start it, feed it, read it within bounds, end it, and say what it died of."""

import contextlib
import json
import marshal
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, Any

from dsv2.tasks import inside
from dsv2.tasks.inside.confine import LEVELS
from dsv2.tasks.inside.wire import MAX_DEPTH
from dsv2.tasks.verdict import Limits, Outcome

# The modules of inside/ come compiled through the channel, before all else: to find and compile them took longer than the interpreter's
# start. The program does not see them.
_INSIDE = ("syscalls", "confine", "wire", "launch")  # each after those that it imports
_BOOT = """
import marshal, posix, sys
channel, package = int(sys.argv[1]), "dsv2.tasks.inside"
def receive(size):
    received = b""
    while len(received) < size:
        part = posix.read(channel, size - len(received))
        if not part:
            posix._exit(1)
        received += part
    return received
sys.modules[package] = inside = type(sys)(package)
for name, code in marshal.loads(receive(int.from_bytes(receive(4), "little"))):
    sys.modules[f"{package}.{name}"] = inside.__dict__[name] = type(sys)(f"{package}.{name}")
    exec(code, inside.__dict__[name].__dict__)
for name in [name for name in sys.modules if name.startswith(package)]:
    del sys.modules[name]
inside.launch.main(channel)
"""
# -P -s -S and an empty environment are the parts of isolated mode (-I), which would also ignore the hash seed: with a random one
# a program that depends on the order of a set would be rewarded by chance.
_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT)
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}

START_S = 30.0  # from start to confined: 0.02 on a machine that has time
_STDERR_KEPT = 4000
_POLL_S = 0.02  # how often the size of the scratch folder is looked at
_LINE_EXTRA = 4096  # of a line on the channel beside its value
_MOST_LAYERS = MAX_DEPTH + 3  # of lists in a line: the message, the value, a number in it


class Confined:
    """A process that confines itself and then runs a job of `inside/launch.py`.

    Args:
        job: the role and its arguments.
        selector: is to watch all that the process may do; the data of a key is what to call.
        stdin: what it can read.
        limits: what it may take.
        level: the least confinement; a weaker one and the job is not sent.
        wrapper: the level's prefix and the command that this process is started by.
        scratch: the folder it may write to, or "".

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        job: tuple[object, ...],
        selector: selectors.BaseSelector,
        *,
        stdin: bytes,
        limits: Limits,
        level: str,
        wrapper: tuple[str, Sequence[str]],
        scratch: str,
    ) -> None:
        self.level = ""
        self.refusal = ""
        self.ready = False
        self.end = ""  # why we ended it, if we did
        self.waited_s = 0.0  # for a processor, when it was ended
        self.status: int | None = None
        self.cpu_s = 0.0
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._stderr_bytes = 0
        self._selector = selector
        self._limits = limits
        self._scratch = scratch
        self._wrapped = bool(wrapper[1])
        self._up = bytearray()
        self._held: list[object] = [job]
        prefix, command = wrapper
        with contextlib.ExitStack() as stack:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            python = os.path.realpath(sys.executable)
            self._process = subprocess.Popen(
                [*command, python, *_FLAGS, str(theirs.fileno())],
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
            self._channel = os.dup(ours.fileno())
        self._stdout, self._stderr, self._stdin_end = map(_taken, (self._process.stdout, self._process.stderr, self._process.stdin))
        self.started = self.ended = time.monotonic()
        self.deadline = self.started + START_S
        self._exit = os.pidfd_open(self._process.pid)
        self._handles = [handle for handle in (self._exit, self._channel, self._stdout, self._stderr, self._stdin_end) if handle >= 0]
        settings = limits.cpu_s, limits.memory_bytes, max(limits.scratch_bytes, 1), limits.open_files
        begin = limits.output_bytes, level, 0 if command else os.getpid(), settings, scratch, prefix
        self._down = bytearray(_own_code() + _framed(begin))
        self._stdin = bytearray(stdin)
        self._register()

    def _register(self) -> None:
        self._watched: set[int] = set()
        self._watch(self._exit, self._reap)
        self._watch(self._stdout, self._read_stdout)
        self._watch(self._stderr, self._read_stderr)
        self._watch(self._channel, self._talk, write=True)
        if self._stdin_end >= 0:
            self._watch(self._stdin_end, self._feed, read=False, write=True)

    def _watch(self, handle: int, call: Callable[[], None], *, read: bool = True, write: bool = False) -> None:
        os.set_blocking(handle, False)
        self._selector.register(handle, selectors.EVENT_READ * read | selectors.EVENT_WRITE * write, call)
        self._watched.add(handle)

    def _unwatch(self, handle: int) -> None:
        if handle in self._watched:
            self._watched.remove(handle)
            self._selector.unregister(handle)

    def send(self, message: object) -> None:
        """Send a message of plain values down, once the process is confined and has its job."""
        if not self.ready:
            self._held.append(message)
            return
        self._down += _framed(message)
        if self._channel in self._watched:
            self._selector.modify(self._channel, selectors.EVENT_READ | selectors.EVENT_WRITE, self._talk)

    def lines(self) -> list[Any]:
        """Return what arrived on the channel since the last call, after the first message, which this class reads itself.

        What follows a line for which the process is ended is not read, here or later.
        """
        found: list[Any] = []
        while not self.end and (end := self._up.find(b"\n")) >= 0:
            line = bytes(self._up[:end])
            del self._up[: end + 1]
            message = _message(line)
            if message is None:
                self.kill("wrote nonsense to the channel")
            elif not self.level and not self.refusal:
                self._begin(*message)
            else:
                found.append(message)
        if len(self._up) > self._limits.output_bytes + _LINE_EXTRA:
            self.kill("output")
        return found

    def _begin(self, kind: str, said: str) -> None:
        """Take the first message, which comes from our own code before the program is sent."""
        if kind != "ready":
            self.refusal = said
            return
        self.level = said
        self.ready = True
        self.deadline = time.monotonic() + self._limits.wall_s
        for message in self._held:
            self.send(message)

    def check(self) -> None:
        """End the process if its time is over or its files are too large."""
        if self.status is None and not self.end and time.monotonic() >= self.deadline:
            self.waited_s = self._waited_for_a_processor()
            self.kill("time")
        if self.status is None and self._scratch and _folder_bytes(self._scratch) > self._limits.scratch_bytes:
            self.kill("disk")

    def kill(self, why: str) -> None:
        """End the process and all of its session; the first reason counts, also where it came to its own end before."""
        self.end = self.end or why
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process if need be, wait until it is gone, and close all ways to it."""
        if self.status is None:
            self.kill("stopped")
        self._reap()
        for handle in tuple(self._watched):
            self._unwatch(handle)
        for handle in self._handles:
            os.close(handle)

    def _waited_for_a_processor(self) -> float:
        """Return how many seconds the process stood ready to run and did not; 0 where the system does not say."""
        pid = str(self._process.pid)
        try:
            while self._wrapped and (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
                pid = children[-1]  # bubblewrap's, and that one's: at the end the program, which has none
            return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def _reap(self) -> None:
        if self.status is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever is left of its group, before its number can be another's
        _, status, usage = os.wait4(self._process.pid, 0)
        self.status = self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime
        self.ended = time.monotonic()
        if self._wrapped and self.status > 128:  # a wrapper reports signals as a shell does
            self.status = 128 - self.status
        self._unwatch(self._exit)
        for read in (self._talk, self._read_stdout, self._read_stderr):
            read()

    def _talk(self) -> None:
        if self._down and self.status is None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                del self._down[: os.write(self._channel, self._down[: 1 << 16])]
        if not self._down and self._channel in self._watched:
            self._selector.modify(self._channel, selectors.EVENT_READ, self._talk)
        self._read(self._channel, self._up)

    def _read_stdout(self) -> None:
        self._read(self._stdout, self.stdout)
        if len(self.stdout) > self._limits.output_bytes:
            del self.stdout[self._limits.output_bytes :]
            self.kill("output")

    def _read_stderr(self) -> None:
        before = len(self.stderr)
        self._read(self._stderr, self.stderr)
        self._stderr_bytes += len(self.stderr) - before
        del self.stderr[:-_STDERR_KEPT]
        if self._stderr_bytes > self._limits.output_bytes:
            self.kill("output")

    def _read(self, handle: int, into: bytearray) -> None:
        """Read what is there; a piece at a time while the process lives, so that a flood is noticed early."""
        while handle in self._watched:
            try:
                piece = os.read(handle, 1 << 16)
            except BlockingIOError:
                return
            except ConnectionResetError:
                piece = b""
            into += piece
            if not piece:
                self._unwatch(handle)
            if self.status is None or len(into) > self._limits.output_bytes + _LINE_EXTRA:
                return

    def _feed(self) -> None:
        try:
            del self._stdin[: os.write(self._stdin_end, self._stdin[: 1 << 16])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._stdin.clear()
        if not self._stdin:
            self._unwatch(self._stdin_end)
            os.close(self._stdin_end)
            self._handles.remove(self._stdin_end)

    def died_of(self) -> tuple[Outcome, str] | None:
        """Return outcome and detail of an end that says it all by itself; None for an exit, which may be good or bad."""
        limits = self._limits
        if self.refusal or not (self.ready or self.end == "stopped"):
            said = self.stderr[-300:].decode(errors="replace")
            return "infrastructure", f"confined only by {self.refusal!r}" if self.refusal else f"it did not start: {said}"
        if self.end == "time":
            if self.waited_s > limits.wall_s / 2:
                return "infrastructure", f"the machine is too busy: {self.waited_s:.1f} of {limits.wall_s} s it waited for a processor"
            return "timeout", f"{limits.wall_s} s on the clock were over"
        if self.end == "output":
            return "fail", f"it wrote more than {limits.output_bytes:,} bytes"
        if self.end == "disk":
            return "fail", f"its files took more than {limits.scratch_bytes:,} bytes"
        if self.end and self.end != "stopped":
            return "fail", f"it {self.end}"
        if self.status is not None and self.status < 0 and not self.end:
            name = signal.Signals(-self.status).name if -self.status in set(signal.Signals) else f"signal {-self.status}"
            # bubblewrap's usage leaves out the program's: the time on the clock, which is no less, stands for it
            used_s = self.ended - self.started if self._wrapped else self.cpu_s
            if name == "SIGXCPU" or (name == "SIGKILL" and used_s > limits.cpu_s - 0.1):
                return "timeout", f"{limits.cpu_s} s of processor time were over"
            # a confined program can send itself no SIGKILL: syscalls.py refuses every call that could
            return ("infrastructure", "killed from outside") if name == "SIGKILL" else ("fail", f"killed by {name}")
        return None


def _message(line: bytes) -> list[Any] | None:
    """Return a line's message; None if no process of ours writes such: no list that begins with a word, an object, or nested too deeply."""
    try:
        message = _JSON.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    layer = [message]
    for _ in range(_MOST_LAYERS):
        layer = [item for part in layer if isinstance(part, list) for item in part]
    return message if not layer and isinstance(message, list) and message and isinstance(message[0], str) else None


def _refuse_object(_: object) -> None:
    raise ValueError("objects of JSON are never written")


_JSON = json.JSONDecoder(object_hook=_refuse_object)


def _taken(stream: IO[bytes] | None) -> int:
    """Return a handle of our own to a pipe, and close the stream; -1 without one."""
    if stream is None:
        return -1
    with stream:
        return os.dup(stream.fileno())


def _framed(message: Any) -> bytes:
    content = marshal.dumps(message)
    return len(content).to_bytes(4, "little") + content


@cache
def _own_code() -> bytes:
    """Return the modules of inside/, compiled, as the first message down."""
    folder = resources.files(inside)
    return _framed([(name, compile((folder / f"{name}.py").read_text(), f"{name}.py", "exec", dont_inherit=True)) for name in _INSIDE])


def _folder_bytes(folder: str) -> int:
    """Return what the files of a flat folder take; each counts a block of 4 KiB at least, so that empty ones are not free."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return sum(max(entry.stat(follow_symlinks=False).st_size, 4096) for entry in entries)
    return 0


OnMessage = Callable[[list["Confined"], int, list[Any]], bool]


def drive(processes: list[Confined], selector: selectors.BaseSelector, on_message: OnMessage) -> None:
    """Let processes run until one ends or `on_message` says that it is enough.

    Args:
        processes: each just started.
        selector: watches them.
        on_message: gets the processes, the place of the one that sent a message, and the message (a list that begins with a word; what a
            program claims); returns True to stop.
    """
    enough = False
    while not enough:
        ended = any(process.status is not None for process in processes)
        wait_s = 0.0 if ended else max(min(process.deadline for process in processes) - time.monotonic(), 0.0)
        for key, _ in selector.select(min(wait_s, _POLL_S)):
            key.data()
        for place, process in enumerate(processes):
            for message in process.lines():
                enough = enough or on_message(processes, place, message)
                if process.end:  # what follows is not believed
                    break
            process.check()
        enough = enough or ended


def scratch_folder(limits: Limits) -> "contextlib.AbstractContextManager[str]":
    """Make a folder for one run and remove it afterwards; "" where nothing may be written.

    A confined program can make plain files in it and nothing else, so that removing it is one step deep.
    """
    if not limits.scratch_bytes:
        return contextlib.nullcontext("")
    return tempfile.TemporaryDirectory(prefix="dsv2-", ignore_cleanup_errors=True)


def bubblewrap(scratch: str) -> tuple[str, list[str]]:
    """Return the prefix of the level and the command that puts a process into namespaces of its own; both empty without bubblewrap."""
    program = shutil.which("bwrap")
    if program is None:
        return "", []
    command = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev", "--chdir", "/"]
    command += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"):
        command += ["--ro-bind-try", folder, folder]
    if scratch:
        command += ["--bind", scratch, scratch]
    return LEVELS[-1].removesuffix(LEVELS[-2]), [*command, "--"]
