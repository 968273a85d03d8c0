"""The native kernels compiled with sanitizers: nothing is read or written beyond its memory, nothing is undefined, no thread races another.

The kernels run in a process of their own (``exercise_kernels.py``), since the sanitizers' libraries must be loaded before everything else.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv2
from dsv2.kernels.cpu.build import VARIANTS, Unavailable, compiled, cpu_features, plan

pytestmark = pytest.mark.slow
HERE = [name for name, (needed, _) in VARIANTS.items() if needed <= cpu_features()]
MEMORY = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-fsanitize=address,undefined,float-cast-overflow")
THREADS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread")
REPORTS = {"read_beyond": "READ of size", "write_beyond": "WRITE of size", "overflow": "signed integer overflow"}


def exercise(
    variant: str, job: str, flags: tuple[str, ...], *libraries: str, command: tuple[str, ...] = (), seed: int = 0
) -> tuple[int, str]:
    """Run the program with these libraries loaded first; return its exit code and what it wrote to stderr."""
    try:
        build = plan(variant, flags)
        found = [runtime(build.compiler, library) for library in libraries]
        compiled(build)
    except Unavailable as reason:
        pytest.skip(f"no kernels with sanitizers: {reason}")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": str(Path(dsv2.__file__).parents[1]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    program = [*command, sys.executable, str(Path(__file__).with_name("exercise_kernels.py")), variant, job, str(seed), *flags]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def runtime(compiler: str, name: str) -> str:
    """Return the path of a library of the compiler's; skip where it has none."""
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} comes without {name}")
    return path


@pytest.mark.parametrize("variant", HERE)
def test_nothing_is_touched_beyond_its_memory_and_nothing_is_undefined(variant: str) -> None:
    code, said = exercise(variant, "all", MEMORY, "libasan.so", "libstdc++.so", seed=HERE.index(variant))
    assert (code, said) == (0, "")


@pytest.mark.parametrize("job", REPORTS)
def test_planted_faults_are_reported(job: str) -> None:
    code, said = exercise("plain", job, MEMORY, "libasan.so", "libstdc++.so")
    assert code != 0 and REPORTS[job] in said


def test_threads_of_a_step_do_not_race() -> None:
    setarch = shutil.which("setarch")
    command = (setarch, "-R") if setarch else ()  # the thread sanitizer finds its place in memory taken where addresses are random
    code, said = exercise("plain", "race", THREADS, "libtsan.so", "libstdc++.so", command=command)
    if "unexpected memory mapping" in said:
        pytest.skip("the thread sanitizer does not start here")
    assert code == 66 and "data race" in said  # it sees a race where there is one
    assert exercise("plain", "threads", THREADS, "libtsan.so", "libstdc++.so", command=command) == (0, "")
