"""Steps of an answer: cut where its text says so, placed in its tokens as they were drawn, and what they are worth (DeepSeekMath 4.1.3).

What a step is worth is for process supervision, which credits each token with the steps that it is part of or comes before.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsv2.tasks.arithmetic import STEP_SEPARATOR, final_number, holds

if TYPE_CHECKING:
    from dsv2.rl.reward_model import OffloadedRewardModel
    from dsv2.rl.rollout import Rollout

Steps = list[tuple[int, float]]  # of an answer: the index of each step's last token, ascending, and the step's score


@dataclass(frozen=True, slots=True)
class Step:
    """A part of an answer.

    Args:
        end: index, among the answer's tokens, of the one that completes its separator; for the last step, of the answer's last.
        text: what it says, without its separator.
    """

    end: int
    text: str


def cut(rollout: "Rollout", separator: re.Pattern[str]) -> list[Step]:
    """Return an answer's steps, at least one. What is blank is no step of its own; steps that end within one token are one step."""
    text, last = rollout.text, len(rollout.tokens) - 1
    borders = [(match.start(), match.end()) for match in separator.finditer(text)] + [(len(text), len(text))]
    spans: dict[int, tuple[int, int]] = {}
    begin = 0
    for stop, behind in borders:
        if text[begin:stop].strip():
            end = min(bisect_right(rollout.text_ends, behind - 1), last)
            spans[end] = (spans[end][0] if end in spans else begin, stop)
            begin = behind
    steps = [Step(end, text[start:stop]) for end, (start, stop) in spans.items()] or [Step(last, text)]
    return [*steps[:-1], replace(steps[-1], end=last)]  # it takes along what follows it: blanks, the end token


def worked_steps(rollouts: Sequence["Rollout"]) -> list[Steps | None]:
    """Score the steps of worked sums: 1 for one that holds as it stands, 1 for the last if its last number is the example's "answer".

    Whether a step that holds is one that the sum needs, is not looked at. None where nobody knows the answer.
    """
    return [_worked(rollout) for rollout in rollouts]


def _worked(rollout: "Rollout") -> Steps | None:
    truth = rollout.example.get("answer")
    if truth is None:
        return None
    *before, last = cut(rollout, STEP_SEPARATOR)
    return [*((step.end, float(holds(step.text))) for step in before), (last.end, float(final_number(last.text) == str(truth)))]


def model_steps(model: "OffloadedRewardModel", delimiter: str, rollouts: Sequence["Rollout"]) -> list[Steps | None]:
    """Score prompt and answer up to the end of each step with a reward model, token for token."""
    separator = re.compile(re.escape(delimiter))
    ends = [[step.end for step in cut(rollout, separator)] for rollout in rollouts]
    scores = model.score_steps(
        [[*rollout.prompt_tokens, *rollout.tokens] for rollout in rollouts],
        [[len(rollout.prompt_tokens) + end for end in own] for rollout, own in zip(rollouts, ends, strict=True)],
    )
    return [list(zip(own, found, strict=True)) for own, found in zip(ends, scores, strict=True)]
