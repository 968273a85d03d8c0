"""Per-row int8 weights: the pure functions that define them, and a product that reads them as they are."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny  # a smaller scale has fewer bits, and values / scale could round to 128
_PIECE = 1 << 22  # elements widened to fp32 at a time: 16 MB beside the weight, however large it is


def quantize_rows(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, " out"]]:
    """Return int8 values and one fp32 scale per row: weight = values * scale, rounded to nearest, largest magnitude of a row at 127.

    Args:
        weight: any floating dtype.

    Raises:
        ValueError: a value is not finite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _PIECE // weight.shape[1])
    for piece, out, scale in zip(weight.split(rows), values.split(rows), scales.split(rows), strict=True):
        largest = piece.abs().amax(dim=1).float()  # a NaN comes out as one
        if not torch.isfinite(largest).all():
            raise ValueError("a value is not finite")
        scale.copy_(torch.where(largest > 0, (largest / 127).clamp_min_(_TINY), 1.0))
        out.copy_((piece / scale.unsqueeze(1)).round_())
    return values, scales


def dequantize_rows(values: Int8[Tensor, "out in"], scales: Float[Tensor, " out"], dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Return values * scale in ``dtype``."""
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows = max(1, _PIECE // values.shape[1])
    for piece, out, scale in zip(values.split(rows), weight.split(rows), scales.split(rows), strict=True):
        out.copy_(piece.float() * scale.unsqueeze(1))
    return weight


def int8_linear(x: Float[Tensor, "*rows in"], values: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]) -> Float[Tensor, "*rows out"]:
    """Return x (values * scale)^T in the dtype of ``x``; the weight is widened a piece of rows at a time, the scale goes on the result.

    An fp16 product of int8 values would overflow before the scale brings it back, so it is formed in fp32.
    """
    rows, dtype = max(1, _PIECE // values.shape[1]), torch.float32 if x.dtype == torch.float16 else x.dtype
    product = torch.cat([F.linear(x.to(dtype), piece.to(dtype)) for piece in values.split(rows)], dim=-1)
    return (product * scales).to(x.dtype)
