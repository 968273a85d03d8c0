"""Per-row int8: the error of rounding is at most half a step, at any scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.kernels import quantize
from dsv2.kernels.quantize import dequantize_rows, int8_linear, quantize_rows


def matrix(rows, columns, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-30, 30, (rows, 1), generator=generator)
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_rounding_stays_within_half_a_step(rows, columns, seed, dtype):
    weight = matrix(rows, columns, seed, dtype)
    values, scales = quantize_rows(weight)
    error = (dequantize_rows(values, scales, torch.float64) - weight.double()).abs()
    assert (error <= scales.double().unsqueeze(1) * 0.5001).all()
    assert (values.int().abs().amax(dim=1) == 127).all()
    again, scales_again = quantize_rows(dequantize_rows(values, scales, torch.float32))
    assert torch.equal(again, values)
    assert torch.allclose(scales_again, scales, rtol=1e-6)


def test_pieces_make_no_difference(monkeypatch):
    weight, x = matrix(50, 8, 3).clamp(-5, 5), torch.randn(3, 8)
    values, scales = quantize_rows(weight)
    product = int8_linear(x, values, scales)
    monkeypatch.setattr(quantize, "_PIECE", 24)
    assert all(torch.equal(a, b) for a, b in zip(quantize_rows(weight), (values, scales), strict=True))
    assert torch.allclose(int8_linear(x, values, scales), product, rtol=1e-5, atol=1e-5)
    assert torch.allclose(product, x @ dequantize_rows(values, scales, torch.float32).T, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_and_of_the_smallest_numbers():
    weight = torch.tensor([[0.0, 0.0], [1e-45, -1e-45], [1e-38, 3e-39]])
    values, scales = quantize_rows(weight)
    assert values.int().abs().max() <= 127
    assert torch.isfinite(scales).all()
    assert torch.equal(dequantize_rows(values, scales, torch.float32)[0], torch.zeros(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(torch.tensor([[1.0, 2.0], [bad, 0.0]]))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_narrow_activations_neither_overflow_nor_lose_small_scales(dtype, rtol):
    for spread in (0.02, 1e-6):
        weight = spread * torch.randn(16, 5120, generator=torch.Generator().manual_seed(1))
        x = torch.full((1, 5120), 3.0, dtype=dtype)
        values, scales = quantize_rows(weight)
        expected = (x.double() @ dequantize_rows(values, scales, torch.float64).T).abs()
        found = int8_linear(x, values, scales).double().abs()
        assert torch.allclose(found, expected, rtol=rtol, atol=rtol * expected.max().item())
