"""Rewards: from rollouts to numbers, and the weighted sum of several (V2 section 4.2, eq 35-36).

A reward may have no score for a rollout: None, which is not 0. It is None if the reward could not tell (no ground truth, a sandbox that did
not start), if it raised, and if it said NaN. Such a rollout teaches nothing; a run says so once and counts it always.

A reward scores whole answers, or the steps of answers, which process supervision pays one by one.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from dsv2.config import Section
from dsv2.errors import CheckpointError, ConfigError, MissingExtra, did_you_mean
from dsv2.progress import say
from dsv2.rl.steps import Steps, model_steps, worked_steps

if TYPE_CHECKING:
    from dsv2.rl.rollout import Rollout
    from dsv2.tasks.cases import Tests
    from dsv2.tokenizer.tokenizer import Tokenizer

Reward = Callable[[Sequence["Rollout"]], list[float | None]]
StepReward = Callable[[Sequence["Rollout"]], list[Steps | None]]
Name = Literal["answer", "format", "length", "code", "model", "steps"]

_OPTIONS: dict[str, set[str]] = {
    "answer": {"exact"},
    "format": {"pattern"},
    "length": {"least_tokens", "most_tokens"},
    "code": set(),
    "model": {"folder", "steps", "delimiter"},
    "steps": set(),
}


class RewardSection(Section):
    """One reward of a run."""

    name: Name = Field(
        description="what is rewarded: the right answer, a format, a length, code that passes its tests, a reward model's score, the right "
        "steps of a worked sum"
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
    steps: bool = Field(default=False, description="model: a score for each step, of the answer up to its end; for process supervision")
    delimiter: str = Field(default="\n", min_length=1, description="model: what ends a step")

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
        if "delimiter" in stated and not self.steps:
            raise ValueError(f"delimiter = {self.delimiter!r} ends steps, and a whole answer is scored: add steps = true")
        return self

    @property
    def shown_as(self) -> str:
        """Its name in metrics."""
        return self.label or self.name

    @property
    def of_steps(self) -> bool:
        """Whether it scores steps."""
        return self.steps or self.name == "steps"


@dataclass(frozen=True, slots=True)
class Part:
    """A reward in a sum; ``of_steps``: it scores steps. The other fields are those of ``RewardSection``."""

    label: str
    reward: Reward | StepReward
    weight: float = 1.0
    only_with: str = ""
    shuffled: bool = False
    of_steps: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """What rollouts earned.

    Args:
        total: the weighted sum, in which steps count with their mean; None where a part that counts has no score.
        parts: each part's own values by label, unweighted, whether paid or not; of steps their mean.
        failed: by label, for how many rollouts it raised or was no number.
        steps: what each step earned; empty unless a part that counts scores steps. Where steps of several parts end with the same token
            their scores add up; what is paid for a whole answer is paid with its last step. None where ``total`` is.
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failed: dict[str, int] = field(default_factory=dict)
    steps: list[Steps | None] = field(default_factory=list)

    @classmethod
    def empty(cls) -> "Scores":
        """Return those of no rollouts."""
        return cls([], {})

    def __add__(self, other: "Scores") -> "Scores":
        """Join the scores of two lists of rollouts."""
        parts = {label: self.parts.get(label, []) + values for label, values in other.parts.items()}
        failed = {label: self.failed.get(label, 0) + other.failed.get(label, 0) for label in self.failed | other.failed}
        return Scores(self.total + other.total, parts, failed, self.steps + other.steps)

    def with_part(self, label: str, values: Sequence[float]) -> "Scores":
        """Return them with one more part, paid in full."""
        total = [None if earned is None else earned + value for earned, value in zip(self.total, values, strict=True)]
        steps = [own and [*own[:-1], (own[-1][0], own[-1][1] + values[i])] for i, own in enumerate(self.steps)]
        return Scores(total, self.parts | {label: list(values)}, self.failed, steps)


