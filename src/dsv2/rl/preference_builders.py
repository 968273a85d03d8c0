"""Preference data out of outcomes: programs that a compiler and tests judge, answers that a ground truth judges (section 4.2).

Several outputs to one prompt are graded; outputs that came out differently make pairs, and each makes a point-wise judgement. What the
machine could not find out (an infrastructure outcome) is left out: it is no wrong answer.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dsv2.data.preferences import Answer, Preference
from dsv2.progress import read_metrics

Example = Mapping[str, Any]
# Texts of outputs and the example of each -> 1 right, 0 wrong, None unknown. All at once, so that a grader can work in parallel.
Grade = Callable[[Sequence[str], Sequence[Example]], Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Group:
    """Outputs to one prompt.

    Args:
        example: "messages", the prompt, and what the grader needs: "answer", or the fields of tests.
        outputs: texts.
    """

    example: Example
    outputs: tuple[str, ...]


@dataclass(slots=True)
class BuildReport:
    """What became of the outputs; grows while they are graded."""

    right: int = 0
    wrong: int = 0
    unknown: int = 0
    duplicates: int = 0
    groups_without_pairs: int = 0
    pairs: int = 0

    def line(self) -> str:
        """Return the report as a line of text."""
        return (
            f"{self.right:,} outputs right, {self.wrong:,} wrong, {self.unknown:,} unknown and left out, {self.duplicates:,} there before; "
            f"{self.pairs:,} pairs; {self.groups_without_pairs:,} groups all right or all wrong"
        )


def groups_of(rollouts: Path) -> list[Group]:
    """Return the groups of a GRPO run, out of its rollouts.jsonl: of each step and prompt the answers that ended by themselves.

    An answer that was cut is left out: the policy wrote no end, and a preference has one. Of runs with a tool the texts hold what the tool
    said; a model that is trained on them learns to write it itself.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    lines = (line for line in read_metrics(rollouts) if line["finish_reason"] == "stop")
    return [
        Group({**first["example"], "messages": first["prompt"]}, (first["text"], *(line["text"] for line in rest)))
        for _, (first, *rest) in groupby(lines, key=lambda line: (line["step"], line["group"]))
    ]


def by_tests(
    example_tests: Callable[[Example], Any] | None = None,
    grade: Callable[[Sequence[str], Sequence[Any]], Sequence[Any]] | None = None,
    *,
    workers: int | None = None,
) -> Grade:
    """Return a grader that runs the program of each output against the tests of its example.

    Args:
        example_tests: example -> tests; None: ``tasks.cases.read_tests`` of its field "tests", or of itself.
        grade: programs, the tests of each -> verdicts with ``outcome``; None: ``tasks.code.grade_all``, in the sandbox.
        workers: programs that run at once; None: one a processor.
    """
    from dsv2.tasks.cases import read_tests
    from dsv2.tasks.code import extract_code, grade_all

    at_once = workers or os.cpu_count() or 1
    run = grade or (lambda programs, tests: grade_all(programs, tests, workers=at_once))
    tests_of = example_tests or (lambda example: read_tests(example["tests"] if isinstance(example.get("tests"), Mapping) else example))

    def scored(outcome: str) -> float | None:
        return None if outcome == "infrastructure" else float(outcome == "pass")

    def judge(texts: Sequence[str], examples: Sequence[Example]) -> list[float | None]:
        programs = {place: program for place, text in enumerate(texts) if (program := extract_code(text)) is not None}
        verdicts = run(list(programs.values()), [tests_of(examples[place]) for place in programs])
        found: list[float | None] = [0.0] * len(texts)  # no program is wrong for sure
        for place, verdict in zip(programs, verdicts, strict=True):
            found[place] = scored(verdict.outcome)
        return found

    return judge


def by_answer(texts: Sequence[str], examples: Sequence[Example]) -> list[float | None]:
    """Grade outputs by the ground truth in the field "answer" of their examples; one without a final answer is wrong."""
    from dsv2.tasks.answers import final_answer, same_answer

    given = [final_answer(text) for text in texts]
    return [float(said is not None and same_answer(said, str(example["answer"]))) for said, example in zip(given, examples, strict=True)]


def build(
    groups: Sequence[Group], grade: Grade, *, domain: str, max_pairs: int = 4, seed: int = 0
) -> tuple[list[Preference], list[Preference], BuildReport]:
    """Grade the outputs of groups; return pairs, point-wise judgements, and what became of the outputs.

    Args:
        groups: prompts with several outputs each.
        grade: judges outputs.
        domain: name of the source, by which a recipe can weigh it.
        max_pairs: at most so many pairs of a group; an output is used again only when all of its side were.
        seed: of which right output meets which wrong one.
    """
    texts = [list(dict.fromkeys(group.outputs)) for group in groups]  # a text twice in a group is one piece of evidence
    asked = [(text, group.example) for group, own in zip(groups, texts, strict=True) for text in own]
    grades = iter(grade([text for text, _ in asked], [example for _, example in asked]))
    report, pairs, points = BuildReport(), [], []
    for number, (group, own) in enumerate(zip(groups, texts, strict=True)):
        place = f"{domain}, group {number}"
        report.duplicates += len(group.outputs) - len(own)
        judged = list(_judged(group, own, grades))
        report.unknown += len(own) - len(judged)
        points += [Preference((answer,), score, domain, place) for answer, score in judged]
        right, wrong = (
            _shuffled([answer for answer, score in judged if (score > 0.5) is good], f"{seed} {number} {good}") for good in (True, False)
        )
        report.right, report.wrong = report.right + len(right), report.wrong + len(wrong)
        made = min(max_pairs, max(len(right), len(wrong))) if right and wrong else 0
        report.groups_without_pairs += not made
        report.pairs += made
        pairs += [Preference((right[n % len(right)], wrong[n % len(wrong)]), None, domain, place) for n in range(made)]
    return pairs, points, report


def _judged(group: Group, texts: Sequence[str], grades: Iterator[float | None]) -> Iterator[tuple[Answer, float]]:
    """Yield the outputs whose outcome is known, as answers; takes as many grades as there are texts."""
    for text in texts:
        score = next(grades)
        if score is not None:
            yield Answer(tuple(group.example["messages"]), ({"role": "assistant", "content": text},)), score


def _shuffled(answers: list[Answer], seed: str) -> list[Answer]:
    """Return the answers in an order that the seed and their texts decide."""
    return sorted(answers, key=lambda answer: hashlib.blake2b(f"{seed} {answer.messages[-1]['content']}".encode()).digest())
