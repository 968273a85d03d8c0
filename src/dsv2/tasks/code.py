"""Code as an answer: take the program out of a chat answer, run it against tests, score it. Serves reward and evaluation alike."""

import os
import re
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsv2.errors import DataError
from dsv2.tasks.cases import Asserts, Calls, Check, Examination, Stdio, Tests, plan
from dsv2.tasks.observed import equals
from dsv2.tasks.process import Confined
from dsv2.tasks.sandbox import REQUIRED, converse, run, verdict_of
from dsv2.tasks.verdict import Limits, Outcome, Verdict

__all__ = ["Asserts", "Check", "Stdio", "Tests", "extract_code", "grade", "grade_all", "is_python"]

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "python3", "py")
_DEFAULT = Limits(scratch_bytes=0)  # what is asked of them needs no files


def extract_code(answer: str) -> str | None:
    """Return the program of a chat answer: its last fenced block of Python; an unclosed last one counts.

    Where none is called Python, it is the last of those of no named language: beside one that is, they are mostly what the program prints.
    An answer without a fence is taken whole if it compiles. None means that there is no program in it.
    """
    blocks = [(language.lower(), code) for _, language, code in _FENCE.findall(answer)]
    programs = [code for language, code in blocks if language in _PYTHON] or [code for language, code in blocks if not language]
    if programs:
        return str(programs[-1])
    return None if "```" in answer or not answer.strip() or not is_python(answer) else answer


def is_python(text: str) -> bool:
    """Tell whether a text is Python as it stands; it is parsed, not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" in what a model wrote
            compile(text, "answer", "exec", flags=0x400)  # ast.PyCF_ONLY_AST
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def grade(program: str, tests: Tests, limits: Limits = _DEFAULT, *, level: str = REQUIRED) -> Verdict:
    """Run a program against tests whose expected values it never sees.

    Args:
        program: Python source, for HumanEval the prompt and its completion.
        tests: see `cases.read_tests`.
        limits: what the program may take, for all its tests together; Stdio tests are a run each. Files only where they allow some.
        level: the least confinement, as for `sandbox.run`.

    Returns:
        pass if it passed every test. Tests that are no Python are an infrastructure outcome: they say nothing about the program.

    Raises:
        ConfigError: no such level.
    """
    if isinstance(tests, Stdio):
        return _grade_runs(program, tests, limits, level)
    begun = time.monotonic()
    try:
        planned = plan(tests)
        if isinstance(planned, Calls):
            return _grade_calls(program, planned, limits, level, begun)
        return _grade_examined(program, planned, limits, level, begun)
    except DataError as error:
        return Verdict("infrastructure", error.message)
    except OSError as error:
        return Verdict("infrastructure", f"no process could be started: {error}")


def grade_all(
    programs: Sequence[str], tests: Sequence[Tests], limits: Limits = _DEFAULT, *, level: str = REQUIRED, workers: int | None = None
) -> list[Verdict]:
    """Grade programs in parallel, by default as many at a time as this process has processors; the verdicts come in their order."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda pair: grade(pair[0], pair[1], limits, level=level), zip(programs, tests, strict=True)))


def _grade_runs(program: str, tests: Stdio, limits: Limits, level: str) -> Verdict:
    """Run the program once per pair until one fails."""
    passed, cpu_s, wall_s = 0, 0.0, 0.0
    verdict = Verdict("infrastructure", "no tests")
    for stdin, expected in tests.pairs:
        verdict = run(program, stdin=stdin, limits=limits, level=level)
        cpu_s, wall_s = cpu_s + verdict.cpu_s, wall_s + verdict.wall_s
        outcome, detail = verdict.outcome, verdict.detail
        if outcome == "pass" and _lines(verdict.stdout) != _lines(expected):
            outcome, detail = "fail", f"test {passed + 1}: the output {verdict.stdout[:100]!r} is not the expected one"
        passed += outcome == "pass"
        verdict = Verdict(outcome, detail, passed, len(tests.pairs), verdict.stdout, verdict.stderr, cpu_s, wall_s, verdict.level)
        if outcome != "pass":
            break
    return verdict


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.rstrip().splitlines()]


