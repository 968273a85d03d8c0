"""E4M3 with scales per 128 x 128 block of a weight and per 128 columns of a token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.kernels.formats import FP8_LARGEST, dequantize_fp8, dequantize_fp8_rows, quantize_fp8, quantize_fp8_rows

BOTH: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "weights": (quantize_fp8, dequantize_fp8, 128), "activations": (quantize_fp8_rows, dequantize_fp8_rows, 1),
}  # fmt: skip
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[torch.isfinite(E4M3)]


@pytest.mark.parametrize("kind", BOTH)
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**16), st.floats(-36, 36), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_the_error_is_half_a_step_of_the_nearest_value(
    kind: str, rows: int, cols: int, seed: int, exponent: float, dtype: torch.dtype
) -> None:
    quantize, dequantize, height = BOTH[kind]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, cols, generator=generator) * 10**exponent * torch.rand(rows, cols, generator=generator) ** 8).to(dtype)
    values, scales = quantize(x)
    assert values.shape == x.shape and scales.shape == (-(-rows // height), -(-cols // 128)) and scales.dtype == torch.float32
    wide = scales.double().repeat_interleave(height, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    error = (dequantize(values, scales).double() - x.double()).abs()
    # three bits behind the leading one: half a step is 2^-4 of the value; below 2^-6 steps are 2^-9
    assert (error <= torch.maximum(x.double().abs() * 2**-4, wide * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("power", [-20, 0, 13])
def test_what_the_format_holds_comes_back_exactly(kind: str, power: int) -> None:
    quantize, dequantize, _ = BOTH[kind]
    x = E4M3[torch.randint(0, len(E4M3), (200, 300), generator=torch.Generator().manual_seed(0))]
    x[::7, ::11] = FP8_LARGEST  # in every block and group
    x[:, 0] = x[:, 128] = x[:, 256] = -FP8_LARGEST
    x = x * 2.0**power
    values, scales = quantize(x)
    assert torch.equal(dequantize(values, scales), x) and (scales == 2.0**power).all()


@pytest.mark.parametrize("kind", BOTH)
def test_a_block_has_its_own_scale(kind: str) -> None:
    quantize, dequantize, height = BOTH[kind]
    x = torch.zeros(130, 257)
    x[129, 256], x[0, 128] = 1e-3, 7e4
    values, scales = quantize(x)
    assert torch.allclose(dequantize(values, scales), x, rtol=1e-6) and dequantize(values, scales)[0, 128] == pytest.approx(7e4)
    expected = torch.ones_like(scales)
    expected[129 // height, 2], expected[0, 1] = 1e-3 / FP8_LARGEST, 7e4 / FP8_LARGEST
    assert torch.allclose(scales, expected)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 3e-38])
def test_the_smallest_numbers_do_not_become_infinite(kind: str, tiny: float) -> None:
    quantize, dequantize, _ = BOTH[kind]
    values, scales = quantize(torch.full((3, 5), tiny))
    assert torch.isfinite(dequantize(values, scales)).all() and dequantize(values, scales).max() <= tiny * 1.1


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    x = torch.randn(130, 140)
    x[129, 139] = bad
    with pytest.raises(ValueError, match="not finite"):
        BOTH[kind][0](x)


def test_activations_of_any_rank() -> None:
    x = torch.randn(2, 3, 4, 130)
    values, scales = quantize_fp8_rows(x)
    assert scales.shape == (2, 3, 4, 2) and torch.allclose(dequantize_fp8_rows(values, scales), x, rtol=2**-4, atol=2**-9)
