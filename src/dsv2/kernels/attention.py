"""Softmax attention of many heads, by what serves the shape: a fused kernel, or two batched products.

On a CPU torch's fused kernel does not use the processor's bf16 products well: for rows of a few hundred tokens in bf16 the plain
products are about three times faster, forward and backward. In fp32, for long rows and on GPUs, the fused kernel wins. So it does for
odd lengths: bf16 products are compiled for their exact shape on first use, and cut documents bring a new length with every batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_PLAIN_UP_TO = 512  # tokens; above, the scores of all pairs outgrow the caches
_PLAIN_MULTIPLE = 64  # tokens


def attend(
    q: Float[Tensor, "batch new heads key"],
    k: Float[Tensor, "batch all heads key"],
    v: Float[Tensor, "batch all heads value"],
    *,
    scale: float,
    visible: Bool[Tensor, "batch new all"] | None = None,
) -> Float[Tensor, "batch new heads value"]:
    """Return softmax(scale q k^T) v per head (eq 18).

    Args:
        q: queries.
        k: keys.
        v: values; their width may differ from the keys'.
        scale: factor on the scores, before the softmax.
        visible: which keys each query sees; None: causal, and then there are as many keys as queries.
    """
    short = q.shape[1] <= _PLAIN_UP_TO and q.shape[1] % _PLAIN_MULTIPLE == 0
    if visible is None and short and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _plain_causal(q, k, v, scale)
    return _fused(q, k, v, scale, visible)


def _plain_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Scores of all pairs, -inf after the query; the softmax computes in fp32 and rounds its result."""
    batch, tokens, heads, _ = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    after = torch.full((tokens, tokens), float("-inf"), dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(after, q, k.transpose(1, 2), alpha=scale)
    out: Tensor = torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (batch, heads))
    return out.transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """torch's fused kernel; values are zero-padded to the key width, without which the CPU falls back to an unfused one."""
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    mask = None if visible is None else visible.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=visible is None, scale=scale
    )
    return out.transpose(1, 2)[..., :width]
