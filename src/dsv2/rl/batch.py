"""What a step of GRPO learns from."""

from dataclasses import dataclass

import torch

from dsv2.rl.reward import Scores
from dsv2.rl.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Batch:
    """Scored rollouts of a step, and where the prompts stand after them.

    Args:
        drawn: all of them, groups one after the other.
        scores: of each.
        advantages: [rollouts], or [rollouts, tokens] under process supervision.
        kept: places of the rollouts to learn from: groups that are not all equal, answers that are not left out.
        consumed: prompts that the run has asked for, this step's among them.
        seconds: that sampling and scoring took.
    """

    drawn: list[Rollout]
    scores: Scores
    advantages: torch.Tensor
    kept: list[int]
    consumed: int
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all rollouts, each with its prompt."""
        return sum(len(rollout.prompt_tokens) + len(rollout.tokens) for rollout in self.drawn)

    @property
    def rollouts_per_s(self) -> float:
        """Rollouts drawn and scored a second."""
        return len(self.drawn) / self.seconds
