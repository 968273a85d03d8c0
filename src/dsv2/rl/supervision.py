"""Outcome and process supervision (DeepSeekMath 4.1.2, 4.1.3): from what answers earned to their advantages or those of their tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.errors import ConfigError
from dsv2.rl.objective import Objective, advantages, process_advantages
from dsv2.rl.reward import Rewards, Scores
from dsv2.rl.rollout import Rollout
from dsv2.rl.steps import Steps

Supervision = Literal["outcome", "process"]


def require_supervision(kind: Supervision, rewards: Rewards, objective: Objective) -> None:
    """Refuse rewards and objectives that a kind of supervision has no use for.

    Raises:
        ConfigError: process supervision without a paid reward of steps, or with a ratio of whole outputs; a paid reward of steps without
            process supervision.
    """
    paid = ", ".join(rewards.step_labels)
    if kind == "outcome" and paid:
        raise ConfigError(
            f'supervision = "outcome", and rewards that are paid score steps: {paid}',
            hint='set supervision = "process", or weight = 0 to see their mean and not pay it',
        )
    if kind == "process" and not paid:
        raise ConfigError(
            f'supervision = "process", and no reward that is paid scores steps; rewards: {", ".join(rewards.labels)}',
            hint='add [[reward]] with name = "steps", or with name = "model" and steps = true',
        )
    if kind == "process" and objective.ratio == "output":
        raise ConfigError(
            'supervision = "process" with ratio = "output": one ratio moves all tokens of an output alike, whatever their advantages are',
            hint='choose preset = "deepseekmath", "dr_grpo" or "dapo", or ratio = "token"',
        )


def advantages_of(
    kind: Supervision, scores: Scores, rollouts: Sequence[Rollout], objective: Objective, *, group_size: int, max_tokens: int
) -> Tensor:
    """Return the advantages of rollouts, whole groups of them, fp32: [N], or of their tokens [N, max_tokens] under process supervision.

    Args:
        kind: of supervision.
        scores: of the rollouts.
        rollouts: groups one after the other.
        objective: says how rewards are compared with those of their group.
        group_size: G.
        max_tokens: tokens of the longest answer allowed; tokens that an answer does not have get 0.
    """
    if kind == "outcome":
        values = torch.tensor([float("nan") if earned is None else earned for earned in scores.compared], dtype=torch.float64)
        return advantages(values.view(-1, group_size), objective.advantage).flatten().float()
    most = max([1, *(len(steps or ()) for steps in scores.steps)])
    rewards = torch.full((len(rollouts), most), torch.nan, dtype=torch.float64)
    ends = torch.zeros(len(rollouts), most, dtype=torch.int64)
    for row, steps in enumerate(scores.steps):
        for place, (end, earned) in enumerate(steps or ()):
            ends[row, place], rewards[row, place] = end, earned
    lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts])
    grouped = (-1, group_size)
    found = process_advantages(
        rewards.view(*grouped, most), ends.view(*grouped, most), lengths.view(grouped), objective.advantage
    ).flatten(0, 1)  # fmt: skip
    return F.pad(found, (0, max_tokens - found.shape[1])).float()


def shown_advantage(own: Tensor, num_tokens: int, steps: Steps | None) -> dict[str, Any]:
    """Return what rollouts.jsonl says of a rollout's advantage: one number; or the mean over its tokens, and that of each step."""
    if own.ndim == 0:
        return {"advantage": round(own.item(), 6)}
    found = [{"end": end, "reward": earned, "advantage": round(own[end].item(), 6)} for end, earned in steps or ()]
    return {"advantage": round(own[:num_tokens].mean().item(), 6), "steps": found}
