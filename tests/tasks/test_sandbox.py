"""Programs run as they should, refusals are refusals of the machine, and nothing survives."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dsv2.errors import ConfigError
from dsv2.tasks import process, sandbox
from dsv2.tasks.inside import confine
from dsv2.tasks.process import Confined
from dsv2.tasks.sandbox import LEVELS, Limits, Verdict, run, strongest_level
from dsv2.tasks.syscalls import seccomp_filter
from dsv2.tasks.verdict import MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")
SOURCE = Path(sandbox.__file__).parents[2]  # of the package that is tested, which may be a copy


def test_a_program_reads_and_writes_and_fails_with_its_own_words():
    verdict = run("import sys\nprint('π', input())\nprint('warned', file=sys.stderr)", stdin="中文\n")
    assert (verdict.outcome, verdict.stdout, verdict.stderr, verdict.score) == ("pass", "π 中文\n", "warned\n", 1.0)
    assert 0 < verdict.cpu_s <= verdict.wall_s + 0.1
    failed = run("print('so far')\n1 / 0")
    assert (failed.outcome, failed.stdout, failed.detail, failed.score) == ("fail", "so far\n", "ZeroDivisionError: division by zero", 0.0)


def test_more_input_and_output_than_a_pipe_holds():
    text = "0123456789" * 30_000
    assert run("import sys\nsys.stdout.write(sys.stdin.read()[::-1])", stdin=text).stdout == text[::-1]
    assert run("pass", stdin=text).outcome == "pass"  # not reading it is no mistake


def test_python_s_own_library_works():
    modules = (
        "asyncio bisect collections csv dataclasses datetime decimal fractions functools hashlib heapq io itertools json math random re"
    )
    modules += " sqlite3 statistics string struct tempfile typing zlib zoneinfo"
    program = f"import {', '.join(modules.split())}\n" + textwrap.dedent("""
        @dataclasses.dataclass
        class Point: x: int = 1
        print(datetime.datetime.now(zoneinfo.ZoneInfo("Asia/Shanghai")).year > 2000, hashlib.sha256(b"x").hexdigest()[:4], Point())
        with open("notes", "w") as file: file.write("kept")
        print(open("notes").read(), random.random() < 1, __name__)
        """)
    assert run(program).stdout == "True 2d71 Point(x=1)\nkept True __main__\n"


def test_a_program_s_luck_does_not_change():
    """The order of a set of strings depends on the hash seed, which is always the same."""
    program = "print(list({str(n) for n in range(20)}))"
    assert run(program).stdout == run(program).stdout


def test_nothing_can_be_written_where_no_scratch_is_given():
    assert "Permission" in run("open('x', 'w')", limits=Limits(scratch_bytes=0)).detail


@pytest.mark.parametrize(
    ("name", "value"), [("cpu_s", 0), ("wall_s", 0.0), ("memory_bytes", MIB), ("open_files", 3), ("wall_s", float("nan"))]
)
def test_limits_that_no_program_can_live_with(name, value):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})


def test_an_unknown_level_is_named():
    with pytest.raises(ConfigError, match=r"'landlock'.*landlock\+seccomp"):
        run("pass", level="landlock")


# What an older kernel lacks, taken away from a process and its children: (system call, its first argument or None) -> ENOSYS.
WITHOUT = {"landlock": (444, None, "seccomp"), "seccomp": (157, 22, "rlimits")}
HOBBLED = """
import ctypes, struct, sys
number, argument, level = {missing!r}
block = [(0x20, 0, 0, 16), (0x15, 1, 0, argument), (6, 0, 0, 0x7fff0000)] if argument is not None else []
program = [(0x20, 0, 0, 0), (0x15, 0, len(block) + 1, number), *block, (6, 0, 0, 0x50026), (6, 0, 0, 0x7fff0000)]
code = b"".join(struct.pack("=HBBI", *line) for line in program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
from dsv2.tasks.sandbox import run
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(Filter(len(program), code)), 0, 0) == 0
strict, lenient = run("print(1)"), run("print(1)", level=level)
print([strict.outcome, strict.score, strict.stdout, strict.level, lenient.outcome, lenient.level, lenient.stdout], strict.detail)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("part", WITHOUT)
def test_without_a_part_of_the_confinement_nothing_runs_unless_asked_for(part):
    level = WITHOUT[part][2]
    done = subprocess.run(
        [sys.executable, "-c", HOBBLED.format(missing=WITHOUT[part])],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"['infrastructure', None, '', '', 'pass', '{level}', '1\\n'] confined only by '{level}'\n", done.stderr


def namespaces_can_be_made() -> bool:
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    return bool(shutil.which("bwrap")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not namespaces_can_be_made(), reason="bubblewrap is not here, or may not make namespaces")
def test_inside_bubblewrap_a_program_sees_neither_files_nor_processes_and_writes_to_its_folder(tmp_path):
    verdict = run(f"import os\nopen('x', 'w').write('kept')\nprint(open('x').read(), os.path.exists({str(tmp_path)!r}), os.getpid() < 9)")
    assert (verdict.outcome, verdict.stdout, verdict.level) == ("pass", "kept False True\n", LEVELS[-1])


@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid", "chown"])
def test_root_that_cannot_become_another_user_keeps_its_folder_and_loses_its_powers(monkeypatch, call):
    """As in bubblewrap, whose namespace has no other user."""
    done = []

    class Kernel:
        def prctl(self, *_):
            return 0

        def syscall(self, *_):
            done.append("capset")
            return 0

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    for name in ("setgroups", "setresgid", "setresuid", "chown"):
        monkeypatch.setattr(os, name, refuse if name == call else lambda *_, name=name: done.append(name))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(confine, "_ancestors", lambda _: [])  # the interpreter is anybody's to read
    monkeypatch.setattr(confine, "libc", Kernel())
    confine.give_up_privileges("/scratch")
    assert done[-1] == "capset"
    assert "chown" not in done


@pytest.mark.skipif(strongest_level() == LEVELS[-1], reason="bubblewrap is here")
def test_without_bubblewrap_its_level_is_refused():
    verdict = run("print(1)", level=LEVELS[-1])
    assert (verdict.outcome, verdict.stdout) == ("infrastructure", "")


def test_an_unknown_machine_has_no_filter():
    assert seccomp_filter("m68k") is None


def test_a_process_that_cannot_be_started_is_no_failure_of_the_program(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert run("print(1)").score is None


def children() -> list[int]:
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def test_no_huge_pages_which_the_limit_of_memory_would_not_count():
    before, verdicts = set(children()), []
    thread = threading.Thread(target=lambda: verdicts.append(run("print('here', flush=True)\nimport time\ntime.sleep(0.5)")))
    thread.start()
    enabled: set[str] = set()
    while thread.is_alive():
        for pid in set(children()) - before:
            with contextlib.suppress(OSError):  # it has ended
                status = Path(f"/proc/{process._innermost(pid)}/status").read_text()
                enabled |= {line for line in status.splitlines() if line.startswith("THP_enabled")}
        time.sleep(0.01)
    assert verdicts[0].outcome == "pass"
    assert "THP_enabled:\t0" in enabled


def test_a_process_killed_from_outside_is_no_failure_of_the_program():
    before, verdicts = set(children()), []
    thread = threading.Thread(target=lambda: verdicts.append(run("print('here', flush=True)\nwhile True: pass")))
    thread.start()
    deadline = time.monotonic() + 20
    while not (started := set(children()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(started.pop(), signal.SIGKILL)
    thread.join(20)
    verdict: Verdict = verdicts[0]
    assert (verdict.outcome, verdict.score) == ("infrastructure", None)


def test_a_program_that_got_no_processor_is_not_judged(monkeypatch):
    limits = Limits(wall_s=0.2)
    assert run("import time; time.sleep(9)", limits=limits).outcome == "timeout"
    monkeypatch.setattr(Confined, "_read_schedstat", lambda self: setattr(self, "waited_s", 0.15))
    assert run("import time; time.sleep(9)", limits=limits).outcome == "infrastructure"


@pytest.fixture
def wrapped(monkeypatch):
    """Programs run below two processes of a wrapper that reports signals as bubblewrap does."""
    command = ["/bin/sh", "-c", '/bin/sh -c \'"$@"; exit $?\' sh "$@"; exit $?', "sh"]
    monkeypatch.setattr(sandbox, "bubblewrap", lambda _: command)


def test_the_scheduler_is_asked_about_the_program_and_not_its_wrapper(wrapped, monkeypatch):
    innermost, seen = process._innermost, []
    monkeypatch.setattr(process, "_innermost", lambda pid: (seen.append(innermost(pid)), seen[-1])[1])
    assert run("import os\nprint(os.getpid())").stdout == f"{seen[0]}\n"


def test_a_wrapped_program_that_is_killed_while_it_sleeps_is_not_judged(wrapped):
    """By then more than its processor time has passed on the clock, which says nothing."""
    before, verdicts = set(children()), []
    thread = threading.Thread(target=lambda: verdicts.append(run("import time\ntime.sleep(9)", limits=Limits(cpu_s=1))))
    thread.start()
    time.sleep(1.5)
    os.kill(process._innermost((set(children()) - before).pop()), signal.SIGKILL)
    thread.join(20)
    assert (verdicts[0].outcome, verdicts[0].detail) == ("infrastructure", "killed from outside")


def test_a_wrapped_program_that_ignores_the_end_of_its_time_gets_no_more(wrapped):
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    verdict = run(program, limits=Limits(cpu_s=1))
    assert verdict.outcome == "timeout"
    assert verdict.cpu_s >= 1


def test_a_program_dies_with_the_process_that_judges_it():
    code = "from dsv2.tasks.sandbox import *\nprint(run('while True: pass', limits=Limits(cpu_s=60, wall_s=60.0)))"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.DEVNULL) as judge:
        deadline = time.monotonic() + 20
        while not (found := Path(f"/proc/{judge.pid}/task/{judge.pid}/children").read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.01)
        judge.kill()
    while Path(f"/proc/{found[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{found[0]}").exists()
