"""One signature per operation that is worth a special implementation, and which implementation runs.

``reference`` defines the expert products and the head's loss in plain torch; the fast ones are compared with it. Attention, norm,
activation and the movement of rows are called from files of their own beside this one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv2.kernels.autocast import compute_dtype
from dsv2.kernels.cross_entropy import LinearCrossEntropy
from dsv2.kernels.grouped import GroupedSwiGLU
from dsv2.kernels.log_probs import LinearLogProbs

_BF16_TILE = 64


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
    """Lay tokens out by expert, run every expert on its own rows and scale each result: w * down(silu(gate x) * up x).

    Args:
        x: inputs; each is used ``copies`` times.
        order: for each row, sorted by expert, its flat (token, copy) index; may hold fillers beside them.
        inverse: for each flat (token, copy) index its row.
        copies: experts per token.
        counts: rows of each expert; sums to the number of rows. Zero is fine.
        gate_up: stacked weights, gate rows first.
        down: stacked weights.
        weights: factor of each row's result (its gate); 0 for fillers.

    Returns:
        One result per row, in the dtype that products compute in.
    """
    out: Tensor = GroupedSwiGLU.apply(x, order, inverse, copies, counts, gate_up, down, weights)
    return out


def one_token_swiglu(
    x: Float[Tensor, " hidden"],
    chosen: Sequence[int],
    gates: Float[Tensor, " chosen"],
    gate_up: Float[Tensor, "experts double_width hidden"],
    down: Float[Tensor, "experts hidden width"],
) -> Float[Tensor, " hidden"]:
    """Return the weighted sum of a single token's experts: decoding one request, without a gradient.

    Sorting, counting and copying rows would take longer here than the products.
    """
    gate, up = torch.stack([torch.mv(gate_up[expert], x) for expert in chosen]).chunk(2, dim=-1)
    scaled = F.silu(gate) * up * gates.unsqueeze(-1).to(x.dtype)
    out = torch.mv(down[chosen[0]], scaled[0])
    for expert, row in zip(chosen[1:], scaled[1:].unbind(0), strict=True):
        out = torch.addmv(out, down[expert], row)
    return out


def row_tile(rows: Float[Tensor, "rows hidden"]) -> int:
    """Return the multiple to which ``grouped_swiglu`` likes each expert's rows rounded up, for these inputs; 1: any number.

    On a CPU, bf16 products are compiled for their exact shape on first use. Experts' rows vary with every batch, so without rounding
    most of the time would go into compiling. A handful of rows (decoding) is left alone.
    """
    return _BF16_TILE if compute_dtype(rows) == torch.bfloat16 and rows.device.type == "cpu" and len(rows) > _BF16_TILE else 1


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"], labels: Int[Tensor, " tokens"], ignore: int
) -> Float[Tensor, ""]:
    """Return the negative log-likelihood of the labels under softmax(hidden weight^T), summed, in nats, fp32.

    Rows whose label is ``ignore`` count nothing. Softmax and sum are fp32 or better; the product follows autocast.
    """
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    out: Tensor = LinearCrossEntropy.apply(hidden, weight, labels, ignore, compute_dtype(hidden), gradients)
    return out


def linear_log_probs(
    hidden: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"], tokens: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return the log-probability of each token under softmax(hidden weight^T), and the entropy of that distribution, nats, fp32.

    The log-probabilities carry a gradient, the entropies none. The product follows autocast.
    """
    out: tuple[Tensor, Tensor] = LinearLogProbs.apply(hidden, weight, tokens, compute_dtype(hidden))
    return out
