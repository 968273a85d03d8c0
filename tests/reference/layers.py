"""RMSNorm and SwiGLU, the two parts that every block shares."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) = x / sqrt(mean(x^2) + eps) * gain, over the last dim (P section 2, no equation number)."""
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * gain


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """FFN(x) = W_down (silu(W_gate x) * (W_up x)), the FFN of P eq 20 and of the dense layers; weights are [out, in]."""
    gated = x @ gate.T
    return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T
