"""Right or wrong, as far as it can be found out: answers by their ground truth, programs by their tests in the sandbox.

Rewards and preference data judge with the same functions. What cannot be found out is no outcome: NoScore, never 0.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsv2.errors import DataError
from dsv2.rl.reward import NoScore
from dsv2.tasks.verdict import Limits, Verdict

if TYPE_CHECKING:
    from dsv2.tasks.cases import Tests

Example = Mapping[str, Any]
Outcomes = list[float | NoScore]  # 1 right, 0 wrong

PROGRAM_LIMITS = Limits(scratch_bytes=0)  # what tests ask of a program needs no files


def by_answer(texts: Sequence[str], examples: Sequence[Example], *, exact: bool = False) -> Outcomes:
    """Judge answers by the "answer" of their examples; one without a final answer is wrong.

    Args:
        texts: answers.
        examples: one for each.
        exact: the last number, digit by digit, instead of what means the same.
    """
    from dsv2.tasks.answers import final_answer, same_answer
    from dsv2.tasks.arithmetic import final_number

    def right(text: str, example: Example) -> float | NoScore:
        if missing := lacks_answer(example):
            return NoScore(missing)
        truth = str(example["answer"])
        if exact:
            return float(final_number(text) == truth)
        given = final_answer(text)
        return float(given is not None and same_answer(given, truth))

    return [right(text, example) for text, example in zip(texts, examples, strict=True)]


def by_tests(texts: Sequence[str], examples: Sequence[Example], *, limits: Limits = PROGRAM_LIMITS) -> Outcomes:
    """Judge the programs in answers by the tests of their examples, several at once and equal ones once; an answer without one is wrong.

    Args:
        texts: answers.
        examples: one for each, with tests as ``tests_of`` reads them.
        limits: what a program may take for all of its tests together.
    """
    from dsv2.tasks.code import extract_code

    found: Outcomes = []
    written: dict[int, tuple[str, Tests]] = {}
    for place, (text, example) in enumerate(zip(texts, examples, strict=True)):
        missing = lacks_tests(example)
        found.append(NoScore(missing) if missing else 0.0)
        program = None if missing else extract_code(text)
        if program is not None:
            written[place] = program, tests_of(example)
    for place, verdict in _graded(written, limits).items():
        found[place] = NoScore(verdict.detail) if verdict.score is None else verdict.score
    return found


def solution_problems(examples: Sequence[Example], *, limits: Limits = PROGRAM_LIMITS) -> list[str | None]:
    """Return for each example why the solution that it holds fails its tests: "" if it passes; None: it has none, or nobody knows."""
    programs = {place: program for place, example in enumerate(examples) if (program := solution_of(example)) is not None}
    if not programs:
        return [None] * len(examples)
    verdicts = _graded({place: (program, tests_of(examples[place])) for place, program in programs.items()}, limits)
    found: list[str | None] = [None] * len(examples)
    for place, verdict in verdicts.items():
        if verdict.score is not None:
            found[place] = "" if verdict.score else f"{verdict.outcome}: {verdict.detail}"
    return found


def solution_of(example: Example) -> str | None:
    """Return the program that an example holds: HumanEval's "canonical_solution" behind its prompt, MBPP's "code", or a "solution"."""
    from dsv2.tasks.code import extract_code, is_python

    tests = example.get("tests")
    record = {**example, **(tests if isinstance(tests, Mapping) else {})}
    given = next((record[name] for name in ("canonical_solution", "code", "solution") if isinstance(record.get(name), str)), None)
    if given is None:
        return None
    program = given if is_python(given) else extract_code(given)
    entry = record.get("entry_point")
    if not isinstance(entry, str) or _defines(program, entry):
        return program
    asked = record.get("prompt") or example["messages"][-1]["content"]  # a row's prompt is its message
    begun = asked if is_python(asked) else extract_code(asked)
    whole = f"{begun}{given}"
    return whole if begun and is_python(whole) and _defines(whole, entry) else None


def _defines(program: str | None, name: str) -> bool:
    return bool(re.search(rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", program or "", re.MULTILINE))


def _graded(written: Mapping[int, tuple[str, "Tests"]], limits: Limits) -> dict[int, Verdict]:
    """Return what came of the program at each place with its tests; the same program with the same tests is run once."""
    from dsv2.tasks.code import grade_all

    distinct = list(dict.fromkeys(written.values()))
    graded = grade_all([program for program, _ in distinct], [tests for _, tests in distinct], limits)
    verdicts = dict(zip(distinct, graded, strict=True))
    return {place: verdicts[pair] for place, pair in written.items()}


def tests_of(example: Example) -> "Tests":
    """Return the tests of an example: those of its "tests", or its own fields, in a form of ``cases.read_tests``.

    Raises:
        DataError: it has none, or they are malformed.
    """
    from dsv2.tasks.cases import read_tests

    tests = example.get("tests")
    return read_tests(tests if isinstance(tests, Mapping) else example)


def lacks_answer(example: Example) -> str:
    """Return what keeps an example from being judged by its answer; "" if nothing does."""
    return "" if example.get("answer") is not None else 'it has no "answer"'


def lacks_tests(example: Example) -> str:
    """Return what keeps an example from being judged by its tests; "" if nothing does."""
    try:
        tests_of(example)
    except DataError as error:
        return error.message
    return ""
