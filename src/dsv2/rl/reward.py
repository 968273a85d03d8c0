"""Rewards: from rollouts to numbers, and the weighted sum of several (V2 section 4.2, eq 35-36).

A reward may have no score for a rollout: None, which is not 0. It is None if the reward could not tell (no ground truth, a sandbox that did
not start), if it raised, and if it said NaN. Such a rollout teaches nothing; a run says so once and counts it always.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from dsv2.config import Section
from dsv2.errors import ConfigError, did_you_mean
from dsv2.progress import say

if TYPE_CHECKING:
    from dsv2.rl.rollout import Rollout

Reward = Callable[[Sequence["Rollout"]], list[float | None]]
Name = Literal["answer", "format", "length", "code", "model"]

_OPTIONS: dict[str, set[str]] = {
    "answer": {"exact"},
    "format": {"pattern"},
    "length": {"least_tokens", "most_tokens"},
    "code": set(),
    "model": {"folder"},
}


class RewardSection(Section):
    """One reward of a run."""

    name: Name = Field(
        description="what is rewarded: the right answer, a format, a length, code that passes its tests, a reward model's score"
    )
    weight: float = Field(default=1.0, description="of it in the sum; 0: only shown")
    label: str = Field(default="", description="its name in metrics, and for only_with; absent: name")
    only_with: str = Field(default="", description="label of a reward without which (0 or less) this one is not paid")
    shuffled: bool = Field(
        default=False, description="deal its values out anew among the answers of a group: a control that must teach nothing"
    )
    exact: bool = Field(default=False, description="answer: the last number, digit by digit, instead of what means the same")
    pattern: str = Field(default="", description="format: regular expression that the whole answer must match; a dot matches line ends")
    least_tokens: int = Field(default=0, ge=0, description="length: 1 for answers from so many tokens ...")
    most_tokens: int = Field(default=0, ge=0, description="length: ... to so many, the end token included; else 0")
    folder: str = Field(default="", description="model: folder of the reward model")

    @model_validator(mode="after")
    def _fits(self) -> "RewardSection":
        fields = type(self).model_fields  # a recipe that is written out states defaults, too
        stated = {name for name in set().union(*_OPTIONS.values()) if getattr(self, name) != fields[name].default}
        for option in sorted(stated - _OPTIONS[self.name]):
            raise ValueError(
                f"{option} is no option of the reward {self.name!r}; it has {', '.join(sorted(_OPTIONS[self.name])) or 'none'}"
            )
        if self.name == "format":
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern = {self.pattern!r} is no regular expression: {error}") from error
            if not self.pattern:
                raise ValueError("the reward 'format' needs a pattern")
        if self.name == "length" and self.most_tokens < max(1, self.least_tokens):
            raise ValueError(f"least_tokens = {self.least_tokens} and most_tokens = {self.most_tokens} allow no answer")
        if self.name == "model" and not self.folder:
            raise ValueError("the reward 'model' needs a folder")
        return self

    @property
    def shown_as(self) -> str:
        """Its name in metrics."""
        return self.label or self.name


@dataclass(frozen=True, slots=True)
class Part:
    """A reward in a sum; the fields are those of ``RewardSection``."""

    label: str
    reward: Reward
    weight: float = 1.0
    only_with: str = ""
    shuffled: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """What rollouts earned.

    Args:
        total: the weighted sum; None where a part that counts has no score.
        parts: each part's own values by label, unweighted, whether paid or not.
        failed: by label, for how many rollouts it raised or was no number.
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failed: dict[str, int] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> "Scores":
        """Return those of no rollouts."""
        return cls([], {})

    def __add__(self, other: "Scores") -> "Scores":
        """Join the scores of two lists of rollouts."""
        parts = {label: self.parts.get(label, []) + values for label, values in other.parts.items()}
        failed = {label: self.failed.get(label, 0) + other.failed.get(label, 0) for label in self.failed | other.failed}
        return Scores(self.total + other.total, parts, failed)

    def with_part(self, label: str, values: Sequence[float]) -> "Scores":
        """Return them with one more part, paid in full."""
        total = [None if earned is None else earned + value for earned, value in zip(self.total, values, strict=True)]
        return Scores(total, self.parts | {label: list(values)}, self.failed)


