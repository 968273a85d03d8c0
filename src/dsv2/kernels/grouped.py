"""All routed experts of a layer on their rows, forward and backward written out.

One matrix product per expert writes straight into its slice of one buffer; what lies between the products runs once over all rows.
The backward recomputes the activation from the saved pre-activation instead of keeping it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for every expert that has any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _swiglu(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return silu(gate), up and their product from the stacked pre-activation."""
    gate, up = pre.chunk(2, dim=-1)
    activated = F.silu(gate)
    return activated, up, activated * up


def compute_dtype(rows: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on: matrix products written with ``out=`` do not follow it by themselves."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


def _stack_for_gradients(stack: Tensor, counts: Sequence[int]) -> Tensor:
    """Return memory like ``stack``, zero for experts without rows only: the others' products overwrite it."""
    gradients = torch.empty_like(stack)
    for expert, count in enumerate(counts):
        if not count:
            gradients[expert].zero_()
    return gradients


class GroupedSwiGLU(torch.autograd.Function):
    """See ``kernels.grouped_swiglu``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        """Run the experts; only the pre-activation is kept."""
        dtype = compute_dtype(rows)
        ctx.row_dtype = rows.dtype
        rows, gate_up, down = rows.to(dtype), gate_up.to(dtype), down.to(dtype)
        pre = rows.new_empty(len(rows), gate_up.shape[1])
        for expert, own in slices(counts):
            torch.mm(rows[own], gate_up[expert].t(), out=pre[own])
        scaled = _swiglu(pre)[2].mul_(weights.unsqueeze(-1).to(dtype))
        out = rows.new_empty(len(rows), down.shape[1])
        for expert, own in slices(counts):
            torch.mm(scaled[own], down[expert].t(), out=out[own])
        ctx.save_for_backward(rows, gate_up, down, weights, pre)
        ctx.counts = counts
        return out.to(ctx.row_dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        """Return the gradients of rows, both stacks and the weights."""
        rows, gate_up, down, weights, pre = ctx.saved_tensors
        grad_out = grad_out.to(rows.dtype).contiguous()
        activated, up, product = _swiglu(pre)
        scale = weights.unsqueeze(-1).to(rows.dtype)
        scaled = product * scale
        grad_down, grad_scaled = _stack_for_gradients(down, ctx.counts), torch.empty_like(product)
        for expert, own in slices(ctx.counts):
            torch.mm(grad_out[own].t(), scaled[own], out=grad_down[expert])
            torch.mm(grad_out[own], down[expert], out=grad_scaled[own])
        grad_weights = (grad_scaled * product).sum(dim=-1, dtype=weights.dtype)
        grad_product = grad_scaled.mul_(scale)
        gate = pre.chunk(2, dim=-1)[0]
        grad_pre = torch.empty_like(pre)
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_product * up, gate))
        torch.mul(grad_product, activated, out=grad_up)
        grad_gate_up, grad_rows = _stack_for_gradients(gate_up, ctx.counts), torch.empty_like(rows)
        for expert, own in slices(ctx.counts):
            torch.mm(grad_pre[own].t(), rows[own], out=grad_gate_up[expert])
            torch.mm(grad_pre[own], gate_up[expert], out=grad_rows[own])
        return grad_rows.to(ctx.row_dtype), None, grad_gate_up.to(weights.dtype), grad_down.to(weights.dtype), grad_weights
