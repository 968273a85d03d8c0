"""Speeds of both sides are compared where memory was as fast for both, and the table says where it was not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peer_tables import LLAMA, OURS, Figures, judge


def figures(ours, theirs) -> Figures:
    found = Figures("small 4.5")
    for side, given in ((OURS, ours), (LLAMA, theirs)):
        for value, reads, others in given:
            found.add(side, {"figures": {"decode b1": {"value": value, "reads": reads, "others": others}}})
    return found


SLOW, FAST, JUMPED, QUIET, DISTURBED = [34.0, 36.0], [58.0, 63.0], [35.0, 60.0], 0.01, 0.5


@pytest.mark.parametrize(
    "ours, theirs, ratio, alike",
    [
        ([(30.0, SLOW, QUIET), (50.0, FAST, QUIET)], [(25.0, FAST, QUIET), (40.0, FAST, DISTURBED)], 2.0, True),
        ([(30.0, SLOW, QUIET), (50.0, FAST, QUIET)], [(20.0, SLOW, QUIET), (25.0, FAST, QUIET)], 1.75, True),
        ([(30.0, SLOW, QUIET)], [(25.0, FAST, QUIET)], 1.2, False),
        ([(30.0, SLOW, QUIET)], [(25.0, JUMPED, QUIET)], 1.2, False),
        ([(30.0, SLOW, QUIET)], [(25.0, SLOW, DISTURBED)], None, False),
    ],
)
def test_a_peer_is_compared_where_memory_was_as_fast(ours, theirs, ratio, alike):
    assert figures(ours, theirs).over(LLAMA, "decode b1") == (ratio, alike)


def test_a_bar_says_that_memory_was_not_as_fast_for_both():
    found = figures([(30.0, SLOW, QUIET)], [(25.0, FAST, QUIET)])
    bar = next(bar for bar in judge({"small 4.5": found}) if bar.name == "decode_b1_small_4.5_over_llama.cpp")
    assert bar.outcome == "missed, memory not as fast for both"
