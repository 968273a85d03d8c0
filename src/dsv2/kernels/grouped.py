"""All routed experts of a layer on their rows, forward and backward written out.

One matrix product per expert writes straight into its slice of one buffer; what lies between the products runs once over all rows.
The backward gathers the rows again and recomputes the activation from the saved pre-activation: neither is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv2.kernels.autocast import compute_dtype
from dsv2.kernels.permute import add_copies


def slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for every expert that has any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _cast_one_by_one(stack: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Return a function from an expert to its matrix in ``dtype``, valid until it is asked for the next.

    All pass through one buffer, which stays in the cache: casting the whole stack would write it to memory and read it back.
    """
    if stack.dtype == dtype:
        return stack.__getitem__
    buffer = stack.new_empty(stack.shape[1:], dtype=dtype)
    return lambda expert: buffer.copy_(stack[expert])


class _StackGradient:
    """The gradient of a stack, expert by expert, from products in ``dtype``; zero for experts without rows."""

    def __init__(self, stack: Tensor, counts: Sequence[int], dtype: torch.dtype) -> None:
        self.total = torch.empty_like(stack)  # not cleared: products overwrite it
        self._buffer = None if stack.dtype == dtype else stack.new_empty(stack.shape[1:], dtype=dtype)
        for expert, count in enumerate(counts):
            if not count:
                self.total[expert].zero_()

    def put(self, expert: int, left: Tensor, right: Tensor) -> None:
        """Write left times right as the expert's gradient."""
        if self._buffer is None:
            torch.mm(left, right, out=self.total[expert])
        else:
            self.total[expert].copy_(torch.mm(left, right, out=self._buffer))


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
        ctx.x_dtype = x.dtype
        x = x.to(dtype)
        gate_up_of, down_of = _cast_one_by_one(gate_up, dtype), _cast_one_by_one(down, dtype)
        rows = x.index_select(0, order // copies)
        pre = rows.new_empty(len(rows), gate_up.shape[1])
        for expert, own in slices(counts):
            torch.mm(rows[own], gate_up_of(expert).t(), out=pre[own])
        gate, up = pre.chunk(2, dim=-1)
        scaled = F.silu(gate).mul_(up).mul_(weights.unsqueeze(-1).to(dtype))
        out = rows  # its inputs are not needed again
        for expert, own in slices(counts):
            torch.mm(scaled[own], down_of(expert).t(), out=out[own])
        ctx.save_for_backward(x, order, inverse, gate_up, down, weights, pre)
        ctx.copies, ctx.counts = copies, counts
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None, None, Tensor, Tensor, Tensor]:
        """Return the gradients of x, both stacks and the weights."""
        x, order, inverse, gate_up, down, weights, pre = ctx.saved_tensors
        gate_up_of, down_of = _cast_one_by_one(gate_up, x.dtype), _cast_one_by_one(down, x.dtype)
        grad_out, scale = grad_out.to(x.dtype).contiguous(), weights.unsqueeze(-1).to(x.dtype)
        gate, up = pre.chunk(2, dim=-1)
        activated = F.silu(gate)
        product = activated * up
        scaled = product * scale
        grad_down, grad_product = _StackGradient(down, ctx.counts, x.dtype), torch.empty_like(product)
        for expert, own in slices(ctx.counts):
            grad_down.put(expert, grad_out[own].t(), scaled[own])
            torch.mm(grad_out[own], down_of(expert), out=grad_product[own])
        grad_weights = product.mul_(grad_product).sum(dim=-1).to(weights.dtype)
        grad_product.mul_(scale)
        grad_pre = torch.empty_like(pre)
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad_product, up, out=scaled), gate, grad_input=grad_gate)
        torch.mul(grad_product, activated, out=grad_up)
        del activated, product, scaled, grad_product
        rows = x.index_select(0, order // ctx.copies)
        grad_gate_up, grad_rows = _StackGradient(gate_up, ctx.counts, x.dtype), torch.empty_like(rows)
        for expert, own in slices(ctx.counts):
            grad_gate_up.put(expert, grad_pre[own].t(), rows[own])
            torch.mm(grad_pre[own], gate_up_of(expert), out=grad_rows[own])
        grad_x = add_copies(grad_rows, inverse, ctx.copies).to(ctx.x_dtype)
        return grad_x, None, None, None, None, grad_gate_up.total, grad_down.total, grad_weights
