"""Pre-training arithmetic: cross entropy, bits per byte, learning rate, batch ramp, gradient clip, AdamW (P section 3.1.2; spec 4.1)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean of -ln softmax(W h_t)[label_t] over the tokens whose label is not -100."""
    losses = []
    for h, label in zip(hidden, labels.tolist(), strict=True):
        if label != IGNORE:
            logits = weight @ h
            losses.append(torch.logsumexp(logits, dim=0) - logits[label])
    return torch.stack(losses).mean()


def bits_per_byte(total_nll: float, num_bytes: int) -> float:
    """Total negative log-likelihood in nats over ln 2 times the UTF-8 bytes of the text (P section 3.2.1, Pile-test)."""
    return total_nll / (math.log(2) * num_bytes)


def learning_rate(
    step: int,
    tokens: float,
    *,
    peak: float,
    warmup_steps: int,
    total_tokens: float,
    decay_points: Sequence[float] = (0.6, 0.9),
    decay_factor: float = 0.316,
) -> float:
    """Linear from 0 to `peak` over the warm-up steps, then times `decay_factor` at each share of the tokens (P section 3.1.2).

    `step` counts updates from 1: the rate is 0 before the first update and `peak` at update number `warmup_steps`.
    """
    rate = peak * min(step / warmup_steps, 1.0) if warmup_steps else peak
    for share in decay_points:
        if tokens >= share * total_tokens:
            rate *= decay_factor
    return rate


def cosine_rate(step: int, tokens: float, *, peak: float, warmup_steps: int, total_tokens: float, final_share: float = 0.1) -> float:
    """Warm-up as above, times a half cosine over the tokens from 1 to `final_share` (Coder-V2 report, section 3.2)."""
    rate = peak * min(step / warmup_steps, 1.0) if warmup_steps else peak
    angle = math.pi * min(tokens / total_tokens, 1.0)
    return rate * (final_share + (1.0 - final_share) * (1.0 + math.cos(angle)) / 2.0)


def batch_size(tokens: float, *, start: int, end: int, ramp_tokens: float, multiple: int = 1) -> int:
    """Sequences per batch, linear in consumed tokens from `start` to `end` at `ramp_tokens`, rounded to a multiple (spec 10.10)."""
    share = min(tokens / ramp_tokens, 1.0) if ramp_tokens else 1.0
    return round((start + (end - start) * share) / multiple) * multiple


def clip(gradients: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """All gradients times min(1, max_norm / ||all gradients||), and that global norm (P section 3.1.2: 1.0)."""
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    return [g * factor for g in gradients], norm


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW update, `step` counted from 1; decay on matrices only (P section 3.1.2; spec 10.11).

    Returns:
        The new parameter, first and second moment.
    """
    decay = weight_decay if parameter.dim() >= 2 else 0.0
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    unbiased_first = first / (1 - beta1**step)
    unbiased_second = second / (1 - beta2**step)
    parameter = parameter - rate * decay * parameter
    return parameter - rate * unbiased_first / (torch.sqrt(unbiased_second) + eps), first, second
