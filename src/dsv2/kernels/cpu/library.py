"""The compiled kernels through ctypes: the structures of source/model.h and the calls.

Sizes and ids are checked here and once more in C++; pointers are taken from tensors that the caller keeps alive.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache

import torch
from jaxtyping import BFloat16, Float, Float32, UInt8
from torch import Tensor

from dsv2.kernels.cpu.build import Unavailable, compiled, plan

BLOCK_LEN = 64  # tokens of a cache block


class Type(IntEnum):
    """How a matrix lies in memory (source/matrix.h)."""

    F32 = 0
    BF16 = 1
    I8 = 2
    I4 = 3


class CacheFormat(IntEnum):
    """How the latent cache stores an entry (source/layers.h)."""

    F32 = 0
    BF16 = 1
    EIGHT = 2
    SIX = 3


class Matrix(Structure):
    """A weight; all zero where a model has none."""

    _fields_ = [("type", c_int32), ("rows", c_int32), ("cols", c_int32), ("reserved", c_int32), ("data", c_void_p), ("scales", c_void_p)]


class Vector(Structure):
    """A norm's gain."""

    _fields_ = [("type", c_int32), ("size", c_int32), ("data", c_void_p)]


VECTORS = ("attention_norm", "query_norm", "latent_norm", "feed_forward_norm")
MATRICES = (
    "query_down", "query", "latent", "up", "key_up", "value_up", "out", "router", "gate", "up_gate", "down",
    "expert_gate_up", "expert_down",
)  # fmt: skip


class Layer(Structure):
    """The weights of a layer."""

    _fields_ = [
        *((name, Vector) for name in VECTORS),
        *((name, Matrix) for name in MATRICES),
        ("expert_stride", c_int32),
        ("expert_width", c_int32),
    ]


class Model(Structure):
    """Sizes and weights of a model."""

    _fields_ = [
        *((name, c_int32) for name in ("hidden", "layers", "heads", "nope", "rope", "value", "latent", "query_latent", "vocab")),
        *((name, c_int32) for name in ("experts", "chosen", "groups", "reachable", "renormalise")),
        *((name, c_float) for name in ("norm_eps", "latent_norm_eps", "softmax_scale", "rotation_scale", "gate_scale")),
        ("frequencies", c_void_p),
        ("layer", POINTER(Layer)),
        ("final_norm", Vector),
        ("embedding", Matrix),
        ("head", Matrix),
    ]


class Cache(Structure):
    """The latent cache."""

    _fields_ = [("format", c_int32), ("entry_bytes", c_int32), ("blocks", c_int32), ("reserved", c_int32), ("data", c_void_p)]


class Segment(Structure):
    """Neighbouring tokens of one sequence, attended to in one reading."""

    _fields_ = [("first_row", c_int32), ("rows", c_int32), ("position", c_int32), ("expanded", c_int32), ("table", c_void_p)]


class Step(Structure):
    """One step: tokens in, logits out."""

    _fields_ = [
        *((name, c_int32) for name in ("rows", "segments", "logit_rows", "want_experts")),
        *((name, c_void_p) for name in ("tokens", "positions", "segment", "logit_row", "logits", "best", "best_logit")),
        ("used", c_int32),
        ("reserved", c_int32),
        ("experts", c_void_p),
    ]