def _grade_calls(program: str, planned: Calls, limits: Limits, level: str, begun: float) -> Verdict:
    results: list[str | None] = []

    def on_message(_: list[Confined], __: int, message: list[Any]) -> bool:
        results.append(_result_of(message, planned.calls[len(results)].expected))  # at once: what they return is not kept
        return len(results) == len(planned.calls)

    job = ("functions", program, planned.setup, [call.expression for call in planned.calls])
    (process,) = converse([job], on_message, limits=limits, level=level)
    missing = len(planned.calls) - len(results)
    results += ["the program ended before this test"] * missing
    return _verdict(process, begun, results, as_one=planned.as_one)


def _result_of(answer: list[Any], expected: Any) -> str | None:
    """Return None for a passed test, else what is wrong, which may be "": an exception can have no name and say nothing."""
    match answer:
        case ["value", seen] if equals(seen, expected):
            return None
        case ["value", seen]:
            return f"{str(seen)[:100]} is not what was expected"
        case ["raised", str(name), str(said)]:
            return f"MemoryError: {said}" if name == "MemoryError" else said
    return "no answer"


def _verdict(process: Confined, begun: float, results: list[str | None], *, as_one: bool) -> Verdict:
    wrong = [(number, result) for number, result in enumerate(results, 1) if result is not None]
    outcome: Outcome = "memory" if any(result.startswith("MemoryError") for _, result in wrong) else "fail" if wrong else "pass"
    detail = f"test {wrong[0][0]}: {wrong[0][1]}" if wrong else ""
    passed, total = (int(not wrong), 1) if as_one else (len(results) - len(wrong), len(results))
    return verdict_of(process, begun, outcome, detail, passed=passed, total=total)


def _grade_examined(program: str, planned: Examination, limits: Limits, level: str, begun: float) -> Verdict:
    """Let an examiner call the program's functions. What decides is what the examiner says, to which no program can write."""
    results: list[str | None] = []
    notes: dict[str, str] = {}  # "asked": a call waits for its answer; "undefined", "broken": why there are no results

    def on_message(processes: list[Confined], place: int, message: list[Any]) -> bool:
        examiner, served = processes
        match ("examiner", "served")[place], *message:
            case ["examiner", *_] if "asked" in notes:
                examiner.kill("spoke while it waited for an answer")
            case ["examiner", "call", *call]:
                notes["asked"] = ""
                served.send(tuple(call))
            case ["examiner", "pass"]:
                results.append(None)
            case ["examiner", "fail", str(said)]:
                results.append(said)
            case ["examiner", "broken", str(said)] if not results:
                notes["broken"] = said
            case ["examiner", *_]:
                examiner.kill("said what no examiner says")
            case ["served", "defined"] if "defined" not in notes:
                notes["defined"] = ""
            case ["served", "raised", _, str(said)] if "asked" not in notes:
                notes["undefined"] = said
            case _ if notes.pop("asked", None) is not None:
                examiner.send(tuple(message))
            case _:
                served.kill("answered without being asked")
        return "broken" in notes or "undefined" in notes or len(results) == len(planned.statements)

    jobs = [("examiner", planned.setup, list(planned.statements), list(planned.names), planned.entry_point), ("served", program)]
    examiner, served = converse(jobs, on_message, limits=limits, level=level)
    if "broken" in notes:
        return Verdict("infrastructure", f"the tests do not run: {notes['broken']}", level=examiner.level)
    missing = len(planned.statements) - len(results)
    if missing and (died := served.died_of() or examiner.died_of()):
        total, passed = len(planned.statements), results.count(None)
        return verdict_of(served if served.died_of() else examiner, begun, *died, passed=passed, total=total)
    results += [notes.get("undefined", "the program ended before this test")] * missing
    return _verdict(served, begun, results, as_one=False)
