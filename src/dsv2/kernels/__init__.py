"""One signature per operation that is worth a special implementation, and which implementation runs.

``reference`` defines each operation in plain torch; the others are compared with it. In fp64 the expert products have no fast path worth keeping,
but the same code serves, so there is no branch on dtype: what runs is what is tested.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2.kernels.cross_entropy import LinearCrossEntropy
from dsv2.kernels.grouped import GroupedSwiGLU


def grouped_swiglu(
    rows: Float[Tensor, "assignments hidden"],
    counts: Sequence[int],
    gate_up: Float[Tensor, "experts double_width hidden"],
    down: Float[Tensor, "experts hidden width"],
    weights: Float[Tensor, " assignments"],
) -> Float[Tensor, "assignments hidden"]:
    """Run every expert on its own rows and scale each result: w * down(silu(gate x) * up x).

    Args:
        rows: inputs sorted by expert.
        counts: rows of each expert; sums to the number of rows. Zero is fine.
        gate_up: stacked weights, gate rows first.
        down: stacked weights.
        weights: factor of each row's result (its gate).

    Returns:
        One result per row, in the dtype of ``rows``.
    """
    out: Tensor = GroupedSwiGLU.apply(rows, counts, gate_up, down, weights)
    return out


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"], labels: Int[Tensor, " tokens"], ignore: int
) -> Float[Tensor, ""]:
    """Return the negative log-likelihood of the labels under softmax(hidden weight^T), summed, in nats, fp32.

    Rows whose label is ``ignore`` count nothing. Softmax and sum are fp32 or better; the product follows autocast.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    out: Tensor = LinearCrossEntropy.apply(hidden, weight, labels, ignore, dtype)
    return out
