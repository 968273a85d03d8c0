"""Which tokens of a packed batch form one document, arranged so that attention never crosses from one to the next.

Attention over a packed row is causal attention over each of its documents alone. Runs of equal length are stacked and go through one call,
so a batch of whole rows is a single call and a mask over all pairs is never built.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """A partition of the flattened tokens of a batch into runs of one document.

    Args:
        order: [batch * tokens] flat token indices, runs sorted by length; None when the batch is already whole rows.
        inverse: [batch * tokens] the permutation back.
        groups: (number of runs, their length in tokens), in the order of ``order``.
    """

    order: Int[Tensor, " flat"] | None
    inverse: Int[Tensor, " flat"] | None
    groups: tuple[tuple[int, int], ...]


def find_segments(document_ids: Int[Tensor, "batch tokens"]) -> Segments:
    """Cut every row where its document id changes."""
    batch, tokens = document_ids.shape
    starts_here = torch.ones_like(document_ids, dtype=torch.bool)
    starts_here[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = starts_here.flatten().nonzero().flatten()
    if len(starts) == batch:
        return Segments(None, None, ((batch, tokens),))
    lengths = torch.diff(starts, append=starts.new_tensor([batch * tokens]))
    by_length = torch.argsort(lengths, stable=True)
    segment_of_token = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), lengths)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(starts), device=starts.device)
    order = torch.argsort(rank[segment_of_token], stable=True)
    values, counts = torch.unique_consecutive(lengths[by_length], return_counts=True)
    return Segments(order, torch.argsort(order), tuple(zip(counts.tolist(), values.tolist(), strict=True)))
