"""Rotary embedding on interleaved pairs and YaRN (P section 3.1.4; the YaRN code's ramp, not its paper's)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def base_frequencies(dim: int, base: float) -> Tensor:
    """theta_j = base^(-2j/dim) for j = 0 .. dim/2 - 1, in radians per token (RoPE)."""
    return torch.tensor([base ** (-2 * j / dim) for j in range(dim // 2)], dtype=torch.float64)


def correction_dimension(rotations: float, dim: int, base: float, original_len: int) -> float:
    """The (fractional) pair index whose frequency turns `rotations` times in `original_len` tokens (Y, find_correction_dim)."""
    return dim * math.log(original_len / (2 * math.pi * rotations)) / (2 * math.log(base))


def correction_range(dim: int, base: float, original_len: int, beta_fast: float, beta_slow: float) -> tuple[int, int]:
    """Pair indices between which YaRN blends: (floor for beta_fast rotations, ceil for beta_slow), clamped (Y, find_correction_range)."""
    low = math.floor(correction_dimension(beta_fast, dim, base, original_len))
    high = math.ceil(correction_dimension(beta_slow, dim, base, original_len))
    return max(low, 0), min(high, dim - 1)


def yarn_frequencies(dim: int, base: float, factor: float, original_len: int, beta_fast: float, beta_slow: float) -> Tensor:
    """theta'_j = theta_j (1 - ramp_j) + theta_j / factor * ramp_j, the ramp linear in j (Y section 3.2, code)."""
    low, high = correction_range(dim, base, original_len, beta_fast, beta_slow)
    width = high - low if high != low else 0.001
    blended = []
    for j, theta in enumerate(base_frequencies(dim, base).tolist()):
        ramp = min(max((j - low) / width, 0.0), 1.0)
        blended.append(theta * (1 - ramp) + theta / factor * ramp)
    return torch.tensor(blended, dtype=torch.float64)


def mscale(factor: float, weight: float) -> float:
    """m(x) = 0.1 x ln(factor) + 1 for factor > 1, else 1 (P section 3.1.4: sqrt(t) = 0.0707 ln s + 1)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(config: Mapping[str, Any]) -> Tensor:
    """The frequencies of a config.json: plain RoPE, or YaRN at every length when `rope_scaling` is set."""
    dim, base, scaling = config["qk_rope_head_dim"], config["rope_theta"], config.get("rope_scaling")
    if scaling is None:
        return base_frequencies(dim, base)
    return yarn_frequencies(
        dim, base, scaling["factor"], scaling["original_max_position_embeddings"], scaling["beta_fast"], scaling["beta_slow"]
    )


def amplitude(config: Mapping[str, Any]) -> float:
    """Factor on cos and sin: m(mscale) / m(mscale_all_dim), exactly 1 for every published config (spec 5.2)."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return 1.0
    return mscale(scaling["factor"], scaling["mscale"]) / mscale(scaling["factor"], scaling["mscale_all_dim"])


def softmax_scale(config: Mapping[str, Any]) -> float:
    """1 / sqrt(d_h + d_h^R) (P eq 18), times m(mscale_all_dim) squared under YaRN: on all dimensions, not only the rotary ones."""
    scale = 1 / math.sqrt(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    scaling = config.get("rope_scaling")
    if scaling is None:
        return scale
    return scale * mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def rotate(x: Tensor, position: int, theta: Tensor, amplitude: float = 1.0) -> Tensor:
    """RoPE(x) at one position (P eq 14, 15): dimensions (2j, 2j+1) are one complex number, turned by position * theta_j."""
    rotated = []
    for j, theta_j in enumerate(theta.tolist()):
        cos, sin = amplitude * math.cos(position * theta_j), amplitude * math.sin(position * theta_j)
        real, imaginary = x[..., 2 * j], x[..., 2 * j + 1]
        rotated += [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return torch.stack(rotated, dim=-1)


def rotate_half_split(x: Tensor, position: int, theta: Tensor) -> Tensor:
    """The other convention (spec 1.4): dimensions (j, j + dim/2) are one complex number; equal to `rotate` up to the order."""
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = torch.cos(position * theta), torch.sin(position * theta)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


def deinterleave(x: Tensor) -> Tensor:
    """[0, 1, 2, 3, ...] -> [0, 2, 4, ..., 1, 3, 5, ...]: from the checkpoint's order to the half-split one (spec 1.4)."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
