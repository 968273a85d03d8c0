"""What is minimised: cross-entropy of the next token plus weighted balance losses (eq 23-31)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dsv2.config import Section
from dsv2.data.batch import IGNORE, Batch
from dsv2.kernels import linear_cross_entropy
from dsv2.model.balance import communication_balance_loss, device_balance_loss, expert_balance_loss, pool_sequences
from dsv2.model.config import ModelConfig
from dsv2.model.dropping import Dropping
from dsv2.model.router import RouterStats
from dsv2.model.transformer import Transformer


class BalanceSection(Section):
    """Weights of the balance losses; 0 switches one off."""

    expert: float = Field(default=0.003, ge=0, description="alpha_1, evens the load of experts")
    device: float = Field(default=0.0, ge=0, description="alpha_2, evens the load of devices (expert groups)")
    communication: float = Field(default=0.0, ge=0, description="alpha_3, evens what devices receive")
    scope: Literal["sequence", "micro-batch"] = Field(
        default="sequence", description="what is to be even: every sequence by itself, as published, or a micro-batch pooled"
    )


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of one micro-batch.

    Args:
        nll: summed over its labels, nats; of another objective its loss, summed over what it counts.
        balance: weighted, summed over layers, averaged over sequences (or of the pooled micro-batch).
        router_stats: of each MoE layer.
        figures: what else an objective wants to see in the metrics, each summed as ``nll`` is.
    """

    nll: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    router_stats: tuple[RouterStats, ...]
    figures: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What a stage minimises in place of the next token's cross-entropy."""

    def count(self, batch: Batch) -> int:
        """Return how many terms (labels, comparisons) the sum over a batch has: what the mean divides by."""
        ...

    def losses(self, model: Transformer, batch: Batch, *, recompute: bool) -> Losses:
        """Return the losses of a micro-batch, with graph."""
        ...


def batch_losses(
    model: Transformer, batch: Batch, balance: BalanceSection, *, dropping: Dropping | None = None, recompute: bool = False
) -> Losses:
    """Run the model on a packed batch and return its losses, with graph."""
    output = model(batch.tokens, batch.positions, batch.document_ids, dropping=dropping, recompute=recompute)
    nll = token_nll(model, output.hidden, batch.labels)
    return Losses(nll, balance_loss(output.router_stats, balance, model.config), output.router_stats)


def token_nll(model: Transformer, hidden: Float[Tensor, "batch tokens hidden"], labels: Tensor) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood of the labels, nats."""
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), IGNORE)


def balance_loss(stats: Sequence[RouterStats], balance: BalanceSection, config: ModelConfig) -> Float[Tensor, ""]:
    """Return the weighted balance losses summed over layers (not divided by their number, spec 10.9).

    They are of what the routers chose: counts are taken before dropping. Pooled, the sequences of a micro-batch count as one.
    """
    total = torch.zeros(())
    for layer in stats:
        affinity, experts = layer.affinity, layer.experts
        if balance.scope == "micro-batch":
            affinity, experts = pool_sequences(affinity, experts)
        if balance.expert:
            total = total + balance.expert * expert_balance_loss(affinity, experts)
        if balance.device:
            total = total + balance.device * device_balance_loss(affinity, experts, config.n_group)
        if balance.communication:
            loss = communication_balance_loss(affinity, experts, config.n_group, config.reachable_groups)
            total = total + balance.communication * loss
    return total
