"""Number formats of the engine's weights and cache, in plain torch: the definitions that the C++ kernels are compared with.

Weights in 8 and 4 bits: groups of 32 neighbouring columns share a bf16 scale, so a weight takes 8.5 or 4.5 bits; ``to_tiles`` lays them
out as the kernels read them. FP8: E4M3 values with one fp32 scale for each 128 x 128 block. Cache entries in 8 and 6 bits: spec 7.
"""

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Float32, Int8, UInt8
from torch import Tensor

GROUP = 32  # columns that share a scale
TILE = 16  # rows laid out side by side
FP8_BLOCK = 128
FP8_LARGEST = 448.0
_RANGE = {8: (-127, 127), 4: (-8, 7)}


def quantize_groups(weight: Float[Tensor, "rows cols"], bits: int) -> tuple[Int8[Tensor, "rows cols"], BFloat16[Tensor, "rows groups"]]:
    """Return codes and scales with weight = code * scale.

    8 bits: the largest magnitude of a group at 127 steps or just below (the scale is rounded up to bf16). 4 bits: of scales that put it
    at 6.5 to 9 steps, of either sign since the codes run from -8 to 7, each refitted to its codes, the one with the least squared error.
    """
    rows, cols = weight.shape
    groups = F.pad(weight.float(), (0, -cols % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    scale = _scale_above(largest / 127) if bits == 8 else _searched_scale(groups, largest)
    low, high = _RANGE[bits]
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    codes = (groups * inverse).round().clamp(low, high).to(torch.int8)
    return codes.flatten(1)[:, :cols].contiguous(), scale.squeeze(-1).to(torch.bfloat16)


def _scale_above(scale: Tensor) -> Tensor:
    """The least bf16 that is not below a scale, in fp32."""
    near = scale.to(torch.bfloat16)
    return torch.where(near.float() < scale, torch.nextafter(near, torch.full_like(near, torch.inf)), near).float()


def _searched_scale(groups: Tensor, largest: Tensor) -> Tensor:
    unit = torch.where(largest == 0, 0.0, 1.0 / largest)
    best, best_gain = torch.zeros_like(largest), torch.zeros_like(largest)
    for sign in (-1, 1):
        for quarter in range(26, 37):
            codes = (groups * (unit * (sign * quarter / 4))).round().clamp(-8, 7)
            product, square = (groups * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
            scale = torch.where(square == 0, 0.0, product / square)
            better = product * scale > best_gain
            best_gain = torch.where(better, product * scale, best_gain)
            best = torch.where(better, scale, best)
    return best.to(torch.bfloat16).float()


def dequantize_groups(codes: Int8[Tensor, "rows cols"], scales: BFloat16[Tensor, "rows groups"]) -> Float32[Tensor, "rows cols"]:
    """Return code * scale."""
    return codes.float() * scales.float().repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]


def to_tiles(
    codes: Int8[Tensor, "rows cols"], scales: BFloat16[Tensor, "rows groups"], bits: int
) -> tuple[UInt8[Tensor, " bytes"], BFloat16[Tensor, " scales"]]:
    """Lay codes out in tiles of 16 rows x 32 columns, filled up with zeros (kernels/cpu/source/matrix.h)."""
    rows, cols = codes.shape
    wide = F.pad(codes.int(), (0, -cols % GROUP, 0, -rows % TILE)) + (128 if bits == 8 else 8)
    tiles = wide.view(-1, TILE, wide.shape[1] // GROUP, GROUP).transpose(1, 2)  # [tile row, group, row, column]
    four = tiles.unflatten(-1, (-1, 4)).transpose(2, 3)  # [tile row, group, column / 4, row, column % 4]
    if bits == 4:
        four = four[:, :, 0::2] | four[:, :, 1::2] << 4
    padded = F.pad(scales.float(), (0, 0, 0, -rows % TILE)).to(torch.bfloat16)
    return four.to(torch.uint8).flatten(), padded.view(-1, TILE, padded.shape[1]).transpose(1, 2).flatten()


def from_tiles(
    data: UInt8[Tensor, " bytes"], scales: BFloat16[Tensor, " scales"], rows: int, cols: int, bits: int
) -> tuple[Int8[Tensor, "rows cols"], BFloat16[Tensor, "rows groups"]]:
    """Undo ``to_tiles``."""
    groups = -(-cols // GROUP)
    four = data.int().view(-1, groups, 8 if bits == 8 else 4, TILE, 4)
    if bits == 4:
        four = torch.stack((four & 15, four >> 4), dim=3).flatten(2, 3)
    codes = four.transpose(2, 3).flatten(3) - (128 if bits == 8 else 8)
    codes = codes.transpose(1, 2).reshape(-1, groups * GROUP)[:rows, :cols]
    return codes.to(torch.int8), scales.view(-1, groups, TILE).transpose(1, 2).reshape(-1, groups)[:rows]


def quantize_fp8(weight: Float[Tensor, "rows cols"]) -> tuple[Tensor, Float32[Tensor, "row_blocks col_blocks"]]:
    """Return E4M3 values and one scale per 128 x 128 block, as DeepSeek publishes them (weight and weight_scale_inv).

    weight = value * scale; the largest magnitude of a block at 448, a block of zeros with scale 1.

    Returns:
        Values (torch.float8_e4m3fn) [rows, cols]; scales.

    Raises:
        ValueError: a value is not finite.
    """
    rows, cols = weight.shape
    blocks = F.pad(weight.float(), (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = blocks.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))  # [row block, row, column block, column]
    scale = _fp8_scale(blocks.abs().amax(dim=(1, 3), keepdim=True))
    values = (blocks / scale).flatten(2).flatten(0, 1)[:rows, :cols]
    return values.contiguous().to(torch.float8_e4m3fn), scale[:, 0, :, 0]


def dequantize_fp8(values: Tensor, scales: Float32[Tensor, "row_blocks col_blocks"]) -> Float32[Tensor, "rows cols"]:
    """Return value * scale of its block."""
    rows, cols = values.shape
    return values.float() * scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :cols]


def quantize_fp8_rows(x: Float[Tensor, "*tokens cols"]) -> tuple[Tensor, Float32[Tensor, "*tokens col_blocks"]]:
    """Return activations in E4M3 with one scale per token and 128 columns, otherwise as ``quantize_fp8``.

    Raises:
        ValueError: a value is not finite.
    """
    cols = x.shape[-1]
    groups = F.pad(x.float(), (0, -cols % FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
    scale = _fp8_scale(groups.abs().amax(dim=-1, keepdim=True))
    return (groups / scale).flatten(-2)[..., :cols].to(torch.float8_e4m3fn), scale.squeeze(-1)


def dequantize_fp8_rows(values: Tensor, scales: Float32[Tensor, "*tokens col_blocks"]) -> Float32[Tensor, "*tokens cols"]:
    """Return value * scale of its token and columns."""
    return values.float() * scales.repeat_interleave(FP8_BLOCK, -1)[..., : values.shape[-1]]


def _fp8_scale(largest: Tensor) -> Tensor:
    """The scale that puts a magnitude at 448; not so small that dividing by it loses bits."""
    if not torch.isfinite(largest).all():  # a NaN comes out as one
        raise ValueError("a value is not finite")
    return torch.where(largest == 0, 1.0, (largest / FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny))


def round_latent_8(latent: Float[Tensor, "*tokens latent"]) -> Float32[Tensor, "*tokens latent"]:
    """Return what an 8-bit cache gives back: int8 in groups of 64 with a bf16 scale."""
    size = latent.shape[-1]
    groups = F.pad(latent.float(), (0, -size % 64)).unflatten(-1, (-1, 64))
    scale = _scale_above(groups.abs().amax(dim=-1, keepdim=True) / 127)
    codes = (groups * torch.where(scale == 0, 0.0, 1.0 / scale)).round()
    rounded: Tensor = (codes * scale).flatten(-2)[..., :size]
    return rounded


def round_latent_6(latent: Float[Tensor, "*tokens latent"]) -> Float32[Tensor, "*tokens latent"]:
    """Return what a 6-bit cache gives back: 4 bits in groups of 32, with an fp16 scale and a zero in sixteenths of a step (spec 7).

    4 + (16 + 8) / 32 = 4.75 bits a number; with 64 numbers of a key in bf16 beside 512 of a latent that makes 6.000.
    """
    groups = latent.float().unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).to(torch.float16).float()
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    zero = (-low * inverse * 16).round().clamp(max=255)
    codes = (groups * inverse + zero / 16).round().clamp(0, 15)
    rounded: Tensor = ((codes - zero / 16) * scale).flatten(-2)
    return rounded
