"""The head and the log-probabilities of given tokens in one operation, over a piece of the tokens at a time.

What reinforcement learning needs of the head: a number per token that has a gradient of its own. Logits exist a piece at a time; the
backward pass makes them again, so a batch never holds [tokens, vocabulary].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in fp32


class LinearLogProbs(torch.autograd.Function):
    """See ``kernels.linear_log_probs``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies; only the former carry a gradient."""
        cast_weight = weight.to(dtype)
        logprobs, entropies = [], []
        for piece in _pieces(len(hidden), len(weight)):
            logits = _wide(hidden[piece].to(dtype) @ cast_weight.t())
            norm = logits.logsumexp(dim=-1)
            logprobs.append(logits.gather(-1, tokens[piece].unsqueeze(-1)).squeeze(-1) - norm)
            entropies.append(norm - (logits.softmax(dim=-1) * logits).sum(dim=-1))
        out, entropy = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(entropy)
        return out, entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Form the logits again; their gradient is grad (one-hot - softmax)."""
        hidden, weight, tokens = ctx.saved_tensors
        cast_weight = weight.to(ctx.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for piece in _pieces(len(hidden), len(weight)):
            rows = hidden[piece].to(ctx.dtype)
            probabilities = _wide(rows @ cast_weight.t()).softmax(dim=-1)
            scale = grad[piece].unsqueeze(-1)
            grad_logits = (probabilities * -scale).scatter_add_(-1, tokens[piece].unsqueeze(-1), scale).to(ctx.dtype)
            grad_hidden[piece] = (grad_logits @ cast_weight).to(hidden.dtype)
            grad_weight += (grad_logits.t() @ rows).to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _pieces(rows: int, vocab: int) -> list[slice]:
    size = max(64, _PIECE_ELEMENTS // vocab)
    return [slice(start, start + size) for start in range(0, rows, size)] or [slice(0, 0)]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
