"""Preference data out of outcomes: programs that a compiler and tests judge, answers that a ground truth judges (section 4.2).

Several outputs to one prompt are graded, by ``outcomes.by_answer`` or ``by_tests`` or a function of your own. Outputs that came out
differently make pairs, and each makes a point-wise judgement. What could not be found out, because of the machine or of an example that
lacks what it takes, is left out: it is no wrong answer.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from dsv2.data.preferences import Answer, Preference
from dsv2.errors import DataError
from dsv2.metrics import stream_metrics
from dsv2.rl.outcomes import Example
from dsv2.rl.reward import NoScore

# Texts of outputs, the example of each -> 1 right, 0 wrong, NoScore or None unknown. All at once, so that a grader can work in parallel.
Grade = Callable[[Sequence[str], Sequence[Example]], Sequence[float | NoScore | None]]


@dataclass(frozen=True, slots=True)
class Group:
    """Outputs to one prompt.

    Args:
        example: "messages", the prompt, with its "tools" if it has some, and what the grader needs: "answer", or the fields of tests.
        outputs: texts.
    """

    example: Example
    outputs: tuple[str, ...]


@dataclass(slots=True)
class BuildReport:
    """What became of the outputs; grows while they are graded. ``reason``: why the first unknown one is unknown, if the grader says so."""

    right: int = 0
    wrong: int = 0
    unknown: int = 0
    reason: str = ""
    duplicates: int = 0
    groups_without_pairs: int = 0
    pairs: int = 0

    def line(self) -> str:
        """Return the report as a line of text."""
        unknown = f"{self.unknown:,} unknown and left out" + (f" ({self.reason})" if self.reason else "")
        return (
            f"{self.right:,} outputs right, {self.wrong:,} wrong, {unknown}, {self.duplicates:,} there before; "
            f"{self.pairs:,} pairs; {self.groups_without_pairs:,} groups all right or all wrong"
        )


def groups_of(rollouts: Path) -> list[Group]:
    """Return the groups of a GRPO run, out of its rollouts.jsonl: of each step and prompt the answers that ended by themselves.

    An answer that was cut is left out: the policy wrote no end, and a preference has one. Of runs with a tool the texts hold what the tool
    said; a model that is trained on them learns to write it itself.

    Raises:
        DataError: there is no such file, or it is damaged or none of rollouts.
    """
    groups = []
    for (step, _), answers in groupby(stream_metrics(rollouts), key=lambda line: (line["step"], line.get("group"))):
        first, *rest = answers
        if "example" not in first:  # it stands with a group's first answer, whether that was cut or not
            raise DataError(f"{rollouts} is no whole rollouts.jsonl: a group of step {step} begins without the example of its prompt")
        ended = tuple(answer["text"] for answer in (first, *rest) if answer["finish_reason"] == "stop")
        if ended:
            groups.append(Group({**first["example"], "messages": first["prompt"]}, ended))
    return groups


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
        judged = list(_judged(group, own, grades, report))
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


def _judged(
    group: Group, texts: Sequence[str], grades: Iterator[float | NoScore | None], report: BuildReport
) -> Iterator[tuple[Answer, float]]:
    """Yield the outputs whose outcome is known, as answers, and count the others; takes as many grades as there are texts."""
    prompt, tools = tuple(group.example["messages"]), tuple(group.example.get("tools") or ())
    for text in texts:
        score = next(grades)
        if score is None or isinstance(score, NoScore):
            report.unknown += 1
            report.reason = report.reason or (score.reason if score else "")
        else:
            yield Answer(prompt, ({"role": "assistant", "content": text},), tools), score


def _shuffled(answers: list[Answer], seed: str) -> list[Answer]:
    """Return the answers in an order that the seed and their texts decide."""
    return sorted(answers, key=lambda answer: hashlib.blake2b(f"{seed} {answer.messages[-1]['content']}".encode()).digest())
