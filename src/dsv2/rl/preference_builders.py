"""Preference data out of outcomes: programs that a compiler and tests judge, answers that a ground truth judges (section 4.2).

Several outputs to one prompt are graded; outputs that came out differently make pairs, and each makes a point-wise judgement. What the
machine could not find out (an infrastructure outcome) is left out: it is no wrong answer.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2.data.preferences import Answer, Preference

Grade = Callable[[str, Mapping[str, Any]], float | None]  # an output's text and its example -> 1 right, 0 wrong, None unknown


@dataclass(frozen=True, slots=True)
class Group:
    """Outputs to one prompt.

    Args:
        example: "messages", the prompt, and what the grader needs: "answer", or the fields of tests.
        outputs: texts.
    """

    example: Mapping[str, Any]
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


def by_tests(example_tests: Callable[[Mapping[str, Any]], Any] | None = None, grade: Callable[[str, Any], Any] | None = None) -> Grade:
    """Return a grader that runs the program of an output against the tests of its example.

    Args:
        example_tests: example -> tests; None: ``tasks.cases.read_tests``.
        grade: program, tests -> a verdict with ``outcome``; None: ``tasks.code.grade``, in the sandbox.
    """
    from dsv2.tasks.cases import read_tests
    from dsv2.tasks.code import extract_code
    from dsv2.tasks.code import grade as run_tests

    tests_of, run = example_tests or read_tests, grade or run_tests

    def judge(text: str, example: Mapping[str, Any]) -> float | None:
        program = extract_code(text)
        if program is None:
            return 0.0  # no program is wrong for sure
        outcome = run(program, tests_of(example)).outcome
        return None if outcome == "infrastructure" else float(outcome == "pass")

    return judge


def by_answer(text: str, example: Mapping[str, Any]) -> float | None:
    """Grade an output by the ground truth in its example's field "answer"; without a final answer it is wrong."""
    from dsv2.tasks.answers import final_answer, same_answer

    given = final_answer(text)
    return float(given is not None and same_answer(given, str(example["answer"])))


def build(
    groups: Sequence[Group], grade: Grade, *, domain: str, max_pairs: int = 4, seed: int = 0
) -> tuple[list[Preference], list[Preference], BuildReport]:
    """Grade the outputs of groups; return pairs, point-wise judgements, and what became of the outputs.

    Args:
        groups: prompts with several outputs each.
        grade: judges an output.
        domain: name of the source, by which a recipe can weigh it.
        max_pairs: at most so many pairs of a group; an output is used again only when all of its side were.
        seed: of which right output meets which wrong one.
    """
    report, pairs, points = BuildReport(), [], []
    for number, group in enumerate(groups):
        place = f"{domain}, group {number}"
        sides: dict[float, list[Answer]] = {1.0: [], 0.0: []}
        texts = dict.fromkeys(group.outputs)  # a text twice in a group is one piece of evidence
        report.duplicates += len(group.outputs) - len(texts)
        for text in texts:
            score = grade(text, group.example)
            if score is None:
                report.unknown += 1
                continue
            answer = Answer(tuple(group.example["messages"]), ({"role": "assistant", "content": text},))
            sides[1.0 if score > 0.5 else 0.0].append(answer)
            points.append(Preference((answer,), score, domain, place))
        right, wrong = (_shuffled(sides[side], f"{seed} {number} {side}") for side in (1.0, 0.0))
        report.right, report.wrong = report.right + len(right), report.wrong + len(wrong)
        made = min(max_pairs, max(len(right), len(wrong))) if right and wrong else 0
        report.groups_without_pairs += not made
        report.pairs += made
        pairs += [Preference((right[n % len(right)], wrong[n % len(wrong)]), None, domain, place) for n in range(made)]
    return pairs, points, report


def _shuffled(answers: list[Answer], seed: str) -> list[Answer]:
    """Return the answers in an order that the seed and their texts decide."""
    return sorted(answers, key=lambda answer: hashlib.blake2b(f"{seed} {answer.messages[-1]['content']}".encode()).digest())
