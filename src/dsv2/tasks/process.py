"""One confined process as seen from outside: start it, feed it, read it within bounds, end it, and say what it died of."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from dsv2.tasks.channel import framed, parsed
from dsv2.tasks.inside import landlock
from dsv2.tasks.inside.confine import LEVELS
from dsv2.tasks.interpreter import ENVIRONMENT, command, own_code
from dsv2.tasks.scratch import folder_bytes
from dsv2.tasks.syscalls import seccomp_filter
from dsv2.tasks.verdict import Limits, Outcome

START_S = 30.0  # from start to confined: 0.02 on a machine that has time
_STDERR_KEPT = 4000
_LINE_EXTRA = 4096  # of a line on the channel beside its value
_WRAPPED = LEVELS[-1].removesuffix(LEVELS[-2])


class Confined:
    """A process that confines itself and then runs a job of `inside/launch.py`.

    Args:
        job: the role and its arguments.
        selector: is to watch all that the process may do; the data of a key is what to call.
        stdin: what it can read.
        limits: what it may take.
        level: the least confinement; a weaker one and the job is not sent.
        wrapper: the command that this process is started by, of bubblewrap; or empty.
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
        wrapper: Sequence[str],
        scratch: str,
    ) -> None:
        self.level = ""
        self.refusal = ""
        self.ready = False
        self.end = ""  # why we ended it, if we did
        self.waited_s = 0.0  # for a processor, when it was ended
        self._ran_s = 0.0  # when it was last looked at
        self.status: int | None = None
        self.cpu_s = 0.0
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._stderr_bytes = 0
        self._selector = selector
        self._limits = limits
        self._scratch = scratch
        self._wrapped = bool(wrapper)
        self._schedstat = -1  # no handle
        self._up = bytearray()
        self._held: list[object] = [job]
        rules = -1 if scratch else _library_rules()
        with contextlib.ExitStack() as stack:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            self._process = subprocess.Popen(
                [*wrapper, *command(theirs.fileno())],
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                pass_fds={theirs.fileno(), rules} - {-1},
                start_new_session=True,
                cwd="/",
            )
            self._channel = os.dup(ours.fileno())
        self._stdout, self._stderr, self._stdin_end = map(_taken, (self._process.stdout, self._process.stderr, self._process.stdin))
        self.started = self.ended = time.monotonic()
        self.deadline = self.started + START_S
        self._exit = os.pidfd_open(self._process.pid)
        self._handles = [handle for handle in (self._exit, self._channel, self._stdout, self._stderr, self._stdin_end) if handle >= 0]
        self._down = bytearray(own_code() + framed(self._asked(level, rules)))
        self._stdin = bytearray(stdin)
        self._register()

    def _asked(self, level: str, rules: int) -> dict[str, object]:
        """Return how the process is to confine itself: the second message down."""
        limits = self._limits
        return {
            "level": level,
            "outer_level": _WRAPPED if self._wrapped else "",
            "parent": 0 if self._wrapped else os.getpid(),
            "limits": (limits.cpu_s, limits.memory_bytes, max(limits.scratch_bytes, 1), limits.open_files),
            "output_bytes": limits.output_bytes,
            "scratch": self._scratch,
            "landlock": rules,
            "seccomp": seccomp_filter(os.uname().machine),
        }

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
        self._down += framed(message)
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
            message = parsed(line)
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
        self._open_schedstat()
        self.deadline = time.monotonic() + self._limits.wall_s
        for message in self._held:
            self.send(message)

    def check(self) -> None:
        """End the process if its time is over or its files are too large."""
        if self.status is not None:
            return
        late = not self.end and time.monotonic() >= self.deadline
        if late or self._wrapped:
            self._read_schedstat()
        if late:
            self.kill("time")
        if self._scratch and folder_bytes(self._scratch) > self._limits.scratch_bytes:
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

    def _open_schedstat(self) -> None:
        """Open what the scheduler says of the program: by the time that it is read, the program's number may be another's."""
        with contextlib.suppress(OSError):
            pid = _innermost(self._process.pid) if self._wrapped else self._process.pid
            self._schedstat = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY)
            self._handles.append(self._schedstat)

    def _read_schedstat(self) -> None:
        """See how long the program ran, and how long it stood ready to run and did not; no news where the system does not say."""
        with contextlib.suppress(OSError, ValueError):
            self._ran_s, self.waited_s = (int(nanoseconds) / 1e9 for nanoseconds in os.pread(self._schedstat, 64, 0).split()[:2])

    def _reap(self) -> None:
        if self.status is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever is left of its group, before its number can be another's
        _, status, usage = os.wait4(self._process.pid, 0)
        self.status = self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = max(usage.ru_utime + usage.ru_stime, self._ran_s)  # bubblewrap's usage leaves out the program's
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
            # the kernel's SIGKILL comes a second after the limit, so a look some time ago is enough
            if name == "SIGXCPU" or (name == "SIGKILL" and self.cpu_s >= limits.cpu_s):
                return "timeout", f"{limits.cpu_s} s of processor time were over"
            # a confined program can send itself no SIGKILL: syscalls.py refuses every call that could
            return ("infrastructure", "killed from outside") if name == "SIGKILL" else ("fail", f"killed by {name}")
        return None


@cache
def _library_rules() -> int:
    """Make the Landlock rules of all processes without a folder of their own once: they are some 200, and no process can change them."""
    return landlock.rule_set("")


def _taken(stream: IO[bytes] | None) -> int:
    """Return a handle of our own to a pipe, and close the stream; -1 without one."""
    if stream is None:
        return -1
    with stream:
        return os.dup(stream.fileno())


def _innermost(pid: int) -> int:
    """Return the process that a wrapper's process started, and that one's: at the end the program, which has none."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[-1])
    return pid
