"""The recipes of reward models and of DPO as data: what both read and how long they run, and each one's loss."""

from typing import ClassVar, Literal

from pydantic import Field

from dsv2.config import Section
from dsv2.data.conversation_rows import TooLong
from dsv2.model.lora import LoraSection
from dsv2.tokenizer.chat import Template
from dsv2.train.guard import GuardSection
from dsv2.train.optimizer import OptimizerSection
from dsv2.train.schedule import BatchSize, LearningRate
from dsv2.train.sft_recipe import SftRunSection
from dsv2.train.tuning_recipe import TuningRecipe


class PreferencesSection(Section):
    """How preferences become samples, which are left out, and how much each source counts."""

    template: Template | None = Field(default=None, description="how a conversation is written; absent: as the tokenizer says")
    too_long: TooLong = Field(
        default="refuse",
        description="what becomes of an answered conversation longer than a row, a pair's than half of it; cut: its beginning",
    )
    max_refused: float = Field(default=0.05, ge=0, le=1, description="share of rows that may be refused; more is an error")
    validation_share: float = Field(
        default=0.1, ge=0, lt=1, description="of the preferences, held out where no validation files are given; chosen by their prompt"
    )
    drop_contradictions: bool = Field(default=True, description="drop rows that judge the same answers differently")
    max_length_ratio: float | None = Field(default=None, ge=1, description="drop pairs whose longer answer has more times the characters")
    weights: dict[str, float] = Field(default_factory=dict, description="how often each source is seen in an epoch; 0.5: half of it")


class PreferenceRecipe(TuningRecipe):
    """What a run on preferences needs: the model that it begins from, the data, and the values that go with them."""

    contexts: ClassVar[int] = 2  # the two answers of a pair, each with its prompt
    most_places: ClassVar[int] = 4096

    run: SftRunSection
    batch: BatchSize
    learning_rate: LearningRate
    data: PreferencesSection = PreferencesSection()
    optimizer: OptimizerSection = OptimizerSection()
    guard: GuardSection = GuardSection()
    lora: LoraSection | None = Field(default=None, description="Low-rank adapters instead of all weights; absent: all weights.")


class RewardLossSection(Section):
    """What a reward is trained to say."""

    kind: Literal["pairwise", "logistic", "squared"] = Field(
        default="pairwise", description="pairwise: the better of two; logistic: right or wrong; squared: a given score"
    )
    centring: float = Field(default=0.0, ge=0, description="weight of the squared sum of a pair's rewards, which ties them to 0")


class RewardRecipe(PreferenceRecipe):
    """A run that trains a reward model."""

    loss: RewardLossSection = RewardLossSection()

    def open_len(self, context: int) -> int:
        """Return the places of a row whose length the recipe leaves open: those of one answer where answers are judged one by one."""
        return super().open_len(context) if self.loss.kind == "pairwise" else min(context, self.most_places)


class DpoLossSection(Section):
    """How hard the policy is pulled to the chosen answers, and held by the reference."""

    beta_dpo: float = Field(default=0.1, gt=0, description="beta, weight of staying near the reference")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs that are thought to be the wrong way round")


class DpoRecipe(PreferenceRecipe):
    """A run of direct preference optimisation."""

    loss: DpoLossSection = DpoLossSection()
