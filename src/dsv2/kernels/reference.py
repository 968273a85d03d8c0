"""Plain torch definitions of the experts' products and of the head's loss: slow, obvious, and the oracle of the fast ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def grouped_swiglu(
    x: Float[Tensor, "tokens hidden"],
    order: Int[Tensor, " rows"],
    inverse: Int[Tensor, " assignments"],
    copies: int,
    counts: Sequence[int],
    gate_up: Float[Tensor, "experts double_width hidden"],
    down: Float[Tensor, "experts hidden width"],
    weights: Float[Tensor, " rows"],
) -> Float[Tensor, "rows hidden"]:
    """Run each expert on its rows and scale the results; see ``kernels.grouped_swiglu``."""
    results = []
    for expert, rows in enumerate(x[order // copies].split(list(counts))):
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        results.append(F.linear(F.silu(gate) * up, down[expert]))
    return torch.cat(results) * weights.unsqueeze(-1).to(x.dtype)


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"], labels: Int[Tensor, " tokens"], ignore: int
) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood; see ``kernels.linear_cross_entropy``."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=ignore, reduction="sum")
