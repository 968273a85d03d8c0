"""The rewards that a recipe can name: what each pays, its options, and what an example needs to be judged by it.

``KINDS`` is the one place that knows them. A reward is added with a line there, and with its options as fields of ``RewardSection``.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, field_validator, model_validator

from dsv2.config import Section
from dsv2.errors import ConfigError, did_you_mean
from dsv2.rl.outcomes import PROGRAM_LIMITS, Example, by_answer, by_tests, lacks_answer, lacks_tests, solution_problems
from dsv2.rl.reward import Lacks, Part, Reward, Rewards, StepReward
from dsv2.rl.reward_file import function_of
from dsv2.rl.reward_scale import Scale
from dsv2.rl.steps import model_steps, worked_steps
from dsv2.tasks.verdict import MIB, Limits

if TYPE_CHECKING:
    from dsv2.rl.rollout import Rollout
    from dsv2.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")


class RewardSection(Section):
    """One reward of a run."""

    name: str = Field(
        description="what is rewarded: the right answer, a format, a length, code that passes its tests, a reward model's score (model), "
        "the right steps of a worked sum (steps), what a function of yours says (python)"
    )
    weight: float = Field(default=1.0, description="of it in the sum; 0: only shown")
    label: str = Field(default="", description="its name in metrics, and for only_with; absent: name")
    only_with: str = Field(default="", description="label of a reward without which (0 or less) this one is not paid")
    shuffled: bool = Field(
        default=False, description="deal its values out anew among the answers of a group: a control that must teach nothing"
    )
    scale: Scale = Field(
        default="none",
        description="what the weight multiplies: its values, or these in deviations of the group or of the batch, less the group's mean",
    )
    exact: bool = Field(default=False, description="answer: the last number, digit by digit, instead of what means the same")
    pattern: str = Field(default="", description="format: regular expression that the whole answer must match; a dot matches line ends")
    least_tokens: int = Field(default=0, ge=0, description="length: 1 for answers from so many tokens ...")
    most_tokens: int = Field(default=0, ge=0, description="length: ... to so many, the end token included; else 0")
    cpu_s: int = Field(
        default=PROGRAM_LIMITS.cpu_s,
        ge=1,
        description="code: seconds of processor time that a program may take for its tests; with standard input, for each",
    )
    memory_mib: int = Field(
        default=PROGRAM_LIMITS.memory_bytes // MIB, ge=64, description="code: address space that a program may take, in MiB"
    )
    folder: str = Field(default="", description="model: folder of the reward model")
    steps: bool = Field(
        default=False,
        description="for process supervision. model: a score for each step, of the answer up to its end; python: the function scores steps",
    )
    delimiter: str = Field(default="\n", min_length=1, description="model: what ends a step")
    file: str = Field(default="", description="python: file of the function; it is run, with all that it does, when the run starts")
    function: str = Field(default="reward", min_length=1, description="python: its name; from rollouts to a number or None for each")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in KINDS:
            raise ValueError(f"there is no such reward; allowed: {', '.join(KINDS)}; {did_you_mean(name, KINDS)}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> "RewardSection":
        fields = type(self).model_fields  # a recipe that is written out states defaults, too
        options = set[str]().union(*(kind.options for kind in KINDS.values()))
        stated = {name for name in options if getattr(self, name) != fields[name].default}
        for option in sorted(stated - self.kind.options):
            raise ValueError(f"{option} is no option of the reward {self.name!r}; it has {', '.join(sorted(self.kind.options)) or 'none'}")
        if problem := self.kind.problem(self):
            raise ValueError(problem)
        return self

    @property
    def kind(self) -> "Kind":
        """What it shares with all rewards of its name."""
        return KINDS[self.name]

    @property
    def shown_as(self) -> str:
        """Its name in metrics."""
        return self.label or self.name

    @property
    def of_steps(self) -> bool:
        """Whether it scores steps."""
        return self.steps or self.kind.of_steps


Make = Callable[[RewardSection, "Tokenizer | None", int], Reward | StepReward]


@dataclass(frozen=True, slots=True)
class Kind:
    """What tells one reward from the others.

    Args:
        make: a section, the policy's tokenizer (None: not known), tokens of the longest prompt with its answer -> the reward.
        options: the fields of a section that are its own.
        problem: what is wrong with the options of a section; "" if nothing is.
        lacks: what an example lacks to be judged; None: it judges any.
        of_steps: it always scores steps.
        right_or_wrong: its values are 1 and 0.
        require: raises what keeps this machine from judging.
        own_solutions: why the solutions that examples hold are not paid; see ``Part``.
    """

    make: Make
    options: frozenset[str] = frozenset()
    problem: Callable[[RewardSection], str] = field(default=lambda _: "")
    lacks: Lacks | None = None
    of_steps: bool = False
    right_or_wrong: bool = False
    require: Callable[[RewardSection], None] | None = None
    own_solutions: Callable[[RewardSection, Sequence[Example]], Sequence[str | None]] | None = None


def open_rewards(sections: Sequence[RewardSection], tokenizer: "Tokenizer | None" = None, seq_len: int = 0) -> Rewards:
    """Make the rewards that a recipe names.

    Args:
        sections: of the recipe.
        tokenizer: of the policy; reward models must have the same. None: not compared.
        seq_len: tokens of the longest prompt with its answer; reward models must be able to read them.

    Raises:
        ConfigError: labels that clash or are missing; a reward model with another tokenizer, or a shorter context; a file of yours that
            cannot be read or run, or that has no such function.
        CheckpointError: a reward model is missing or damaged.
    """
    return Rewards([_part(section, section.kind.make(section, tokenizer, seq_len)) for section in sections])


def _part(section: RewardSection, reward: Reward | StepReward) -> Part:
    kind = section.kind
    return Part(
        section.shown_as, reward, section.weight, section.only_with, section.shuffled, section.of_steps, section.scale,
        right_or_wrong=kind.right_or_wrong, lacks=kind.lacks, require=partial(kind.require, section) if kind.require else None,
        own_solutions=partial(kind.own_solutions, section) if kind.own_solutions else None,
    )  # fmt: skip


def _answer(section: RewardSection, *_: object) -> Reward:
    return lambda rollouts: by_answer([r.text for r in rollouts], [r.example for r in rollouts], exact=section.exact)


def _format(section: RewardSection, *_: object) -> Reward:
    pattern = re.compile(section.pattern, re.DOTALL)
    return lambda rollouts: [float(pattern.fullmatch(rollout.text) is not None) for rollout in rollouts]


def _wrong_pattern(section: RewardSection) -> str:
    try:
        re.compile(section.pattern)
    except re.error as error:
        return f"pattern = {section.pattern!r} is no regular expression: {error}"
    return "" if section.pattern else "the reward 'format' needs a pattern"


def _length(section: RewardSection, *_: object) -> Reward:
    least, most = section.least_tokens, section.most_tokens
    return lambda rollouts: [float(least <= len(rollout.tokens) <= most) for rollout in rollouts]


def _wrong_lengths(section: RewardSection) -> str:
    if section.most_tokens >= max(1, section.least_tokens):
        return ""
    return f"least_tokens = {section.least_tokens} and most_tokens = {section.most_tokens} allow no answer"


def _code(section: RewardSection, *_: object) -> Reward:
    limits = _limits(section)
    return lambda rollouts: by_tests([r.text for r in rollouts], [r.example for r in rollouts], limits=limits)


def _limits(section: RewardSection) -> Limits:
    """Return what a program may take; its time on the clock grows with its processor time, so that a busy machine changes no verdict."""
    wall_s = PROGRAM_LIMITS.wall_s * max(1.0, section.cpu_s / PROGRAM_LIMITS.cpu_s)
    return replace(PROGRAM_LIMITS, cpu_s=section.cpu_s, memory_bytes=section.memory_mib * MIB, wall_s=wall_s)


def _require_sandbox(section: RewardSection) -> None:
    """Run an empty program as those of answers will be.

    Raises:
        ConfigError: this machine cannot start it, confine it or bring it to its end.
    """
    from dsv2.tasks.sandbox import REQUIRED, run

    verdict = run("", limits=_limits(section))
    if verdict.outcome != "pass":
        raise ConfigError(
            f"the reward {section.shown_as!r} cannot run programs under {REQUIRED} here: {verdict.outcome}: {verdict.detail}",
            hint='leave this reward out, or see docs/sandbox.md, "What a program meets"',
        )


def _model(section: RewardSection, tokenizer: "Tokenizer | None", seq_len: int) -> Reward | StepReward:
    """The reward model's score of prompt and answer, token for token; or of prompt and answer up to the end of each step.

    Equal answers are scored once: besides the time, their scores would differ by rounding, with their places among the others.
    """
    from dsv2.rl.reward_model import OffloadedRewardModel

    model = OffloadedRewardModel(section.folder, tokenizer, seq_len)
    if section.steps:
        return _each_once(partial(model_steps, model, section.delimiter))

    def score(rollouts: Sequence["Rollout"]) -> list[float]:
        return model.score([[*rollout.prompt_tokens, *rollout.tokens] for rollout in rollouts])

    return _each_once(score)


def _each_once(reward: Callable[[Sequence["Rollout"]], Sequence[T]]) -> Callable[[Sequence["Rollout"]], list[T]]:
    """Return a reward that is asked once about rollouts of the same tokens."""

    def score(rollouts: Sequence["Rollout"]) -> list[T]:
        tokens = [(rollout.prompt_tokens, rollout.tokens) for rollout in rollouts]
        distinct = dict(zip(tokens, rollouts, strict=True))
        values = dict(zip(distinct, reward(list(distinct.values())), strict=True))
        return [values[own] for own in tokens]

    return score


def _wrong_model(section: RewardSection) -> str:
    if not section.folder:
        return "the reward 'model' needs a folder"
    if section.delimiter != RewardSection.model_fields["delimiter"].default and not section.steps:
        return f"delimiter = {section.delimiter!r} ends steps, and a whole answer is scored: add steps = true"
    return ""


def _python(section: RewardSection, *_: object) -> Reward | StepReward:
    return function_of(section.file, section.function)


def _no_file(section: RewardSection) -> str:
    return "" if section.file else "the reward 'python' needs a file"


KINDS: dict[str, Kind] = {
    "answer": Kind(_answer, frozenset({"exact"}), right_or_wrong=True, lacks=lacks_answer),
    "format": Kind(_format, frozenset({"pattern"}), _wrong_pattern, right_or_wrong=True),
    "length": Kind(_length, frozenset({"least_tokens", "most_tokens"}), _wrong_lengths, right_or_wrong=True),
    "code": Kind(
        _code,
        frozenset({"cpu_s", "memory_mib"}),
        right_or_wrong=True,
        lacks=lacks_tests,
        require=_require_sandbox,
        own_solutions=lambda section, examples: solution_problems(examples, limits=_limits(section)),
    ),
    "model": Kind(_model, frozenset({"folder", "steps", "delimiter"}), _wrong_model),
    "python": Kind(_python, frozenset({"file", "function", "steps"}), _no_file),
    "steps": Kind(lambda *_: worked_steps, lacks=lacks_answer, of_steps=True),
}
