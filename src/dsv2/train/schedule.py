"""Learning rate and batch size as pure functions of where a run stands (section 3.1.2; spec 4.1, 10.10)."""

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from dsv2.config import Section
from dsv2.errors import ConfigError


class LearningRate(Section):
    """Linear warm-up by steps, then down by tokens: in steps at shares of the budget, or along a cosine over all of it."""

    peak: float = Field(gt=0, description="learning rate after warm-up")
    decay: Literal["steps", "cosine"] = Field(default="steps", description="how the rate falls: as V2 (steps) or as Coder-V2 (cosine)")
    warmup_steps: int = Field(default=2000, ge=0, description="steps from 0 to the peak")
    decay_points: tuple[float, ...] = Field(default=(0.6, 0.9), description="shares of the token budget after which the rate is multiplied")
    decay_factor: float = Field(default=0.316, gt=0, le=1, description="factor at each of these points; two of them make a tenth")

    final_share: float = Field(default=0.1, ge=0, le=1, description="of a cosine: the rate at the end of the budget over the peak")

    @model_validator(mode="after")
    def _check(self) -> "LearningRate":
        unused = ("decay_points", "decay_factor") if self.decay == "cosine" else ("final_share",)
        for name in unused:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)} has no meaning with decay = {self.decay!r}: leave it out")
        if not all(0 < point < 1 for point in self.decay_points) or list(self.decay_points) != sorted(self.decay_points):
            raise ValueError(f"decay_points = {list(self.decay_points)} must be rising shares of the token budget, between 0 and 1")
        return self


class BatchSize(Section):
    """Sequences per step, rising linearly in consumed tokens."""

    sequences: int = Field(gt=0, description="sequences a step, at the end of the ramp")
    initial_sequences: int | None = Field(default=None, gt=0, description="sequences a step at the start; absent: constant")
    ramp_tokens: int = Field(default=0, ge=0, description="tokens over which the batch grows")
    micro_sequences: int = Field(gt=0, description="sequences in one forward and backward; the batch is a multiple of it")

    @model_validator(mode="after")
    def _check(self) -> "BatchSize":
        if (self.initial_sequences is None) != (self.ramp_tokens == 0):
            raise ValueError("initial_sequences and ramp_tokens go together: state both, or neither")
        if self.initial_sequences is not None and self.initial_sequences > self.sequences:
            raise ValueError(f"initial_sequences = {self.initial_sequences} exceeds sequences = {self.sequences}: the batch only grows")
        return self


def learning_rate(schedule: LearningRate, *, step: int, tokens: int, total_tokens: int) -> float:
    """Return the rate of one step.

    Args:
        schedule: peak, warm-up and decay.
        step: optimiser steps done before this one.
        tokens: tokens consumed before this step.
        total_tokens: the budget.

    Both ways of decay are of tokens, since batches may grow, and they multiply the warm-up: at the end of Coder-V2's 2000 steps, 1.3 % of
    its budget, the cosine stands at 0.9996.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.decay == "cosine":
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, tokens / total_tokens)))
        return schedule.peak * warmup * (schedule.final_share + (1 - schedule.final_share) * cosine)
    passed = sum(tokens >= point * total_tokens for point in schedule.decay_points)
    return schedule.peak * warmup * schedule.decay_factor**passed


def batch_size(batch: BatchSize, tokens: int) -> int:
    """Return the sequences of the step that starts after ``tokens`` tokens: linear, rounded to whole micro-batches."""
    start = batch.initial_sequences if batch.initial_sequences is not None else batch.sequences
    share = min(1.0, tokens / batch.ramp_tokens) if batch.ramp_tokens else 1.0
    wanted = start + (batch.sequences - start) * share
    return max(1, round(wanted / batch.micro_sequences)) * batch.micro_sequences


def check_batch(batch: BatchSize) -> None:
    """Refuse batch sizes that do not split into micro-batches.

    Raises:
        ConfigError: they do not.
    """
    for name in ("sequences", "initial_sequences"):
        value = getattr(batch, name)
        if value is not None and value % batch.micro_sequences:
            raise ConfigError(
                f"batch.{name} = {value} does not split into batch.micro_sequences = {batch.micro_sequences}",
                hint=f"use a multiple of {batch.micro_sequences}",
            )


def steps_of(batch: BatchSize, seq_len: int, total_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (consumed sequences before the step, sequences of the step) until the token budget is spent."""
    consumed = 0
    while consumed * seq_len < total_tokens:
        size = batch_size(batch, consumed * seq_len)
        yield consumed, size
        consumed += size
