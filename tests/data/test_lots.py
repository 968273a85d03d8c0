"""Lots: a number that belongs to a global sample, whatever batch, rank or resume it is seen in."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.data.order import canonical, drawn_by_content, lots
from dsv2.train.dropping import DroppingSection, step_dropping

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(first=st.integers(0, 2**40), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 2**63 - 1))
def test_any_cut_of_the_samples_gives_the_same_lots(first, sizes, seed):
    whole = lots(np.arange(first, first + sum(sizes)), seed=seed)
    assert ((whole >= 0) & (whole < 1)).all()
    section, start = DroppingSection(capacity_factor=1.0, protected_share=0.3), first
    pieces = []
    for size in sizes:
        dropping = step_dropping(section, seed=seed, first_sample=start, num_samples=size, device=CPU)
        assert dropping is not None
        pieces += dropping.protected.tolist()
        start += size
    assert pieces == (whole < 0.3).tolist()


def test_lots_are_even_and_differ_by_seed():
    samples = np.arange(100_000)
    first, second = lots(samples, seed=0), lots(samples, seed=1)
    assert np.histogram(first, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 10_000), rel=0.05)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.02
    assert (first < 0.1).mean() == pytest.approx(0.1, abs=0.004)


def test_a_content_has_its_side_of_a_split_however_it_is_written():
    contents = [{"content": f"{n} \ud800", "role": "user"} for n in range(2000)]
    drawn = [drawn_by_content(canonical(content), 0.3) for content in contents]
    assert sum(drawn) == pytest.approx(600, abs=60)
    assert drawn == [drawn_by_content(canonical(dict(reversed(content.items()))), 0.3) for content in contents]
    assert not any(drawn_by_content(canonical(content), 0.0) for content in contents)


def test_without_a_capacity_nothing_is_dropped_and_shares_reach_both_ends():
    assert step_dropping(DroppingSection(), seed=0, first_sample=0, num_samples=4, device=CPU) is None
    for share in (0.0, 1.0):
        section = DroppingSection(capacity_factor=1.0, protected_share=share)
        dropping = step_dropping(section, seed=0, first_sample=5, num_samples=50, device=CPU)
        assert dropping is not None and dropping.protected.float().mean() == share
