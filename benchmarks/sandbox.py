"""How many programs a second are confined and graded, and what a run costs beyond the interpreter's own start.

    python benchmarks/sandbox.py [--seconds 10] [--workers 2]

The programs are of the kind that MBPP has: a function and three asserts. "bare" is the same interpreter started with nothing to do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from dsv2.tasks.code import Asserts, Check, Stdio, grade, grade_all
from dsv2.tasks.sandbox import run, strongest_level

PROGRAM = "def square(x):\n    return x * x\n"
FORMS = {
    "three asserts, parted": (PROGRAM, Asserts(tuple(f"assert square({x}) == {x * x}" for x in range(3)))),
    "three asserts, examined": (PROGRAM, Asserts(tuple(f"assert abs(square({x}) - {x * x}) < 1e-6" for x in range(3)))),
    "a check, examined": (PROGRAM, Check("def check(f):\n    for x in range(10): assert f(x) == x ** 2", "square")),
    "standard input and output": ("print(int(input()) ** 2)", Stdio((("12", "144"),))),
}


def bare() -> None:
    command = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-X", "utf8", "-c", "pass"]
    subprocess.run(command, env={}, stdin=subprocess.DEVNULL, check=True)


def milliseconds(call: object, rounds: int = 60) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()  # type: ignore[operator]
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3


def per_second(form: str, seconds: float, workers: int) -> float:
    program, tests = FORMS[form]
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        verdicts = grade_all([program] * 50, [tests] * 50, workers=workers)
        assert all(verdict.outcome == "pass" for verdict in verdicts), verdicts
        done += len(verdicts)
    return done / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each form")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start, confined = milliseconds(bare), milliseconds(lambda: run("pass"))
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, confinement {strongest_level()}",
        file=sys.stderr,
    )
    result = {
        "level": strongest_level(),
        "workers": options.workers,
        "bare_ms": round(start, 1),
        "confined_ms": round(confined, 1),
        "overhead_ms": round(confined - start, 1),
        "grade_ms": {form: round(milliseconds(lambda form=form: grade(*FORMS[form])), 1) for form in FORMS},
        "programs_per_second": {form: round(per_second(form, options.seconds, options.workers), 1) for form in FORMS},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
