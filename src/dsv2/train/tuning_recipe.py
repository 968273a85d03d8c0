"""What the recipes of all stages have in common that go on from a trained model: where they begin, and how long their rows are."""

from typing import ClassVar, TypeVar

from pydantic import Field

from dsv2.config import Section
from dsv2.errors import ConfigError
from dsv2.train.recipe import StageRecipe

T = TypeVar("T", bound="TuningRecipe")


class StartSection(Section):
    """Which model a stage begins from; its own config.json says its shape."""

    start: str = Field(default="", description="checkpoint, run, tour or model id; empty: must be given")


class TuningRecipe(StageRecipe):
    """A run that begins from a trained model, whose context bounds its rows and gives the lengths that the recipe leaves open."""

    contexts: ClassVar[int] = 1  # of the model, that a row may be long
    most_places: ClassVar[int] = 1024  # of a row whose length the recipe leaves open

    model: StartSection = StartSection()

    def open_len(self, context: int) -> int:
        """Return the places of a row whose length the recipe leaves open, by the tokens of the model's context."""
        return min(self.contexts * context, self.most_places)

    def fitted(self: T, context: int) -> T:
        """Return the recipe with all its lengths as numbers.

        Args:
            context: tokens that the model holds.

        Raises:
            ConfigError: its rows are longer than the context allows.
        """
        longest = self.contexts * context
        if self.run.seq_len > longest:
            times = f"{self.contexts} x " if self.contexts > 1 else ""
            raise ConfigError(
                f"run.seq_len = {self.run.seq_len} exceeds {times}the model's context of {context} tokens",
                hint=f"set run.seq_len={longest} or less",
            )
        if self.run.seq_len:
            return self
        return self.model_copy(update={"run": self.run.model_copy(update={"seq_len": self.open_len(context)})})