class Rewards:
    """The weighted sum of rewards.

    Args:
        parts: with labels of their own; a part paid only with another names it.

    Raises:
        ConfigError: no parts, a label twice, or one that is not there; steps whose scores are to be shuffled.

    Attributes:
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
            if part.only_with and part.only_with not in labels:
                hint = did_you_mean(part.only_with, labels)
                raise ConfigError(f"only_with = {part.only_with!r} of the reward {part.label!r} is none of {', '.join(labels)}", hint=hint)
            if part.shuffled and part.of_steps:
                raise ConfigError(f"the reward {part.label!r} scores steps, which other answers do not have", hint="leave shuffled out")
        self._parts, self.reasons = tuple(parts), dict[str, str]()
        self.labels = tuple(labels)
        self.step_labels = tuple(part.label for part in parts if part.of_steps and part.weight)

    def score(self, rollouts: Sequence["Rollout"]) -> Scores:
        """Ask every reward, once for all rollouts; one that raises is asked again for each rollout by itself."""
        found: dict[str, list[float | None]] = {}
        steps: dict[str, list[Steps | None]] = {}
        failed: dict[str, int] = {}
        for part in self._parts:
            values, reasons = _ask(part, rollouts)
            failed[part.label] = len(reasons)
            self._tell(part.label, values, reasons)
            if part.of_steps:
                steps[part.label] = values
                values = [None if own is None else sum(score for _, score in own) / len(own) for own in values]
            found[part.label] = _dealt_anew(values, rollouts) if part.shuffled else values
        each = [{label: values[i] for label, values in found.items()} for i in range(len(rollouts))]
        total = [self._total(values) for values in each]
        earned: list[Steps | None] = []
        if self.step_labels:
            own = [{label: of_part[i] for label, of_part in steps.items()} for i in range(len(rollouts))]
            earned = [None if total[i] is None else self._steps(each[i], own[i], len(rollout.tokens)) for i, rollout in enumerate(rollouts)]
        return Scores(total, found, failed, earned)

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

    def _steps(self, values: Mapping[str, float | None], steps: Mapping[str, Steps | None], num_tokens: int) -> Steps:
        """Return what each step of a rollout with a score earned; a step that is not paid, because of ``only_with``, is one of 0."""
        earned: dict[int, float] = {}
        whole = 0.0
        for part in self._parts:
            if not part.weight:
                continue
            paid = part.weight if not part.only_with or (values[part.only_with] or 0.0) > 0 else 0.0
            if part.of_steps:
                for end, score in steps[part.label] or ():
                    earned[end] = earned.get(end, 0.0) + paid * score
            elif paid:
                whole += paid * (values[part.label] or 0.0)
        last = max(earned, default=num_tokens - 1)
        earned[last] = earned.get(last, 0.0) + whole
        return sorted(earned.items())

    def _tell(self, label: str, values: Sequence[float | Steps | None], reasons: Sequence[str]) -> None:
        """Say the first time that a reward has no score for a rollout, and why."""
        if None in values and label not in self.reasons:
            self.reasons[label] = reasons[0] if reasons else "it could not tell"
            say(f"reward {label!r}: no score for {values.count(None)} of {len(values)} rollouts: {self.reasons[label]}")


def open_rewards(sections: Sequence[RewardSection], tokenizer: "Tokenizer | None" = None, seq_len: int = 0) -> Rewards:
    """Make the rewards that a recipe names.

    Args:
        sections: of the recipe.
        tokenizer: of the policy; reward models must have the same. None: not compared.
        seq_len: tokens of the longest prompt with its answer; reward models must be able to read them.

    Raises:
        ConfigError: labels that clash or are missing; a reward model with another tokenizer, or a shorter context.
        CheckpointError: a reward model is missing or damaged.
    """
    makers: dict[str, Callable[[RewardSection], Reward | StepReward]] = {
        "answer": _answer, "format": _format, "length": _length, "code": lambda _: code_reward,
        "model": partial(_model, tokenizer, seq_len), "steps": lambda _: worked_steps,
    }  # fmt: skip
    return Rewards(
        [Part(part.shown_as, makers[part.name](part), part.weight, part.only_with, part.shuffled, part.of_steps) for part in sections]
    )


def code_reward(rollouts: Sequence["Rollout"]) -> list[float | None]:
    """Return 1 for a program that passes the tests of its example, 0 for one that does not or for none, None if it could not be run.

    The tests are those of the example's "tests", or of the example itself, in a form of ``cases.read_tests``.
    """
    from dsv2.tasks.code import extract_code, grade_all

    programs = [extract_code(rollout.text) for rollout in rollouts]
    written = [i for i, program in enumerate(programs) if program is not None]
    tests = [tests_of(rollout.example) for rollout in rollouts]
    verdicts = grade_all([programs[i] or "" for i in written], [tests[i] for i in written])
    scores: list[float | None] = [0.0] * len(rollouts)
    for i, verdict in zip(written, verdicts, strict=True):
        scores[i] = verdict.score
    return scores


def tests_of(example: Mapping[str, Any]) -> "Tests":
    """Return the tests of an example: those of its "tests", or its own fields.

    Raises:
        DataError: it has none, or they are malformed.
    """
    from dsv2.tasks.cases import read_tests

    tests = example.get("tests")
    return read_tests(tests if isinstance(tests, Mapping) else example)


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


def _model(tokenizer: "Tokenizer | None", seq_len: int, section: RewardSection) -> Reward | StepReward:
    """The reward model's score of prompt and answer, token for token; or of prompt and answer up to the end of each step."""
    from dsv2.rl.reward_model import OffloadedRewardModel

    model = OffloadedRewardModel(section.folder, tokenizer, seq_len)
    if section.steps:
        return partial(model_steps, model, section.delimiter)

    def score(rollouts: Sequence["Rollout"]) -> list[float | None]:
        return [*model.score([[*rollout.prompt_tokens, *rollout.tokens] for rollout in rollouts])]

    return score


def _ask(part: Part, rollouts: Sequence["Rollout"]) -> tuple[list[Any], list[str]]:
    """Return a reward's values, numbers or steps, and why it failed where it did."""
    try:
        values = part.reward(rollouts)
        if len(values) != len(rollouts):
            raise ValueError(f"{len(values)} values for {len(rollouts)} rollouts")
    except (CheckpointError, ConfigError, MissingExtra):  # no matter of these rollouts: without it, nothing would be learned
        raise
    except Exception as error:
        if len(rollouts) == 1:
            return [None], [f"{type(error).__name__}: {error}"]
        answers = [_ask(part, [rollout]) for rollout in rollouts]
        return [value for values, _ in answers for value in values], [reason for _, reasons in answers for reason in reasons]
    read, reasons = _read_steps if part.of_steps else _read_number, list[str]()
    found: list[Any] = []
    for value, rollout in zip(values, rollouts, strict=True):
        try:
            found.append(None if value is None else read(value, len(rollout.tokens)))
        except (TypeError, ValueError) as error:
            found.append(None)
            reasons.append(str(error))
    return found, reasons


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
