"""The recipe of supervised fine-tuning as data."""

import math

from pydantic import Field

from dsv2.config import Section
from dsv2.data.conversation_rows import TooLong
from dsv2.model.lora import LoraSection
from dsv2.tokenizer.chat import Template
from dsv2.train.guard import GuardSection
from dsv2.train.loop import PaceSection, RunSection
from dsv2.train.losses import BalanceSection
from dsv2.train.optimizer import OptimizerSection
from dsv2.train.samples import SamplesSection
from dsv2.train.schedule import BatchSize, LearningRate
from dsv2.train.tuning_recipe import TuningRecipe


class ConversationsSection(Section):
    """How conversations become samples."""

    template: Template | None = Field(default=None, description="how a conversation is written; absent: as the tokenizer says")
    too_long: TooLong = Field(default="refuse", description="what becomes of a conversation longer than a row")
    max_refused: float = Field(default=0.05, ge=0, le=1, description="share of rows that may be refused; more is an error")
    validation_share: float = Field(
        default=0.02, ge=0, lt=1, description="of the conversations, held out where no validation files are given; chosen by their content"
    )
    fim_share: float = Field(default=0.0, ge=0, lt=1, description="of all samples, documents told as fill-in-the-middle")


class SftRunSection(PaceSection):
    """How long, how exactly and how often."""

    seq_len: int = Field(default=0, ge=0, description="places in a row; absent: the model's context, within the stage's bound")
    epochs: float = Field(gt=0, description="how often each row is seen; the last batch is filled up with rows of the next epoch")

    def budget(self, num_rows: int) -> RunSection:
        """Return the same for so many packed rows, with the epochs as places of rows, which is what the loop counts as tokens."""
        return RunSection(tokens=math.ceil(self.epochs * num_rows) * self.seq_len, **self.model_dump(exclude={"epochs"}))


class SftBalanceSection(BalanceSection):
    """Weights of the balance losses; off here unless a recipe says otherwise: no paper states any for fine-tuning."""

    expert: float = Field(default=0.0, ge=0, description="alpha_1, evens the load of experts")


class QuestionsSection(SamplesSection):
    """Questions that the model answers every ``run.sample_every`` steps, for metrics and report."""

    prompts: tuple[str, ...] = Field(
        default=("Who are you?", "\u4f60\u662f\u8c01\uff1f", "What is 17 + 25?"), description="what the user says"
    )


class SftRecipe(TuningRecipe):
    """A fine-tuning run: the model that it begins from, the conversations, and the values that go with them."""

    run: SftRunSection
    batch: BatchSize
    learning_rate: LearningRate
    data: ConversationsSection = ConversationsSection()
    optimizer: OptimizerSection = OptimizerSection()
    balance: SftBalanceSection = SftBalanceSection()
    guard: GuardSection = GuardSection()
    lora: LoraSection | None = Field(default=None, description="Low-rank adapters instead of all weights; absent: all weights.")
    samples: QuestionsSection = QuestionsSection()
