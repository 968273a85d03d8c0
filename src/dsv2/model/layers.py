"""The two plain parts of every block: RMSNorm and the SwiGLU feed-forward network."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2.kernels.autocast import compute_dtype
from dsv2.kernels.norm import rms_norm
from dsv2.kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension; the statistics are fp32 whatever the input's dtype (spec 2.1)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Return the normalised rows in the dtype of ``x``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), self.weight.to(wide), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): a dense feed-forward network, or all shared experts of a layer fused into one (spec 3.1)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Return the network's output, without residual."""
        x = x.to(compute_dtype(x))  # once for both products
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out
