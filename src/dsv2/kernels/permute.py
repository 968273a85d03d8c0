"""Rows moved by a permutation, and copies of rows summed, with gradients that are gathers.

A gradient through ``index_select`` would scatter with additions; through these it is another gather, so it is faster and repeats bit for
bit with any number of threads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _PermuteRows.apply(grad, inverse, order), None, None


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return add_copies(rows, inverse, copies)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.copies), None, None, None


def add_copies(rows: Float[Tensor, "laid_out size"], inverse: Int[Tensor, " copies_of_rows"], copies: int) -> Float[Tensor, "rows size"]:
    """``sum_copies`` without a gradient."""
    return F.embedding_bag(inverse.view(-1, copies), rows, mode="sum")  # gathers and adds in one pass


def permute_rows(
    rows: Float[Tensor, "rows *rest"], order: Int[Tensor, " rows"], inverse: Int[Tensor, " rows"]
) -> Float[Tensor, "rows *rest"]:
    """Return ``rows[order]``; ``inverse`` is the inverse permutation of ``order``."""
    out: Tensor = _PermuteRows.apply(rows, order, inverse)
    return out


def sum_copies(
    rows: Float[Tensor, "laid_out size"], order: Int[Tensor, " laid_out"], inverse: Int[Tensor, " copies_of_rows"], copies: int
) -> Float[Tensor, "rows size"]:
    """Return for each row the sum of its ``copies`` copies, which lie in the order ``order``; ``inverse`` says where each lies."""
    out: Tensor = _SumCopies.apply(rows, order, inverse, copies)
    return out
