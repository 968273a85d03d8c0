"""Held-out loss per domain, in nats per token and in bits per byte, which no tokenizer can flatter (spec 8.1)."""

import math
from dataclasses import dataclass

import torch

from dsv2.data.loader import sequential_batches
from dsv2.data.packing import Rows
from dsv2.data.shards import TokenShards
from dsv2.model.transformer import Transformer
from dsv2.train.losses import token_nll


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Held-out loss of one domain.

    Args:
        nll: summed over its labels, nats.
        num_labels: every token but each document's BOS; the end of a document counts.
        num_bytes: UTF-8 bytes of its documents.
    """

    nll: float
    num_labels: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per label."""
        return self.nll / self.num_labels

    @property
    def bits_per_byte(self) -> float:
        """Total NLL / (ln 2 * bytes)."""
        return self.nll / (math.log(2) * self.num_bytes)


def validate(
    model: Transformer, shards: TokenShards, seq_len: int, *, batch_rows: int, autocast: torch.dtype | None
) -> dict[str, DomainLoss]:
    """Score every token of every domain once.

    A row begins without context, so the figure is for windows of ``seq_len`` tokens.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result = {}
    for domain in shards.domains:
        nll, num_labels = 0.0, 0
        for batch in sequential_batches(Rows(shards, seq_len, domain), batch_rows):
            batch = batch.to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                hidden = model(batch.tokens, batch.positions, batch.document_ids).hidden
                nll += token_nll(model, hidden, batch.labels).item()
            num_labels += batch.num_labels
        result[domain] = DomainLoss(nll, num_labels, shards.num_bytes(domain))
    model.train(was_training)
    return result