@cache
def library(variant: str | None = None, extra_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Return the loaded kernels, compiled first where they are not yet.

    Args:
        variant: see ``build.plan``, also for ``extra_flags``.

    Raises:
        Unavailable: no compiler, or what was compiled cannot be loaded.
    """
    file = compiled(plan(variant, extra_flags))
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise Unavailable(f"{file} cannot be loaded: {error}", hint="remove the file; it is compiled again") from error
    loaded.dsv2_open.argtypes, loaded.dsv2_open.restype = [POINTER(Model), c_int32], c_void_p
    loaded.dsv2_close.argtypes, loaded.dsv2_close.restype = [c_void_p], None
    loaded.dsv2_step.argtypes, loaded.dsv2_step.restype = [c_void_p, POINTER(Model), POINTER(Step), POINTER(Cache)], c_int32
    loaded.dsv2_pack.argtypes = [c_int32, c_int32, c_int32, c_int32, c_void_p, c_int64, c_void_p, c_void_p]
    loaded.dsv2_pack.restype = c_int32
    loaded.dsv2_multiply.argtypes, loaded.dsv2_multiply.restype = [POINTER(Matrix), c_void_p, c_int32, c_void_p], c_int32
    return loaded


def matrix(weight: Float[Tensor, "*rows cols"]) -> Matrix:
    """Describe a plain weight where it lies; leading dimensions are stacked rows.

    Raises:
        ValueError: it is neither fp32 nor bf16, or not contiguous in the CPU's memory.
    """
    return Matrix(_plain_type(weight), weight[..., 0].numel(), weight.shape[-1], 0, weight.data_ptr(), None)


def vector(gain: Float[Tensor, " size"]) -> Vector:
    """Describe a gain where it lies."""
    return Vector(_plain_type(gain), len(gain), gain.data_ptr())


def _plain_type(tensor: Tensor) -> Type:
    types = {torch.float32: Type.F32, torch.bfloat16: Type.BF16}
    if tensor.dtype not in types or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"native kernels read contiguous fp32 or bf16 in the CPU's memory, not {tensor.dtype} on {tensor.device}")
    return types[tensor.dtype]


def packed_matrix(rows: int, cols: int, kind: Type, data: UInt8[Tensor, " bytes"], scales: BFloat16[Tensor, " scales"]) -> Matrix:
    """Describe a quantised weight where its tiles lie."""
    return Matrix(kind, rows, cols, 0, data.data_ptr(), scales.data_ptr())


def multiply(weight: Matrix, x: Float32[Tensor, "count cols"], lib: ctypes.CDLL) -> Float32[Tensor, "count rows"]:
    """Return x W^T as a step computes it: for quantised weights x is rounded to 8 bits in groups of 32, for bf16 weights to bf16."""
    if x.shape[1] != weight.cols:
        raise ValueError(f"rows of {x.shape[1]} numbers cannot be multiplied by a weight of {weight.cols} columns")
    x, y = x.contiguous(), torch.full((len(x), weight.rows), torch.nan)
    if lib.dsv2_multiply(ctypes.byref(weight), x.data_ptr(), len(x), y.data_ptr()) != 0:
        raise MemoryError(f"a product of {len(x)} x {weight.cols} x {weight.rows} ran out of memory")
    return y


def tiles(rows: int, cols: int) -> int:
    """Return the number of 16 x 32 tiles that a quantised matrix fills."""
    return -(-rows // 16) * -(-cols // 32)


def empty_tiles(rows: int, cols: int, kind: Type) -> tuple[UInt8[Tensor, " bytes"], BFloat16[Tensor, " scales"]]:
    """Return the data and scales of a quantised matrix of zeros."""
    count = tiles(rows, cols)
    return torch.zeros(count * (256 if kind == Type.I4 else 512), dtype=torch.uint8), torch.zeros(count * 16, dtype=torch.bfloat16)


def pack_into(
    weight: Float[Tensor, "rows cols"], kind: Type, row: int, data: UInt8[Tensor, " bytes"], scales: BFloat16[Tensor, " scales"]
) -> None:
    """Quantise a matrix into the tiles of a taller one, from row ``row`` on, a multiple of 16 (source/matrix.h).

    Raises:
        ValueError: a value is not finite.
        Unavailable: there are no native kernels here.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    weight = weight.contiguous()
    (rows, cols), first = weight.shape, tiles(row, weight.shape[1])
    room = data[first * (256 if kind == Type.I4 else 512) :], scales[first * 16 :]
    if row % 16 or tiles(rows, cols) * 16 > len(room[1]):
        raise ValueError(f"{rows} rows from row {row} on are beyond the matrix")
    if library().dsv2_pack(kind, rows, cols, _plain_type(weight), weight.data_ptr(), cols, room[0].data_ptr(), room[1].data_ptr()) != 0:
        raise ValueError("a value is not finite")
