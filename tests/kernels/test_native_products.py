"""The C++ kernels against the definitions in torch, for every variant that this processor has, over odd shapes and numbers of rows."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.kernels.cpu import library as native
from dsv2.kernels.cpu.build import VARIANTS, Unavailable, cpu_features, plan
from dsv2.kernels.cpu.library import Type, empty_tiles, pack_into, packed_matrix
from dsv2.kernels.formats import dequantize_groups, from_tiles, quantize_groups, to_tiles

HERE = [name for name, (needed, _) in VARIANTS.items() if needed <= cpu_features()]
try:
    plan()
except Unavailable as reason:
    pytest.skip(f"no native kernels: {reason}", allow_module_level=True)


@pytest.fixture(scope="module", params=HERE)
def lib(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return native.library(request.param)


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """What an int8 product sees of its activations: groups of 32 on 127 steps."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups * torch.where(scale == 0, 0.0, 1 / scale)).round() * scale).flatten(1)[:, : x.shape[1]]


SHAPE = st.tuples(st.integers(1, 70), st.integers(1, 150), st.integers(1, 13), st.integers(0, 2**16))


@settings(deadline=None, max_examples=40)
@given(SHAPE, st.sampled_from([torch.float32, torch.bfloat16]))
def test_plain_weights(lib: ctypes.CDLL, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, cols, count, seed = shape
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, cols, generator=generator).to(dtype), torch.randn(count, cols, generator=generator)
    y = native.multiply(native.matrix(weight), x, lib)
    expected = x.to(dtype).double() @ weight.double().T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * cols**0.5)


@settings(deadline=None, max_examples=40)
@given(SHAPE, st.sampled_from([4, 8]))
def test_quantised_weights(lib: ctypes.CDLL, shape: tuple[int, int, int, int], bits: int) -> None:
    rows, cols, count, seed = shape
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, cols, generator=generator), torch.randn(count, cols, generator=generator)
    codes, scales = quantize_groups(weight, bits)
    data, laid = to_tiles(codes, scales, bits)
    y = native.multiply(packed_matrix(rows, cols, Type.I4 if bits == 4 else Type.I8, data, laid), x, lib)
    expected = rounded_rows(x).double() @ dequantize_groups(codes, scales).double().T
    # a value half-way between two steps may go either way: one step of one activation
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=0.02 * weight.abs().max().item() + 1e-4)
    assert (y.double() - expected).abs().median() < 1e-4 * cols**0.5


@pytest.mark.parametrize("kind", list(Type))
def test_a_row_does_not_depend_on_the_rows_beside_it(lib: ctypes.CDLL, kind: Type) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 96, generator=generator), torch.randn(29, 96, generator=generator)
    if kind in (Type.F32, Type.BF16):
        weight = weight.to(torch.bfloat16) if kind == Type.BF16 else weight
        matrix = native.matrix(weight)
    else:
        data, scales = empty_tiles(48, 96, kind)
        pack_into(weight, kind, 0, data, scales)
        matrix = packed_matrix(48, 96, kind, data, scales)
    alone = torch.cat([native.multiply(matrix, row[None], lib) for row in x])
    for count in range(1, 30):
        assert torch.equal(native.multiply(matrix, x[:count], lib), alone[:count])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**16), st.sampled_from([4, 8]), st.booleans())
def test_packing_follows_its_definition(rows: int, cols: int, seed: int, bits: int, narrow: bool) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[rows // 2] = 0
    source = weight.to(torch.bfloat16) if narrow else weight
    kind = Type.I4 if bits == 4 else Type.I8
    data, scales = empty_tiles(rows, cols, kind)
    pack_into(source, kind, 0, data, scales)
    ours = dequantize_groups(*from_tiles(data, scales, rows, cols, bits))
    defined = dequantize_groups(*quantize_groups(source, bits))
    if bits == 8:  # the same scales; a value half-way between two steps may go either way
        codes, found = from_tiles(data, scales, rows, cols, 8)
        assert torch.equal(found, quantize_groups(source, 8)[1])
        assert ((codes.int() - quantize_groups(source, 8)[0]).abs() <= 1).all() and torch.allclose(ours, source.float(), atol=2e-3)
    error, least = ((values - source.float()).square().sum() for values in (ours, defined))
    # of two scales that fit equally well either may win, and then be rounded to bf16
    assert error <= least + 4e-3 * source.float().square().sum()
    codes, found = from_tiles(*to_tiles(*quantize_groups(source, bits), bits), rows, cols, bits)
    assert torch.equal(dequantize_groups(codes, found), defined)


def test_searched_scales_beat_plain_rounding() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    groups = weight.unflatten(1, (-1, 32))
    plain_scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / plain_scale).round().clamp(-8, 7) * plain_scale - groups).square().mean()
    searched = (dequantize_groups(*quantize_groups(weight, 4)) - weight).square().mean()
    assert searched < 0.8 * plain


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_packed(bad: float) -> None:
    weight = torch.randn(20, 40)
    weight[17, 33] = bad
    with pytest.raises(ValueError, match="not finite"):
        pack_into(weight, Type.I4, 0, *empty_tiles(20, 40, Type.I4))
