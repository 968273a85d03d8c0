"""Held-out loss per domain, in nats per token and in bits per byte, which no tokenizer can flatter (spec 8.1), and the experts it used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dsv2.data.loader import sequential_batches
from dsv2.data.packing import IGNORE, Rows, RowSource
from dsv2.data.shards import TokenShards
from dsv2.model.router import RouterStats
from dsv2.model.transformer import Transformer
from dsv2.train.losses import token_nll


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Held-out loss of one domain.

    Args:
        nll: summed over its labels, nats.
        num_labels: of documents every token but the BOS, ends included; of conversations what the assistant writes.
        num_bytes: UTF-8 bytes of that text.
        assignments: [L][E] tokens that each MoE layer sent to each expert, of those that have a label; empty without MoE layers.
    """

    nll: float
    num_labels: int
    num_bytes: int
    assignments: tuple[tuple[int, ...], ...] = ()

    @property
    def loss(self) -> float:
        """Nats per label."""
        return self.nll / self.num_labels

    @property
    def bits_per_byte(self) -> float:
        """Total NLL / (ln 2 * bytes)."""
        return self.nll / (math.log(2) * self.num_bytes)

    @property
    def expert_shares(self) -> list[list[float]]:
        """[L][E] share of a layer's assignments that each expert received, to 5 decimals; rows sum to 1."""
        return [[round(count / max(1, sum(layer)), 5) for count in layer] for layer in self.assignments]


def validate(
    model: Transformer, shards: TokenShards, seq_len: int, *, batch_rows: int, autocast: torch.dtype | None
) -> dict[str, DomainLoss]:
    """Score every token of every domain once.

    A row begins without context, so the figure is for windows of ``seq_len`` tokens.
    """
    return {
        domain: score_rows(model, Rows(shards, seq_len, domain), shards.num_bytes(domain), batch_rows=batch_rows, autocast=autocast)
        for domain in shards.domains
    }


def score_rows(model: Transformer, rows: RowSource, num_bytes: int, *, batch_rows: int, autocast: torch.dtype | None) -> DomainLoss:
    """Score every label of some rows once; ``num_bytes``: of the text that the labels are."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll, num_labels, assignments = 0.0, 0, None
    for batch in sequential_batches(rows, batch_rows):
        batch = batch.to(device)
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            output = model(batch.tokens, batch.positions, batch.document_ids)
            nll += token_nll(model, output.hidden, batch.labels).item()
        num_labels += batch.num_labels
        counted = _assignments(output.router_stats, batch.labels != IGNORE)
        assignments = counted if assignments is None or counted is None else assignments + counted
    model.train(was_training)
    layers = () if assignments is None else tuple(tuple(layer) for layer in assignments.tolist())
    return DomainLoss(nll, num_labels, num_bytes, layers)


def _assignments(stats: Sequence[RouterStats], scored: Bool[Tensor, "batch tokens"]) -> Int64[Tensor, "layers experts"] | None:
    """Count the assignments of the tokens that have a label: those of the padding would say nothing of the domain."""
    if not stats:
        return None
    return torch.stack([torch.bincount(layer.experts[scored].flatten(), minlength=layer.affinity.shape[-1]) for layer in stats])
