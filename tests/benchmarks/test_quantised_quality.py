"""What the comparison of few bits rests on: which tokens are scored, what they are bytes of, its arithmetic, and its plain rounding."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from dsv2.kernels.formats import dequantize_groups, quantize_groups
from dsv2.presets import preset

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
quality = importlib.import_module("quantised_quality")


def test_each_label_is_scored_once_and_in_its_own_row() -> None:
    assert list(quality.windows_of(range(9), 4)) == [(0, 1, 2, 3, 4), (4, 5, 6, 7, 8)]
    assert list(quality.windows_of(range(8), 4)) == [(0, 1, 2, 3, 4)], "three labels are no whole row"
    assert quality.spread(3, 9) == [0, 3, 6] and quality.spread(9, 3) == [0, 1, 2]


def test_change_compares_every_row_with_itself() -> None:
    base = [10.0, 20.0, 90.0]
    assert quality.change_of([value + 4 * math.log(1.01) for value in base], base, 4) == pytest.approx((1.0, 0.0), abs=1e-9)
    change, error = quality.change_of([10.0, 20.0, 92.0], base, 2)
    ratio = math.exp(1 / 3)
    assert (change, error) == pytest.approx((100 * (ratio - 1), 100 * ratio / 3))


def test_bytes_count_where_their_tokens_do() -> None:
    windows = [quality.Window(domain, (0, 1), size) for domain, size in zip(quality.DOMAINS, (1, 2, 4, 8), strict=True)]
    found = quality.bits_per_byte([math.log(2) * 8] * 4, windows)
    assert list(found.values()) == pytest.approx([8.0, 4.0, 2.0, 1.0, 3.75]) and list(found)[-1] == "mean"


def test_the_cache_of_the_paper_has_the_bits_that_its_section_names() -> None:
    paper = preset("v2")  # 512 + 64 numbers a layer
    assert {cache: quality.number_bits(paper, cache) for cache in quality.CACHES} == pytest.approx(
        {"fp32": 32, "bf16": 16, "8": 8 * 656 / 576, "6": 6}
    )
    with pytest.raises(AssertionError, match="not 25920"):
        quality.checked_bytes(paper, "6", 25921)


def test_packing_finds_plainly_rounded_values_again() -> None:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    plain = quality.rounded_plainly(weight)
    assert torch.equal(dequantize_groups(*quantize_groups(plain, 4)), plain)
    searched = dequantize_groups(*quantize_groups(weight, 4))
    assert (searched - weight).square().sum() < 0.8 * (plain - weight).square().sum()
