"""The head and its cross-entropy in one operation, over a piece of the tokens at a time.

The logits of a batch are the largest tensor of a small model's training step. Here a piece of them exists at a time, and the gradient
is formed while it does, so nothing is kept or computed twice. In fine-tuning most rows may be without a label: they are left out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE_ELEMENTS = 1 << 20  # logits held at once: 4 MiB in fp32, which stays in a core's caches
_PIECE_ROWS = 256  # but no fewer rows: each piece adds to the whole gradient of the weight
_WORTH_GATHERING = 0.75  # share of rows with a label from which all are taken: of packed text nearly all have one
_TILE = 64  # rows gathered are a multiple of it: a bf16 product is compiled for every new shape on a CPU


class LinearCrossEntropy(torch.autograd.Function):
    """See ``kernels.linear_cross_entropy``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, dtype: torch.dtype, need_grad: bool) -> Tensor:
        """Sum the loss, and form both gradients on the way where they are needed."""
        shape, chosen = hidden.shape, _labelled(labels, ignore)
        if chosen is not None:
            hidden, labels = hidden.index_select(0, chosen), labels.index_select(0, chosen)
        cast_hidden, cast_weight = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight) if need_grad and not len(hidden) else None
        total = hidden.new_zeros((), dtype=torch.float64)
        size = max(_PIECE_ROWS, _PIECE_ELEMENTS // len(weight))
        for start in range(0, len(hidden), size):
            piece = slice(start, start + size)
            nll, grad_logits = _piece(cast_hidden[piece] @ cast_weight.t(), labels[piece], ignore, need_grad)
            total += nll
            if grad_hidden is not None and grad_logits is not None:
                grad_logits = grad_logits.to(dtype)
                grad_hidden[piece] = grad_logits @ cast_weight
                grad_weight = _accumulate(grad_weight, grad_logits, cast_hidden[piece], weight.dtype)
        if chosen is not None and grad_hidden is not None:
            grad_hidden = hidden.new_zeros(shape).index_copy_(0, chosen, grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Scale the gradients that the forward pass left, in place: a second backward through this loss is refused by torch."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss.to(grad_hidden.dtype)), grad_weight.mul_(grad_loss.to(grad_weight.dtype)), None, None, None, None


def _labelled(labels: Tensor, ignore: int) -> Tensor | None:
    """Return the rows that have a label, and some others that fill a tile up; None where leaving the rest out is not worth it."""
    count = int((labels != ignore).sum())
    if count > _WORTH_GATHERING * len(labels):
        return None
    return (labels == ignore).to(torch.int8).argsort(stable=True)[: -(-count // _TILE) * _TILE]


def _accumulate(total: Tensor | None, grad_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Add one piece's gradient of the weight to the total; the first piece makes it, so that it is never cleared."""
    if total is None:
        return (grad_logits.t() @ hidden).to(dtype)
    if hidden.dtype == dtype:
        return total.addmm_(grad_logits.t(), hidden)
    return total.add_(grad_logits.t() @ hidden)


def _piece(logits: Tensor, labels: Tensor, ignore: int, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of some rows, in fp64, and its gradient for the logits (softmax minus one-hot).

    The normaliser is read off the largest probability, which is at least 1/vocabulary and so never underflows: one softmax does for both.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counted = labels != ignore
    target = labels.where(counted, 0).unsqueeze(-1)
    probabilities = logits.softmax(dim=-1, dtype=wide)
    log_norm = logits.amax(dim=-1).to(wide) - probabilities.amax(dim=-1).log()
    nll = (log_norm - logits.gather(-1, target).squeeze(-1).to(wide)).double().where(counted, 0.0).sum()
    if not need_grad:
        return nll, None
    probabilities.scatter_add_(-1, target, probabilities.new_full((), -1.0).expand_as(target))
    return nll, probabilities if bool(counted.all()) else probabilities.where(counted.unsqueeze(-1), 0.0)
