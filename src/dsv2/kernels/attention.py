"""Softmax attention of many heads, by what serves the shape: blocks of plain products, or torch's fused kernel.

On a CPU the fused kernel reaches a fraction of the processor's matrix rate. Causal attention over rows of some hundred tokens is faster as
a few batched products per block of queries, each over the keys up to the block's end, with the backward written out: 1.5 times in fp32,
three to five times in bf16, whose fast products the fused kernel hardly uses. Long rows, masks and GPUs go to the fused kernel; so do odd
lengths in bf16, whose products are compiled for their exact shape on first use while cut documents bring a new length with every batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 128  # queries
_BLOCKED_UP_TO = 1024  # tokens; the probabilities of all pairs are kept for the backward
_BF16_MULTIPLE = 64  # tokens


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
    if visible is not None or not _blocks_serve(q):
        return _fused(q, k, v, scale, visible)
    batch, _, heads, _ = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out: Tensor = BlockedCausalAttention.apply(q, k, v, scale).unflatten(0, (batch, heads))
    return out.transpose(1, 2)


def _blocks_serve(q: Tensor) -> bool:
    regular = q.dtype != torch.bfloat16 or q.shape[1] % _BF16_MULTIPLE == 0
    return q.device.type == "cpu" and q.shape[1] <= _BLOCKED_UP_TO and regular and q.dtype != torch.float16


class BlockedCausalAttention(torch.autograd.Function):
    """Causal attention on [heads, tokens, width]; a block of queries meets the keys up to its own end, so the rest is never computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend block by block; the softmax computes in fp32 or better and rounds its result."""
        tokens = q.shape[1]
        out = q.new_empty(*q.shape[:2], v.shape[2])
        after = q.new_full((_BLOCK, _BLOCK), float("-inf")).triu_(1)
        blocks = []
        for start in range(0, tokens, _BLOCK):
            end = min(tokens, start + _BLOCK)
            bias = F.pad(after[: end - start, : end - start], (start, 0))
            scores = torch.baddbmm(bias, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale)
            blocks.append(scores.softmax(dim=-1))
            out[:, start:end] = torch.bmm(blocks[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *blocks)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of queries, keys and values from the kept probabilities."""
        q, k, v, *blocks = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast(q.device.type, enabled=False):  # products in the dtype of the forward pass, wherever this is called
            for start, probabilities in zip(range(0, q.shape[1], _BLOCK), blocks, strict=True):
                end = min(q.shape[1], start + _BLOCK)
                grad_out = grad[:, start:end].contiguous()
                grad_v[:, :end].baddbmm_(probabilities.transpose(1, 2), grad_out)
                towards = torch.bmm(grad_out, v[:, :end].transpose(1, 2))
                scores = torch.ops.aten._softmax_backward_data(towards, probabilities, -1, probabilities.dtype)
                grad_q[:, start:end] = torch.bmm(scores, k[:, :end]).mul_(ctx.scale)
                grad_k[:, :end].baddbmm_(scores.transpose(1, 2), q[:, start:end], alpha=ctx.scale)
        return grad_q, grad_k, grad_v, None


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
