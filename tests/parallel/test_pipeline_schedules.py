"""Bubbles and microbatches held, against an event simulation of each schedule written out operation by operation."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.parallel.schedules import SCHEDULES, bubble_fraction, bubble_seconds, microbatches_held, split_layers

Op = tuple[str, int, int]  # F, B or W; stage, chunks counted apart; microbatch


def one_forward_one_backward(stages: int, microbatches: int) -> list[list[Op]]:
    orders = []
    for stage in range(stages):
        warm = min(stages - stage, microbatches)
        order: list[Op] = [("F", stage, i) for i in range(warm)]
        for i in range(microbatches):
            order += [("B", stage, i), ("W", stage, i)]
            if warm + i < microbatches:
                order.append(("F", stage, warm + i))
        orders.append(order)
    return orders


def zero_bubble(stages: int, microbatches: int, warm: Callable[[int], int], lag: Callable[[int], int]) -> list[list[Op]]:
    """W follows its B after `lag` others (Qi et al., figure 3)."""
    orders = []
    for stage in range(stages):
        first = min(warm(stage), microbatches)
        order: list[Op] = [("F", stage, i) for i in range(first)]
        for i in range(microbatches):
            order.append(("B", stage, i))
            if i >= lag(stage):
                order.append(("W", stage, i - lag(stage)))
            if first + i < microbatches:
                order.append(("F", stage, first + i))
        done = max(0, microbatches - lag(stage))
        orders.append(order + [("W", stage, i) for i in range(done, microbatches)])
    return orders


def interleaved(stages: int, microbatches: int, chunks: int) -> list[list[Op]]:
    def place(k: int, rank: int, backward: bool) -> tuple[int, int]:
        chunk = k % (stages * chunks) // stages
        return (chunks - 1 - chunk if backward else chunk) * stages + rank, k // (stages * chunks) * stages + k % stages

    total, orders = microbatches * chunks, []
    for rank in range(stages):
        warm = min((stages - rank - 1) * 2 + (chunks - 1) * stages + 1, total)
        order: list[Op] = [("F", *place(k, rank, False)) for k in range(warm)]
        for k in range(total):
            stage, i = place(k, rank, True)
            order += [("B", stage, i), ("W", stage, i)]
            if warm + k < total:
                order.append(("F", *place(warm + k, rank, False)))
        orders.append(order)
    return orders


def run(orders: list[list[Op]], last: int, cost: dict[str, float], whole_backward: bool) -> tuple[list[float], list[float]]:
    """Carry out the orders; return when each rank starts and ends."""
    done: dict[Op, float] = {}
    starts, clock, at = [-1.0] * len(orders), [0.0] * len(orders), [0] * len(orders)
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        before = sum(at)
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                kind, stage, i = op = order[at[rank]]
                needs: list[Op] = []
                if kind == "F" and stage:
                    needs = [("F", stage - 1, i)]
                if kind == "B":
                    needs = [("F", stage, i)] + ([("W" if whole_backward else "B", stage + 1, i)] if stage < last else [])
                if any(need not in done for need in needs):
                    break
                begin = max([clock[rank], *(done[need] for need in needs)])
                starts[rank] = begin if starts[rank] < 0 else starts[rank]
                clock[rank] = done[op] = begin + cost[kind]
                at[rank] += 1
        assert sum(at) > before, "deadlock"
    return starts, clock


def most_held(order: list[Op]) -> int:
    """Microbatches, or chunks of them, between their F and their W."""
    held = peak = 0
    for kind, _, _ in order:
        held += {"F": 1, "B": 0, "W": -1}[kind]
        peak = max(peak, held)
    return peak


times = st.floats(min_value=0.1, max_value=3)
sizes = st.integers(1, 9)
counts = st.integers(1, 30)


@given(sizes, counts, times, times, times)
def test_1f1b_takes_as_long_as_simulated(p: int, m: int, f: float, b: float, w: float) -> None:
    orders = one_forward_one_backward(p, m)
    _, ends = run(orders, p - 1, {"F": f, "B": b, "W": w}, whole_backward=True)
    assert max(ends) - m * (f + b + w) == pytest.approx(bubble_seconds("1f1b", p, m, f, b, w), abs=1e-9)
    assert [most_held(order) for order in orders] == [microbatches_held("1f1b", p, rank, m) for rank in range(p)]


@given(sizes, st.integers(1, 4), st.integers(2, 4), times, times)
def test_interleaving_takes_as_long_as_simulated(p: int, rounds: int, v: int, f: float, b: float) -> None:
    m = p * rounds
    orders = interleaved(p, m, v)
    _, ends = run(orders, p * v - 1, {"F": f / v, "B": b / v, "W": 0.0}, whole_backward=True)
    assert max(ends) - m * (f + b) == pytest.approx(bubble_seconds("interleaved", p, m, f, b, 0.0, v), abs=1e-9)
    for rank in range(p if p > 1 else 0):
        assert most_held(orders[rank]) / v <= microbatches_held("interleaved", p, rank, m, v)


# The figures' orders are optimal where no operation is longer than the others together allow; equal and mildly unequal times are such.
near = st.floats(min_value=0.9, max_value=1.1)


@given(sizes, counts, near, near, st.floats(min_value=0.5, max_value=0.9))
def test_zb_h1_takes_as_long_as_simulated(p: int, m: int, f: float, b: float, w: float) -> None:
    orders = zero_bubble(p, m, lambda rank: p - rank, lambda rank: rank)
    _, ends = run(orders, p - 1, {"F": f, "B": b, "W": w}, whole_backward=False)
    assert max(ends) - m * (f + b + w) == pytest.approx(bubble_seconds("zb-h1", p, m, f, b, w), abs=1e-9)
    assert all(most_held(order) <= microbatches_held("zb-h1", p, rank, m) for rank, order in enumerate(orders))


@given(sizes, counts, st.floats(min_value=0.5, max_value=0.9))
def test_zb_h2_takes_as_long_as_simulated(p: int, m: int, w: float) -> None:
    orders = zero_bubble(p, m, lambda rank: 2 * (p - rank) - 1, lambda rank: 2 * rank)
    starts, ends = run(orders, p - 1, {"F": 1.0, "B": 1.0, "W": w}, whole_backward=False)
    span = max(end - start for start, end in zip(starts, ends, strict=True))
    assert span - m * (2 + w) == pytest.approx(bubble_seconds("zb-h2", p, m, 1.0, 1.0, w), abs=1e-9)
    assert all(most_held(order) <= microbatches_held("zb-h2", p, rank, m) for rank, order in enumerate(orders))


def test_published_formulas_and_tables() -> None:
    f = b = w = 1.0
    assert bubble_fraction(bubble_seconds("1f1b", 16, 64, f, b, w), 64, 3.0) == pytest.approx(15 / 79)
    assert bubble_fraction(bubble_seconds("interleaved", 16, 64, f, b, w, 2), 64, 3.0) == pytest.approx(15 / (2 * 64 + 15))
    assert bubble_seconds("zb-h1", 16, 64, f, b, w) == 15  # a third of 1F1B's 45
    assert bubble_seconds("zb-h2", 16, 64, f, b, w) == 0


@given(sizes, counts, times, times, times)
def test_bubbles_shrink_with_microbatches_and_zero_bubble_is_never_worse(p: int, m: int, f: float, b: float, w: float) -> None:
    idle = {name: bubble_seconds(name, p, m, f, b, w, 2 if name == "interleaved" else 1) for name in SCHEDULES}
    assert 0 <= idle["zb-h2"] <= idle["zb-h1"] <= idle["1f1b"]
    assert idle["interleaved"] <= idle["1f1b"]
    for name, bubble in idle.items():
        shares = [bubble_fraction(bubble_seconds(name, p, n, f, b, w), n, f + b + w) for n in (m, 2 * m, 10**6 * m)]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] < 1e-3
        if p == 1:
            assert bubble == 0


def test_sixty_layers_on_sixteen_stages() -> None:
    split = split_layers(60, 16)
    assert sorted(split) == [3] * 4 + [4] * 12
    assert (split[0], split[-1]) == (3, 3)


@given(st.integers(1, 200), st.integers(1, 64))
def test_layers_are_split_evenly(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(ConfigError, match=f"{layers} layers do not fill {stages} pipeline stages"):
            split_layers(layers, stages)
        return
    split = split_layers(layers, stages)
    assert (sum(split), len(split)) == (layers, stages)
    assert max(split) - min(split) <= 1
    assert split[-1] == min(split)
