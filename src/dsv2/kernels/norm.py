"""RMSNorm with its backward written out: on a CPU a third of the time of torch's, and only the input is kept.

torch composes it of small operations there and keeps what lies between them. On a GPU it has a fused kernel, and without a gradient nothing
is kept anyway: those take torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Float[Tensor, "*rows size"], gain: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*rows size"]:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last dimension; ``x`` and ``gain`` are fp32 or fp64."""
    if x.device.type == "cpu" and torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad):
        out: Tensor = _RMSNorm.apply(x, gain, eps)
        return out
    return F.rms_norm(x, gain.shape, gain, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        out: Tensor = (x * inverse).mul_(gain)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / rms: grad_gain = sum grad n; grad_x = (grad gain - n mean(grad gain n)) / rms."""
        x, gain, inverse = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # the two sums below are matrix products to torch
            product = grad * x
            rows = product.reshape(-1, len(gain))
            grad_gain = torch.mv(rows.t(), inverse.flatten())
            along = torch.mv(rows, gain).view(inverse.shape).mul_(inverse).mul_(inverse).div_(len(gain))
            grad_x = torch.mul(grad, gain, out=product).addcmul_(x, along, value=-1).mul_(inverse)
        return grad_x, grad_gain, None
