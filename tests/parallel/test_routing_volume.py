"""Devices that a token reaches: exact expectations against brute force, and the bound of device-limited routing."""

import random
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.parallel.routing import expected_devices, expected_distinct, experts_touched
from dsv2.presets import preset


def moe(experts: int, chosen: int, groups: int = 1, reach: int = 1) -> ModelConfig:
    method = "group_limited_greedy" if groups > 1 else "greedy"
    sizes = {"n_routed_experts": experts, "num_experts_per_tok": chosen, "n_group": groups, "topk_group": reach, "topk_method": method}
    return preset("nano", **sizes)


def reached(order: tuple[int, ...], config: ModelConfig, devices: int, limited: bool) -> int:
    """Devices of one token: `order` ranks the experts by affinity; groups count by their best expert (spec 3.2)."""
    experts, chosen = len(order), config.num_experts_per_tok or 0
    size = experts // config.n_group
    groups = list(dict.fromkeys(expert // size for expert in order))
    kept = set(groups[: config.topk_group] if limited and config.topk_method != "greedy" else groups)
    best = [expert for expert in order if expert // size in kept][:chosen]
    return len({expert // (experts // devices) for expert in best})


@pytest.mark.parametrize(
    ("experts", "chosen", "groups", "reach", "devices"),
    [
        (6, 2, 3, 1, 3),
        (6, 3, 3, 2, 3),
        (6, 3, 3, 2, 6),
        (6, 3, 2, 1, 6),
        (8, 3, 4, 2, 2),
        (8, 4, 4, 2, 4),
        (8, 3, 2, 1, 4),
        (6, 2, 1, 1, 3),
    ],
)
def test_expectation_is_the_mean_over_all_orders(experts: int, chosen: int, groups: int, reach: int, devices: int) -> None:
    config = moe(experts, chosen, groups, reach)
    for limited in (True, False):
        seen = [reached(order, config, devices, limited) for order in permutations(range(experts))]
        assert expected_devices(config, devices, limited=limited) == pytest.approx(sum(seen) / len(seen), rel=1e-12)


def test_v2_by_sampling() -> None:
    config, rng = preset("v2"), random.Random(0)
    orders = [tuple(rng.sample(range(160), 160)) for _ in range(4000)]
    for devices in (2, 8, 16):
        for limited in (True, False):
            mean = sum(reached(order, config, devices, limited) for order in orders) / len(orders)
            assert expected_devices(config, devices, limited=limited) == pytest.approx(mean, rel=0.02)


def test_v2_reaches_three_of_eight() -> None:
    config = preset("v2")
    assert expected_devices(config, 8) == pytest.approx(2.995, abs=5e-4)
    assert expected_devices(config, 8, limited=False) == pytest.approx(8 * (1 - 0.44267), abs=1e-3)


@settings(max_examples=50)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(1, 8), st.data())
def test_limited_routing_never_exceeds_its_bound(groups: int, per_group: int, reach: int, data: st.DataObject) -> None:
    reach = min(reach, groups)
    chosen = data.draw(st.integers(1, min(8, reach * per_group)))
    config = moe(groups * per_group, chosen, groups, reach)
    limited, unlimited = expected_devices(config, groups), expected_devices(config, groups, limited=False)
    assert 1 <= limited <= min(reach, chosen) + 1e-12
    assert limited <= unlimited + 1e-12
    assert expected_devices(config, 1) == 1


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_distinct_bins(bins: int, per_bin: int, data: st.DataObject) -> None:
    draws = data.draw(st.integers(1, bins * per_bin))
    found = expected_distinct(bins, per_bin, draws)
    assert 1 - 1e-9 <= found <= min(bins, draws) + 1e-9
    assert expected_distinct(bins, per_bin, bins * per_bin) == bins


def test_experts_touched_rise_to_all() -> None:
    config = preset("v2")
    assert experts_touched(config, 0) == 0
    assert experts_touched(config, 1) == pytest.approx(6)
    assert experts_touched(config, 10_000) == pytest.approx(160)
    assert experts_touched(preset("nano", n_routed_experts=None), 5) == 0


@pytest.mark.parametrize(("config", "devices"), [(preset("v2"), 5), (preset("v2"), 3), (preset("v2-lite"), 6)])
def test_experts_that_do_not_divide_are_refused(config: ModelConfig, devices: int) -> None:
    with pytest.raises(ConfigError, match=f"ep = {devices} does not cut") as error:
        expected_devices(config, devices)
    assert "use ep = 1, 2, 4, 8, 16" in (error.value.hint or "")
