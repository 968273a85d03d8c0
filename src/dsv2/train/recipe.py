"""The recipe of pre-training as data: every section, and the model's config that it means."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from dsv2.config import Section
from dsv2.data.mixture import MixtureRules
from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.dropping import DroppingSection
from dsv2.train.guard import GuardSection
from dsv2.train.loop import PaceSection, RunSection
from dsv2.train.losses import BalanceSection
from dsv2.train.optimizer import OptimizerSection
from dsv2.train.samples import SamplesSection
from dsv2.train.schedule import BatchSize, LearningRate

PAPER_DEVIATION, PAPER_WIDTH = 0.006, 5120  # of V2's initial values, and its hidden size (section 3.1.2)


class ModelSection(Section):
    """Which model: a preset, and fields of its config.json to replace."""

    preset: str = Field(description="name of a preset")
    overrides: dict[str, Any] = Field(default_factory=dict, description="config.json fields to replace")
    init: Literal["config", "width"] = Field(
        default="config", description="initial deviation: the config's initializer_range, or 0.006 sqrt(5120 / hidden_size)"
    )
    start: str | None = Field(
        default=None, description="checkpoint to continue from, weights only; absent: initial values; empty: must be given"
    )


class StageRecipe(Section):
    """What a run's folder reads of the recipe of any stage."""

    run: PaceSection

    def derived(self) -> Mapping[str, Section]:
        """Return the sections of which the recipe states a part and derives the rest, by name, as they are used; none in most stages."""
        return {}


@runtime_checkable
class Sampled(Protocol):
    """A recipe of a stage that lets its model write on the way."""

    @property
    def samples(self) -> SamplesSection:
        """What it writes."""
        ...


class PretrainRecipe(StageRecipe):
    """A pre-training run: one dial, the preset and the token budget, and the values that go with it."""

    model: ModelSection
    run: RunSection
    batch: BatchSize
    learning_rate: LearningRate
    optimizer: OptimizerSection = OptimizerSection()
    balance: BalanceSection = BalanceSection()
    dropping: DroppingSection = DroppingSection()
    guard: GuardSection = GuardSection()
    samples: SamplesSection = SamplesSection()
    mixture: MixtureRules | None = Field(default=None, description="Weights of the domains; without it every row once an epoch.")

    def model_config_for(self, tokenizer: Tokenizer | None) -> ModelConfig:
        """Return the model's config, its vocabulary that of the tokenizer.

        Raises:
            ConfigError: unknown preset or field, sizes that do not fit, or a vocabulary other than the tokenizer's.
        """
        overrides = dict(self.model.overrides)
        if tokenizer is not None:
            given = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            for name, value in given.items():
                if overrides.get(name, value) != value:
                    raise ConfigError(
                        f"model.overrides.{name} = {overrides[name]!r}; the data's tokenizer says {value}", hint="leave it out"
                    )
            overrides |= given
        if self.model.init == "width":
            if "initializer_range" in overrides:
                raise ConfigError(
                    f"model.init = 'width' and model.overrides.initializer_range = {overrides['initializer_range']} both set the deviation",
                    hint="state one of them",
                )
            hidden = preset(self.model.preset, **overrides).hidden_size
            overrides["initializer_range"] = PAPER_DEVIATION * math.sqrt(PAPER_WIDTH / hidden)
        return preset(self.model.preset, **overrides)
