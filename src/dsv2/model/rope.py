"""Rotary positions on interleaved pairs, and YaRN's frequencies (section 3.1.4; spec 1.4 and 5).

Dimensions (2j, 2j+1) form one pair that turns by position * theta_j. The order stays interleaved, also in the cache.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv2.model.config import ModelConfig, YarnScaling

Rotation = tuple[Float[Tensor, "batch tokens rope"], Float[Tensor, "batch tokens rope"]]


def rope_frequencies(config: ModelConfig) -> Float[Tensor, " pairs"]:
    """Return theta_j in radians per token, fp32, one per pair; with YaRN the slow ones are divided by its factor.

    fp32 throughout, as DeepSeek trained: at position 100,000 the rounding of theta_j already turns a pair by 0.006 rad, so a "better" fp64
    table would be another function. Always on the CPU, so that a model laid out on the meta device has them.
    """
    dim = config.qk_rope_head_dim
    theta = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if config.rope_scaling is None:
        return theta
    ramp = yarn_ramp(config.rope_scaling, dim, config.rope_theta)
    return theta * (1 - ramp) + theta / config.rope_scaling.factor * ramp


def yarn_ramp(yarn: YarnScaling, dim: int, theta: float) -> Float[Tensor, " pairs"]:
    """Return the share of interpolation per pair: 0 leaves a frequency alone, 1 divides it by the factor.

    Linear in the dimension index, with floor and ceil, as in all published code (the YaRN paper's eq 18 is linear in rotations; spec 10.4).
    """

    def dimension_of(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = float(min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1))
    if high == low:
        high += 0.001  # a step instead of a division by zero
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def rotation(positions: Int[Tensor, "batch tokens"], frequencies: Float[Tensor, " pairs"], scale: float) -> Rotation:
    """Return, for each dimension, the factors of itself and of its partner in the turn by position * theta_j.

    Args:
        positions: absolute, counted from 0.
        frequencies: theta_j, radians per token.
        scale: factor on both (``config.rotation_scale``, 1.0 in DeepSeek's models).

    Returns:
        own: cos, twice per pair.
        partner: -sin for the even dimension of a pair, +sin for the odd one.
    """
    angle = positions.unsqueeze(-1).to(frequencies.dtype) * frequencies
    cos, sin = (angle.cos(), angle.sin()) if scale == 1.0 else (angle.cos() * scale, angle.sin() * scale)
    return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Float[Tensor, "batch tokens *heads rope"], rotation: Rotation) -> Float[Tensor, "batch tokens *heads rope"]:
    """Turn each interleaved pair of ``x`` by its angle, in fp32 (eq 14 and 15); returns the dtype of ``x``."""
    own, partner = rotation
    if x.dim() == 4:  # a head axis between tokens and dimensions
        own, partner = own.unsqueeze(2), partner.unsqueeze(2)
    out: Tensor = _Rotate.apply(x, own, partner) if torch.is_grad_enabled() else _turn(x, own, partner)
    return out


def _turn(x: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned: Tensor = swapped.mul_(partner).addcmul_(wide, own).to(x.dtype)
    return turned


class _Rotate(torch.autograd.Function):
    """A turn, whose gradient is the turn back: nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(own, partner)
        return _turn(x, own, partner)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own, partner = ctx.saved_tensors
        return _turn(grad, own, -partner), None, None
