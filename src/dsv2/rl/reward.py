"""Rewards: from rollouts to numbers, and the weighted sum of several (V2 section 4.2, eq 35-36).

A reward may have no score for a rollout: None, or NoScore with a reason, which is not 0. It has none if it could not tell (a sandbox that
did not start), if it raised, and if it said NaN. Such a rollout teaches nothing; a run says so once and counts it always.

A reward is not asked about a prompt that lacks what it judges by, such as tests: there it is no part of the sum. The answers of a group
have one prompt, so that all of them are judged by the same.

What is shown of a reward is what it said. What answers are compared by may be in deviations (reward_scale.py).

A reward scores whole answers, or the steps of answers, which process supervision pays one by one.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from dsv2.errors import CheckpointError, ConfigError, MissingExtra, did_you_mean
from dsv2.progress import say
from dsv2.rl.reward_scale import Scale, in_deviations
from dsv2.rl.steps import Steps

if TYPE_CHECKING:
    from dsv2.rl.rollout import Rollout

OVERLONG = "overlong"  # label of the penalty for long answers among the parts of a score; no reward's


@dataclass(frozen=True, slots=True)
class NoScore:
    """What a reward says of a rollout that it has no score for; None says the same without a reason.

    Args:
        reason: why, in a few words.
        failed: the reward raised, or what it said was no number. ``Rewards`` says so, never a reward.
    """

    reason: str = ""
    failed: bool = False


Reward = Callable[[Sequence["Rollout"]], Sequence[float | NoScore | None]]
StepReward = Callable[[Sequence["Rollout"]], Sequence[Steps | NoScore | None]]
Lacks = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class Part:
    """A reward in a sum.

    Args:
        label: its name in metrics.
        reward: one value for each rollout, in their order.
        weight: of it in the sum; 0: only shown.
        only_with: label of a reward without which (0 or less) this one is not paid.
        shuffled: deal its values out anew among the answers of a group.
        of_steps: it scores steps.
        scale: what it pays is counted in: its own unit, or deviations of it in the group or the batch; what is not paid, because of
            ``only_with``, counts as 0 there.
        right_or_wrong: its values are 1 and 0.
        lacks: an example -> what is missing there to be judged by, "" if nothing is; None: it can judge any.
        require: called before a run in which some prompt is judged; raises what keeps this machine from it. None: nothing could.
        own_solutions: examples -> for each why the solution that it holds would not be paid, "" if it would, None if nobody knows.
    """

    label: str
    reward: Reward | StepReward
    weight: float = 1.0
    only_with: str = ""
    shuffled: bool = False
    of_steps: bool = False
    scale: Scale = "none"
    right_or_wrong: bool = False
    lacks: Lacks | None = None
    require: Callable[[], None] | None = None
    own_solutions: Callable[[Sequence[Mapping[str, Any]]], Sequence[str | None]] | None = None

    def __str__(self) -> str:
        """Return it as a plan shows it."""
        scale = f" in deviations of the {self.scale}" if self.scale != "none" else ""
        gate = f", only with {self.only_with}" if self.only_with else ""
        return f"{self.label} x {self.weight:g}{scale}{gate}{', shuffled' if self.shuffled else ''}"


@dataclass(frozen=True, slots=True)
class Scores:
    """What rollouts earned.

    Args:
        total: the weighted sum, in which steps count with their mean; None where a part that counts has no score, or none was asked.
        compared: the same, each part counted in its ``scale``: what answers are compared by. None where ``total`` is.
        parts: each part's own values by label, unweighted, whether paid or not; of steps their mean. None where it has no score, and where
            it was not asked.
        failed: by label, for how many rollouts it raised or was no number.
        steps: what each step earned; empty unless a part that counts scores steps. Where steps of several parts end with the same token
            their scores add up; what is paid for a whole answer is paid with its last step. None where ``total`` is.
        asked: by label, whether it was asked about each rollout; a label that is not here: about all.
    """

    total: list[float | None]
    compared: list[float | None]
    parts: dict[str, list[float | None]]
    failed: dict[str, int] = field(default_factory=dict)
    steps: list[Steps | None] = field(default_factory=list)
    asked: dict[str, list[bool]] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> "Scores":
        """Return those of no rollouts."""
        return cls([], [], {})

    def __add__(self, other: "Scores") -> "Scores":
        """Join the scores of two lists of rollouts."""
        parts = {label: self.parts.get(label, []) + values for label, values in other.parts.items()}
        failed = {label: self.failed.get(label, 0) + other.failed.get(label, 0) for label in self.failed | other.failed}
        asked = {label: self.asked.get(label, []) + places for label, places in other.asked.items()}
        return Scores(self.total + other.total, self.compared + other.compared, parts, failed, self.steps + other.steps, asked)

    def of(self, place: int) -> dict[str, float | None]:
        """Return by label what the parts that were asked say of a rollout."""
        return {label: values[place] for label, values in self.parts.items() if label not in self.asked or self.asked[label][place]}

    def not_asked(self, label: str) -> int:
        """Return how many rollouts a part was not asked about."""
        return self.asked.get(label, []).count(False)

    def unscored(self, label: str) -> int:
        """Return for how many rollouts a part was asked and has no score."""
        return self.parts[label].count(None) - self.not_asked(label)

    def with_penalty(self, values: Sequence[float]) -> "Scores":
        """Return them with the penalty for long answers as one more part, paid in full."""
        total, compared = (
            [None if earned is None else earned + value for earned, value in zip(sums, values, strict=True)]
            for sums in (self.total, self.compared)
        )  # fmt: skip
        steps = [own and [*own[:-1], (own[-1][0], own[-1][1] + values[i])] for i, own in enumerate(self.steps)]
        return replace(self, total=total, compared=compared, parts=self.parts | {OVERLONG: list(values)}, steps=steps)


class Rewards:
    """The weighted sum of rewards.

    Args:
        parts: with labels of their own; a part paid only with another names it.

    Raises:
        ConfigError: no parts, a label twice, one that is not there, or the penalty's; an unknown scale; steps whose scores are to be
            shuffled or scaled.

    Attributes:
        parts: as given.
        labels: of the parts.
        step_labels: of those that score steps and are paid.
        reasons: by label, why a part had no score for a rollout, the first time that it had none.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        labels = [part.label for part in parts]
        if not any(part.weight for part in parts):
            raise ConfigError("no reward has a weight: there is nothing to learn from", hint='add [[reward]] with name = "answer"')
        for part in parts:
            if labels.count(part.label) > 1:
                raise ConfigError(f"two rewards are called {part.label!r}", hint="give one of them a label")
            if part.label == OVERLONG:
                raise ConfigError(f"a reward is called {OVERLONG!r}, as the penalty for long answers is", hint="give it another label")
            if part.only_with and part.only_with not in labels:
                hint = did_you_mean(part.only_with, labels)
                raise ConfigError(f"only_with = {part.only_with!r} of the reward {part.label!r} is none of {', '.join(labels)}", hint=hint)
            if part.shuffled and part.of_steps:
                raise ConfigError(f"the reward {part.label!r} scores steps, which other answers do not have", hint="leave shuffled out")
            if part.scale not in get_args(Scale):
                allowed = ", ".join(get_args(Scale))
                raise ConfigError(f"scale = {part.scale!r} of the reward {part.label!r} is none of {allowed}")
            if part.scale != "none" and part.of_steps:
                hint = "leave scale out: process supervision compares all steps of a group with each other"
                raise ConfigError(f"the reward {part.label!r} scores steps, and scale = {part.scale!r} counts whole answers", hint=hint)
        self.parts, self.reasons = tuple(parts), dict[str, str]()
        self.labels = tuple(labels)
        self.step_labels = tuple(part.label for part in parts if part.of_steps and part.weight)

    def score(self, rollouts: Sequence["Rollout"]) -> Scores:
        """Ask every reward, once for all rollouts that it can judge; one that raises is asked again for each rollout by itself."""
        each: list[dict[str, float | None]] = [{} for _ in rollouts]  # values of the parts that were asked
        steps: list[dict[str, Steps | None]] = [{} for _ in rollouts]
        failed = dict[str, int]()
        for part in self.parts:
            judged = [i for i, rollout in enumerate(rollouts) if not (part.lacks and part.lacks(rollout.example))]
            asked = [rollouts[i] for i in judged]
            said = _ask(part, asked) if asked else []
            failed[part.label] = self._tell(part.label, said)
            values = [None if isinstance(value, NoScore) else value for value in said]
            if part.of_steps:
                for i, own in zip(judged, values, strict=True):
                    steps[i][part.label] = own
                values = [None if own is None else sum(score for _, score in own) / len(own) for own in values]
            for i, value in zip(judged, _dealt_anew(values, asked) if part.shuffled else values, strict=True):
                each[i][part.label] = value
        pays = [self._pays(values) for values in each]
        scaled = self._scaled(pays, [rollout.group for rollout in rollouts])
        total, compared = [self._sum(own) for own in pays], [self._sum(own) for own in scaled]
        earned: list[Steps | None] = []
        if self.step_labels:
            lengths = [len(rollout.tokens) for rollout in rollouts]
            earned = [None if total[i] is None else self._steps(each[i], scaled[i], steps[i], length) for i, length in enumerate(lengths)]
        parts = {label: [values.get(label) for values in each] for label in self.labels}
        return Scores(total, compared, parts, failed, earned, {label: [label in values for values in each] for label in self.labels})

    def _pays(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        """Return by label what a rollout is paid for, of the parts that were asked, as was the one that they are paid with."""
        pays = dict[str, float | None]()
        for part in self.parts:
            if part.weight and {part.label, part.only_with or part.label} <= values.keys():
                gate = values[part.only_with] if part.only_with else 1.0
                pays[part.label] = None if gate is None else values[part.label] if gate > 0 else 0.0
        return pays

    def _scaled(self, pays: Sequence[Mapping[str, float | None]], groups: Sequence[int]) -> list[dict[str, float | None]]:
        """Return what rollouts are paid for, each part in its scale among the rollouts that it was asked about."""
        scaled = [dict(own) for own in pays]
        for part in self.parts:
            places = [i for i, own in enumerate(pays) if part.label in own] if part.scale != "none" else []
            found = in_deviations([pays[i][part.label] for i in places], [groups[i] for i in places], part.scale)
            for i, value in zip(places, found, strict=True):
                scaled[i][part.label] = value
        return scaled

    def _sum(self, pays: Mapping[str, float | None]) -> float | None:
        total = 0.0
        for part in self.parts:
            value = pays.get(part.label, 0.0)
            if value is None:
                return None
            total += part.weight * value
        return total if pays else None

    def _steps(
        self, values: Mapping[str, float | None], pays: Mapping[str, float | None], steps: Mapping[str, Steps | None], num_tokens: int
    ) -> Steps:
        """Return what each step of a rollout with a score earned; a step that is not paid, because of ``only_with``, is one of 0."""
        earned: dict[int, float] = {}
        whole = 0.0
        for part in self.parts:
            if part.label not in pays:
                continue
            if part.of_steps:
                paid = part.weight if not part.only_with or (values[part.only_with] or 0.0) > 0 else 0.0
                for end, score in steps[part.label] or ():
                    earned[end] = earned.get(end, 0.0) + paid * score
            else:
                whole += part.weight * (pays[part.label] or 0.0)
        last = max(earned, default=num_tokens - 1)
        earned[last] = earned.get(last, 0.0) + whole
        return sorted(earned.items())

    def _tell(self, label: str, said: Sequence[Any]) -> int:
        """Say the first time that a reward has no score for a rollout, and why; return how often it failed."""
        missing = [value for value in said if isinstance(value, NoScore)]
        if missing and label not in self.reasons:
            self.reasons[label] = next((value.reason for value in missing if value.reason), "it could not tell")
            say(f"reward {label!r}: no score for {len(missing)} of {len(said)} rollouts: {self.reasons[label]}")
        return sum(value.failed for value in missing)


def _ask(part: Part, rollouts: Sequence["Rollout"]) -> list[Any]:
    """Return a reward's values, numbers or steps, and NoScore where it has none."""
    try:
        values = part.reward(rollouts)
        if len(values) != len(rollouts):
            raise ValueError(f"{len(values)} values for {len(rollouts)} rollouts")
    except (CheckpointError, ConfigError, MissingExtra):  # no matter of these rollouts: without it, nothing would be learned
        raise
    except Exception as error:
        if len(rollouts) == 1:
            return [NoScore(f"{type(error).__name__}: {error}", failed=True)]
        return [value for rollout in rollouts for value in _ask(part, [rollout])]
    read = _read_steps if part.of_steps else _read_number
    return [_read(value, read, len(rollout.tokens)) for value, rollout in zip(values, rollouts, strict=True)]


def _read(value: Any, read: Callable[[Any, int], Any], num_tokens: int) -> Any:
    if value is None or isinstance(value, NoScore):
        return value or NoScore()
    try:
        return read(value, num_tokens)
    except (TypeError, ValueError) as error:
        return NoScore(str(error), failed=True)


def _read_number(value: Any, _num_tokens: int) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"its value is {number}")
    return number


def _read_steps(value: Any, num_tokens: int) -> Steps:
    steps = [(int(end), _read_number(score, num_tokens)) for end, score in value]
    ends = [end for end, _ in steps]
    if not ends or ends != sorted(set(ends)) or ends[0] < 0 or ends[-1] >= num_tokens:
        raise ValueError(f"its steps end at tokens {ends[:9]}; allowed are ascending ones from 0 to {num_tokens - 1}, at least one")
    return steps


def _dealt_anew(values: Sequence[float | None], rollouts: Sequence["Rollout"]) -> list[float | None]:
    """Return the values of each group in an order drawn by lot from its answers: the same whenever they are scored."""
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(i)
    dealt = list(values)
    for members in groups.values():
        order = random.Random(repr([tuple(rollouts[i].tokens) for i in members])).sample(members, len(members))
        for place, source in zip(members, order, strict=True):
            dealt[place] = values[source]
    return dealt
