"""All routed experts of a layer on their rows, forward and backward written out.

One matrix product per expert writes straight into its slice of one buffer; what lies between the products runs once over all rows.
The backward gathers the rows again and recomputes the activation from the saved pre-activation: neither is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.autocast import compute_dtype
from dsv2.kernels.permute import add_copies


def slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for every expert that has any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


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
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor,
        inverse: Tensor,
        copies: int,
        counts: Sequence[int],
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Run the experts; of what is as large as all rows, only the pre-activation is kept."""
        dtype = compute_dtype(x)
        ctx.dtypes = x.dtype, gate_up.dtype
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        rows = x.index_select(0, order // copies)
        pre = rows.new_empty(len(rows), gate_up.shape[1])
        for expert, own in slices(counts):
            torch.mm(rows[own], gate_up[expert].t(), out=pre[own])
        gate, up = pre.chunk(2, dim=-1)
        scaled = F.silu(gate).mul_(up).mul_(weights.unsqueeze(-1).to(dtype))
        out = rows  # its inputs are not needed again
        for expert, own in slices(counts):
            torch.mm(scaled[own], down[expert].t(), out=out[own])
        ctx.save_for_backward(x, order, inverse, gate_up, down, weights, pre)
        ctx.copies, ctx.counts = copies, counts
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None, None, Tensor, Tensor, Tensor]:
        """Return the gradients of x, both stacks and the weights."""
        x, order, inverse, gate_up, down, weights, pre = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad_out, scale = grad_out.to(x.dtype).contiguous(), weights.unsqueeze(-1).to(x.dtype)
        gate, up = pre.chunk(2, dim=-1)
        activated = F.silu(gate)
        product = activated * up
        scaled = product * scale
        grad_down, grad_product = _stack_for_gradients(down, ctx.counts), torch.empty_like(product)
        for expert, own in slices(ctx.counts):
            torch.mm(grad_out[own].t(), scaled[own], out=grad_down[expert])
            torch.mm(grad_out[own], down[expert], out=grad_product[own])
        grad_weights = product.mul_(grad_product).sum(dim=-1).to(weights.dtype)
        grad_product.mul_(scale)
        grad_pre = torch.empty_like(pre)
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad_product, up, out=scaled), gate, grad_input=grad_gate)
        torch.mul(grad_product, activated, out=grad_up)
        del activated, product, scaled, grad_product
        rows = x.index_select(0, order // ctx.copies)
        grad_gate_up, grad_rows = _stack_for_gradients(gate_up, ctx.counts), torch.empty_like(rows)
        for expert, own in slices(ctx.counts):
            torch.mm(grad_pre[own].t(), rows[own], out=grad_gate_up[expert])
            torch.mm(grad_pre[own], gate_up[expert], out=grad_rows[own])
        grad_x = add_copies(grad_rows, inverse, ctx.copies)
        return grad_x.to(x_dtype), None, None, None, None, grad_gate_up.to(weight_dtype), grad_down.to(weight_dtype), grad_weights
