"""No program breaks out, none is rewarded for what it did not do, and no failure of the machine counts as the program's."""

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from escapes import BOMBS, CHEATS, ESCAPES

from dsv2.tasks.cases import Asserts, Check
from dsv2.tasks.code import grade, grade_all
from dsv2.tasks.sandbox import LEVELS, REQUIRED, run, strongest_level
from dsv2.tasks.verdict import MIB, Limits, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")
SHORT = Limits(cpu_s=1, wall_s=2.0, memory_bytes=256 * MIB, scratch_bytes=2 * MIB)

# The same test in the two forms that differ in where it runs. The value is found nowhere but here.
FORMS = {
    "parted": Asserts(("assert f(3) == 271828",)),
    "examined": Asserts(("assert f(3) in (271828, 314159)",)),
    "check": Check("def check(candidate):\n    assert candidate(3) == 271828\n    assert not candidate(3) != 271828\n", "f"),
    "handed back": Asserts(("assert all(map(lambda x: f(f(x)) == 271828, (3,)))",)),
}


def settled(program: str) -> Verdict:
    """Run a program; again where the machine was too busy to judge it, as it may be with other tests beside."""
    verdict = run(program, limits=SHORT)
    for _ in range(5):
        if verdict.outcome != "infrastructure":
            break
        verdict = run(program, limits=SHORT)
    return verdict


@pytest.fixture
def outside(tmp_path):
    """A file that nobody may read or change, and a port that nobody may reach; both are looked at afterwards."""
    (tmp_path / "secret").write_text("unread")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        yield {"secret": str(tmp_path / "secret"), "folder": str(tmp_path), "parent": os.getpid(), "port": server.getsockname()[1]}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_text() == "unread"


def test_no_attempt_to_escape_succeeds(outside, tmp_path):
    mode = (tmp_path / "secret").stat().st_mode
    escaped, unsure = [], []
    for name, program in ESCAPES.items():
        verdict = settled(program.format(**outside))
        if "ESCAPED" in verdict.stdout:
            escaped.append(name)
        if verdict.outcome != "fail" or verdict.level not in LEVELS[LEVELS.index(REQUIRED) :]:
            unsure.append((name, verdict.outcome, verdict.detail))
    assert (escaped, unsure) == ([], [])
    assert (tmp_path / "secret").stat().st_mode == mode


def test_the_attempts_would_succeed_without_confinement(tmp_path):
    """Otherwise the test above could pass because its programs are broken."""
    harmless = [
        "reads /etc/passwd",
        "lists the root folder",
        "opens a UDP socket",
        "forks",
        "starts a thread",
        "starts a shell",
        "makes a folder",
        "keeps files that have no name",
        "keeps files that another took the name of",
        "makes a file without a name",
        "truncates what is open for reading",
        "keeps memory of which it maps a page",
        "fills the kernel's memory with locks",
        "makes itself wait for a processor",
        "hands its processor to whoever waits",
    ]
    for name in harmless:
        done = subprocess.run([sys.executable, "-c", ESCAPES[name]], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "ESCAPED" in done.stdout, name


def test_bombs_harm_only_themselves():
    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(BOMBS, pool.map(lambda bomb: settled(bomb[0]), BOMBS.values()), strict=True))
    assert {name: verdict for name, verdict in verdicts.items() if verdict.outcome not in BOMBS[name][1]} == {}
    assert all(verdict.score == 0.0 and len(verdict.stdout) <= SHORT.output_bytes for verdict in verdicts.values())


@pytest.mark.parametrize("form", FORMS)
def test_no_cheat_passes(form):
    verdicts = dict(zip(CHEATS, grade_all(list(CHEATS.values()), [FORMS[form]] * len(CHEATS), SHORT), strict=True))
    assert {
        name: verdict.detail for name, verdict in verdicts.items() if verdict.outcome in ("pass", "infrastructure") or verdict.passed
    } == {}
    assert grade("f = lambda x: 271828", FORMS[form], SHORT).outcome == "pass"


def leftovers() -> tuple[set[str], int]:
    """The scratch folders and the children of this process that are still there."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    children = sum(len(file.read_text().split()) for file in Path("/proc/self/task").glob("*/children"))
    return {path.name for path in folder.glob("dsv2-*")}, children


@pytest.mark.slow
def test_two_hundred_programs(outside):
    """Correct, wrong and malicious, two at a time; each gets what it earned."""
    before = leftovers()
    programs, tests, expected = [], [], []
    for number in range(40):
        test = Asserts(tuple(f"assert f({x}) == {x * number + 7}" for x in range(3)))
        right, wrong = f"def f(x):\n    return x * {number} + 7", f"def f(x):\n    return x * {number} + {8 + number % 3}"
        examined = Check("".join(f"def check(g):\n    for x in range(5): assert g(x) - 7 == x * {number}\n"), "f")
        programs += [right, wrong, right]
        tests += [test, test, examined]
        expected += ["pass", "fail", "pass"]
    malicious = (
        [program for program, _ in BOMBS.values()] + [program.format(**outside) for program in ESCAPES.values()] + [*CHEATS.values()]
    )
    verdicts = grade_all(programs + malicious, tests + [FORMS["parted"]] * len(malicious), SHORT)
    assert len(verdicts) >= 200
    assert [verdict.outcome for verdict in verdicts[: len(programs)]] == expected
    assert [(program, verdict) for program, verdict in zip(malicious, verdicts[len(programs) :], strict=True) if verdict.score != 0.0] == []
    assert not any(verdict.passed for verdict in verdicts[len(programs) :])
    assert leftovers() == before
    assert threading.active_count() < 10


def test_this_machine_confines_as_far_as_is_asked_for():
    assert strongest_level() in LEVELS[LEVELS.index(REQUIRED) :]
