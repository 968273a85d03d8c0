"""Figures of a step's rollouts, under the names that TRL gives them."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from dsv2.rl.objective import rewards_differ
from dsv2.rl.reward import Scores
from dsv2.rl.rollout import Rollout


def rollout_metrics(rollouts: Sequence[Rollout], scores: Scores, group_size: int) -> dict[str, Any]:
    """Return rewards, their spread, lengths and how answers ended; rollouts without a score count in ``unscored`` alone.

    By reward: ``failed`` of those counts where it raised or was no number, for the others it could not tell; ``not_asked`` where the prompt
    lacks what it judges by.
    """
    known = [reward for reward in scores.total if reward is not None]
    groups = [[r for r in scores.total[i : i + group_size] if r is not None] for i in range(0, len(rollouts), group_size)]
    totals = torch.tensor([math.nan if reward is None else reward for reward in scores.compared], dtype=torch.float64)
    lengths = [len(rollout.tokens) for rollout in rollouts]
    ended = [len(rollout.tokens) for rollout in rollouts if not rollout.truncated]
    line: dict[str, Any] = {
        "reward": _mean(known),
        "reward_std": _mean([statistics.pstdev(group) for group in groups if group]),
        "frac_reward_zero_std": 1 - rewards_differ(totals.view(-1, group_size)).double().mean().item(),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(rollouts),
        "completions/mean_terminated_length": _mean(ended),
        "completions/min_terminated_length": min(ended, default=None),
        "completions/max_terminated_length": max(ended, default=None),
        "unscored": len(rollouts) - len(known),
    }
    for name, values in scores.parts.items():
        some = [value for value in values if value is not None]
        line |= {
            f"rewards/{name}/mean": _mean(some), f"rewards/{name}/std": statistics.pstdev(some) if some else None,
            f"rewards/{name}/unscored": scores.unscored(name), f"rewards/{name}/failed": scores.failed.get(name, 0),
            f"rewards/{name}/not_asked": scores.not_asked(name),
        }  # fmt: skip
    if scores.steps:
        earned = [[reward for _, reward in steps] for steps in scores.steps if steps is not None]
        line |= {"steps/mean_count": _mean([len(own) for own in earned]), "steps/reward": _mean([r for own in earned for r in own])}
    return line


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