class Rewards:
    """The weighted sum of rewards.

    Args:
        parts: with labels of their own; a part paid only with another names it.

    Raises:
        ConfigError: no parts, a label twice, or one that is not there.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        labels = [part.label for part in parts]
        if not any(part.weight for part in parts):
            raise ConfigError("no reward has a weight: there is nothing to learn from", hint='add [[reward]] with name = "answer"')
        for part in parts:
            if labels.count(part.label) > 1:
                raise ConfigError(f"two rewards are called {part.label!r}", hint="give one of them a label")
            if part.only_with and part.only_with not in labels:
                hint = did_you_mean(part.only_with, labels)
                raise ConfigError(f"only_with = {part.only_with!r} of the reward {part.label!r} is none of {', '.join(labels)}", hint=hint)
        self._parts, self._told = tuple(parts), set[str]()

    def score(self, rollouts: Sequence["Rollout"]) -> Scores:
        """Ask every reward, once for all rollouts; one that raises is asked again for each rollout by itself."""
        found: dict[str, list[float | None]] = {}
        failed: dict[str, int] = {}
        for part in self._parts:
            values, reasons = _ask(part.reward, rollouts)
            failed[part.label] = len(reasons)
            self._tell(part.label, values, reasons)
            found[part.label] = _dealt_anew(values, rollouts) if part.shuffled else values
        total = [self._total({label: values[i] for label, values in found.items()}) for i in range(len(rollouts))]
        return Scores(total, found, failed)

    def _total(self, values: Mapping[str, float | None]) -> float | None:
        total = 0.0
        for part in self._parts:
            if not part.weight:
                continue
            gate, value = values[part.only_with] if part.only_with else 1.0, values[part.label]
            if gate is None or (gate > 0 and value is None):
                return None
            total += part.weight * value if gate > 0 and value is not None else 0.0
        return total

    def _tell(self, label: str, values: Sequence[float | None], reasons: Sequence[str]) -> None:
        """Say the first time that a reward has no score for a rollout, and why."""
        if None in values and label not in self._told:
            self._told.add(label)
            why = reasons[0] if reasons else "it could not tell"
            say(f"reward {label!r}: no score for {values.count(None)} of {len(values)} rollouts: {why}")


def open_rewards(sections: Sequence[RewardSection]) -> Rewards:
    """Make the rewards that a recipe names.

    Raises:
        ConfigError: labels that clash or are missing.
    """
    makers: dict[str, Callable[[RewardSection], Reward]] = {
        "answer": _answer, "format": _format, "length": _length, "code": lambda _: code_reward, "model": _model,
    }  # fmt: skip
    return Rewards([Part(part.shown_as, makers[part.name](part), part.weight, part.only_with, part.shuffled) for part in sections])


def code_reward(rollouts: Sequence["Rollout"]) -> list[float | None]:
    """Return 1 for a program that passes the tests of its example, 0 for one that does not or for none, None if it could not be run.

    The tests are those of the example's "tests", or of the example itself, in a form of ``cases.read_tests``.
    """
    from dsv2.tasks.cases import read_tests
    from dsv2.tasks.code import extract_code, grade_all

    programs = [extract_code(rollout.text) for rollout in rollouts]
    written = [i for i, program in enumerate(programs) if program is not None]
    tests = [read_tests(_record(rollout.example)) for rollout in rollouts]
    verdicts = grade_all([programs[i] or "" for i in written], [tests[i] for i in written])
    scores: list[float | None] = [0.0] * len(rollouts)
    for i, verdict in zip(written, verdicts, strict=True):
        scores[i] = verdict.score
    return scores


def _answer(section: RewardSection) -> Reward:
    """1 if the final answer is that of the example, else 0; None if the example has none."""
    from dsv2.tasks.answers import final_answer, same_answer
    from dsv2.tasks.arithmetic import final_number

    def right(rollout: "Rollout") -> float | None:
        truth = rollout.example.get("answer")
        if truth is None:
            return None
        if section.exact:
            return float(final_number(rollout.text) == str(truth))
        given = final_answer(rollout.text)
        return float(given is not None and same_answer(given, str(truth)))

    return lambda rollouts: [right(rollout) for rollout in rollouts]


def _format(section: RewardSection) -> Reward:
    pattern = re.compile(section.pattern, re.DOTALL)
    return lambda rollouts: [float(pattern.fullmatch(rollout.text) is not None) for rollout in rollouts]


def _length(section: RewardSection) -> Reward:
    least, most = section.least_tokens, section.most_tokens
    return lambda rollouts: [float(least <= len(rollout.tokens) <= most) for rollout in rollouts]


def _model(section: RewardSection) -> Reward:
    """The reward model's score of prompt and answer, token for token; it is opened when it is first asked."""
    opened: list[Any] = []

    def score(rollouts: Sequence["Rollout"]) -> list[float | None]:
        if not opened:
            opened.append(import_module("dsv2.rl.reward_model").RewardModel.load(section.folder))
        values: list[float | None] = opened[0].score([[*rollout.prompt_tokens, *rollout.tokens] for rollout in rollouts])
        return values

    return score


def _record(example: Mapping[str, Any]) -> Mapping[str, Any]:
    tests = example.get("tests")
    return tests if isinstance(tests, Mapping) else example


def _ask(reward: Reward, rollouts: Sequence["Rollout"]) -> tuple[list[float | None], list[str]]:
    """Return a reward's values, and why it failed where it did."""
    try:
        values = reward(rollouts)
        if len(values) != len(rollouts):
            raise ValueError(f"{len(values)} values for {len(rollouts)} rollouts")
        reasons = [f"its value is {value}" for value in values if value is not None and not math.isfinite(value)]
    except Exception as error:
        if len(rollouts) == 1:
            return [None], [f"{type(error).__name__}: {error}"]
        answers = [_ask(reward, [rollout]) for rollout in rollouts]
        return [value for values, _ in answers for value in values], [reason for _, reasons in answers for reason in reasons]
    return [None if value is None or not math.isfinite(value) else float(value) for value in values], reasons


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
