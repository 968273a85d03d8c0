"""How evenly the routers spread a step's tokens: what a run writes to its metrics to see routing collapse, or balance, happen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from dsv2.model.router import RouterStats


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """Counts of one or more micro-batches; those of several add up. L MoE layers, E experts on D devices.

    Args:
        tokens: N that were routed.
        assignments: [L, E] of each expert, before any dropping.
        received: [L, D] tokens that each device receives, before any dropping: one bound for several of its experts goes there once.
        most_sends: [L] devices that the token with the most of them reached.
        dropped: [L, D] assignments dropped on each device; None where dropping is off.
    """

    tokens: int
    assignments: Int64[Tensor, "layers experts"]
    received: Int64[Tensor, "layers devices"]
    most_sends: Int64[Tensor, " layers"]
    dropped: Int64[Tensor, "layers devices"] | None

    def __add__(self, other: "RouterLoad") -> "RouterLoad":
        dropped = None if self.dropped is None or other.dropped is None else self.dropped + other.dropped
        most_sends = torch.maximum(self.most_sends, other.most_sends)
        return RouterLoad(
            self.tokens + other.tokens, self.assignments + other.assignments, self.received + other.received, most_sends, dropped
        )

    @property
    def shares(self) -> Float64[Tensor, "layers experts"]:
        """Share of a layer's assignments that each expert received; rows sum to 1."""
        return self.assignments.double() / self.assignments.sum(dim=-1, keepdim=True)

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert of any layer over its layer's mean; 1 is even."""
        return float(self.shares.max()) * self.shares.shape[-1]

    def metrics(self, n_group: int) -> dict[str, Any]:
        """Return figures per layer, for a line of metrics.

        Args:
            n_group: D; figures about devices are left out where there is one.

        Returns:
            max_over_mean: load of the busiest expert over the mean, 1 is even; entropy: of the shares, over ln E, 1 is even;
            dead_experts: that received nothing; device_load: each device's share before dropping; sends_per_token: devices that a token
            reached, in the mean; most_sends: that any token reached, at most M; received_max: tokens that the busiest device received
            over the mean; dropped, dropped_share: assignments dropped, and their share of all; computed_max: of the busiest device after
            dropping, over the mean load.
        """
        counts, shares = self.assignments, self.shares
        entropy = torch.special.entr(shares).sum(dim=-1) / max(math.log(shares.shape[-1]), 1e-12)
        figures: dict[str, Any] = {
            "max_over_mean": _rounded(shares.amax(dim=-1) * shares.shape[-1]),
            "entropy": _rounded(entropy),
            "dead_experts": (counts == 0).sum(dim=-1).tolist(),
        }
        devices = self.assignments.unflatten(-1, (n_group, -1)).sum(dim=-1)
        if n_group > 1:
            figures["device_load"] = _rounded(devices.double() / devices.sum(dim=-1, keepdim=True))
            received = self.received.double()
            figures["sends_per_token"] = _rounded(received.sum(dim=-1) / self.tokens)
            figures["most_sends"] = self.most_sends.tolist()
            figures["received_max"] = _rounded(received.amax(dim=-1) / received.mean(dim=-1))
        if self.dropped is not None:
            figures["dropped"] = self.dropped.sum(dim=-1).tolist()
            figures["dropped_share"] = _rounded(self.dropped.sum(dim=-1).double() / counts.sum(dim=-1))
            figures["computed_max"] = _rounded((devices - self.dropped).amax(dim=-1) / devices.double().mean(dim=-1))
        return figures


def router_load(stats: Sequence[RouterStats], n_group: int) -> RouterLoad | None:
    """Count what the routers of one micro-batch did; None without MoE layers.

    Args:
        stats: of each MoE layer.
        n_group: D, groups of experts, each of which stands for a device.
    """
    if not stats:
        return None
    num_experts = stats[0].affinity.shape[-1]
    group_len = num_experts // n_group
    assignments, received, most_sends, dropped = [], [], [], []
    for layer in stats:
        devices = layer.experts.flatten(0, 1) // group_len
        assignments.append(torch.bincount(layer.experts.flatten(), minlength=num_experts))
        reached = torch.zeros(len(devices), n_group, dtype=torch.int64, device=devices.device).scatter_(1, devices, 1)
        received.append(reached.sum(dim=0))
        most_sends.append(reached.sum(dim=1).amax())
        if layer.kept is not None:
            gone = (~layer.kept).flatten(0, 1).long()
            dropped.append(torch.zeros_like(reached).scatter_add_(1, devices, gone).sum(dim=0))
    tokens = stats[0].experts.shape[0] * stats[0].experts.shape[1]
    gone_by_device = torch.stack(dropped) if dropped else None
    return RouterLoad(tokens, torch.stack(assignments), torch.stack(received), torch.stack(most_sends), gone_by_device)


def _rounded(values: Tensor) -> Any:
    return [[round(v, 5) for v in row] if isinstance(row, list) else round(row, 5) for row in values.tolist()]
