"""The recipe of GRPO as data."""

from typing import Any, Literal, TypeVar

from pydantic import Field, field_serializer

from dsv2.config import Section
from dsv2.rl.objective import PRESETS, Objective, overlong_penalty
from dsv2.rl.reward_kinds import RewardSection
from dsv2.rl.supervision import Supervision
from dsv2.train.loop import PaceSection
from dsv2.train.losses import BalanceSection
from dsv2.train.optimizer import OptimizerSection
from dsv2.train.schedule import LearningRate
from dsv2.train.tuning_recipe import TuningRecipe

T = TypeVar("T", bound="GrpoRecipe")


class GrpoRunSection(PaceSection):
    """How long, how exactly and how often."""

    steps: int = Field(gt=0, description="batches of rollouts that are drawn and learned from")
    seq_len: int = Field(
        default=0,
        ge=0,
        description=f"most tokens of a prompt with its answer; absent: the model's context, at most {TuningRecipe.most_places:,}",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32",
        description="of the trainer's products; with bf16 its log-probabilities are further from the engine's: set objective.correction",
    )
    loader_workers: Literal[0] = Field(default=0, description="none: prompts are at hand")
    profile_steps: Literal[0] = Field(default=0, description="none: no profile is taken")
    validate_every: int = Field(default=20, gt=0, description="steps between evaluations on held-out prompts")
    sample_every: int = Field(default=20, gt=0, description="steps between the rollouts that are shown")


class RolloutSection(Section):
    """What a step samples."""

    prompts: int = Field(default=32, gt=0, description="prompts a step")
    group_size: int = Field(default=8, gt=1, description="G, answers to a prompt")
    max_tokens: int = Field(default=0, ge=0, description="longest answer; longer ones are cut; absent: half of run.seq_len")
    max_batch: int = Field(default=64, gt=0, description="answers that the engine writes at once")
    cache_gb: float | None = Field(default=None, gt=0, description="of the engine's cache, 1e9 bytes; absent: as much as the answers want")
    tool: Literal["none", "calculator"] = Field(default="none", description="that the policy may call; what it writes is not learned")
    replay: bool = Field(default=True, description="train with the experts that the rollouts went through (router replay)")
    alarm: float | None = Field(
        default=None,
        gt=0,
        description="mean difference of engine's and trainer's log-probabilities allowed, a single token's may be 100 times that; "
        "absent: 1e-5 in fp32, 0.05 in bf16",
    )
    most_rounds: int = Field(default=3, gt=0, description="rounds of sampling a step, where groups with equal rewards are drawn anew")


class UpdateSection(Section):
    """How a batch of rollouts is learned from."""

    updates: int = Field(default=1, gt=0, description="mu, optimiser steps on the same rollouts")
    micro_tokens: int = Field(default=8192, gt=0, description="places of one forward and backward, padding included")


class ReferenceSection(Section):
    """The policy that the KL holds the trained one to."""

    refresh_every: int = Field(default=0, ge=0, description="steps after which the policy becomes the reference; 0: the first one stays")


class TaskSection(Section):
    """Where prompts come from: a task of ours, or files (``--data``)."""

    name: Literal["", "arithmetic"] = Field(default="", description="a task that makes its prompts; empty: files")
    digits: int = Field(default=3, gt=0, le=12, description="of the numbers, for arithmetic")
    held_out: int = Field(default=200, ge=0, description="prompts that are kept for evaluation")
    too_long: Literal["refuse", "error"] = Field(
        default="refuse",
        description="what becomes of a prompt that leaves no room for rollout.max_tokens: it is left out, or the run refused",
    )
    max_refused: float = Field(default=0.05, ge=0, le=1, description="share of a file's prompts that may be left out; more is an error")
    check_solutions: bool = Field(
        default=True,
        description="run the solution that a prompt's row holds against its tests before the run, and leave out prompts whose own fails",
    )
    samples: int = Field(default=4, gt=0, description="answers to each of them: k of pass@k")


class GrpoBalanceSection(BalanceSection):
    """Weights of the balance losses; off unless a recipe says otherwise: a policy's few prompts need no even load."""

    expert: float = Field(default=0.0, ge=0, description="alpha_1, evens the load of experts")


class GrpoRecipe(TuningRecipe):
    """A run of GRPO: the policy, its prompts, what is rewarded, and the values that go with them."""

    run: GrpoRunSection
    learning_rate: LearningRate
    reward: tuple[RewardSection, ...] = Field(
        default=(), description="What is rewarded, and with what weight; none where a program of yours hands its Rewards over."
    )
    task: TaskSection = TaskSection()
    preset: Literal["v2", "deepseekmath", "dr_grpo", "dapo"] | None = Field(
        default=None, description="a paper's objective, but for what [objective] states"
    )
    supervision: Supervision = Field(
        default="outcome", description="what earns: an answer as a whole; or each of its steps, which needs a reward that scores steps"
    )
    objective: Objective = Objective()
    rollout: RolloutSection = RolloutSection()
    update: UpdateSection = UpdateSection()
    reference: ReferenceSection = ReferenceSection()
    optimizer: OptimizerSection = OptimizerSection()
    balance: GrpoBalanceSection = GrpoBalanceSection()

    @field_serializer("objective")
    def _stated(self, objective: Objective) -> dict[str, Any]:
        """Write what is stated and no more: a recipe that is used again takes the rest from its preset then."""
        return objective.model_dump(exclude_unset=True)

    def derived(self) -> dict[str, Section]:
        """Return the objective as it is used."""
        return {"objective": objective_of(self)}

    def fitted(self: T, context: int) -> T:
        """Return the recipe with all its lengths as numbers.

        Raises:
            ConfigError: a prompt with its answer may be longer than the context.
        """
        fitted = super().fitted(context)
        longest = fitted.rollout.max_tokens or fitted.run.seq_len // 2
        return fitted.model_copy(update={"rollout": fitted.rollout.model_copy(update={"max_tokens": longest})})


def objective_of(recipe: GrpoRecipe) -> Objective:
    """Return the recipe's objective: its paper's, but for what [objective] states.

    What depends on the longest answer is fitted to it unless it is stated: Dr. GRPO's constant, and the buffer of DAPO's penalty, a fifth.

    Raises:
        ConfigError: the buffer of the penalty is longer than an answer may be, or empty.
    """
    longest, stated = recipe.rollout.max_tokens, recipe.objective.model_fields_set
    chosen = PRESETS[recipe.preset] if recipe.preset else Objective()
    chosen = chosen.model_copy(update={name: getattr(recipe.objective, name) for name in stated})
    if chosen.normalise == "constant" and chosen.constant_len is None:
        chosen = chosen.model_copy(update={"constant_len": longest})
    if chosen.overlong == "penalty" and "overlong_buffer" not in stated:
        chosen = chosen.model_copy(update={"overlong_buffer": max(1, longest // 5)})
    if chosen.overlong == "penalty":
        overlong_penalty(0, longest, chosen.overlong_buffer)  # refuses now what no step could score
    return chosen
