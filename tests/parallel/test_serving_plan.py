"""Serving planned: the memory figures, the published throughput from one traffic mix, and what must hold for any."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.parallel.fit import fit_traffic
from dsv2.parallel.hardware import load_hardware
from dsv2.parallel.served import served_dense, served_model
from dsv2.parallel.serving import ServeLayout, ServePlan, Traffic, cache_tokens_beside_one_copy, plan_serving, weights_read
from dsv2.plan.options import read_serve
from dsv2.presets import PRESETS, preset

H800 = load_hardware("h800")
V2, DENSE = served_model(preset("v2"), "V2"), served_dense(DEEPSEEK_67B, "67B")
DP = ServeLayout(8, "dp", 8, 6, 8, 0.42, True, 4e9, None)
TP = replace(DP, attention="tp")
DENSE_TP = replace(TP, weight_bits=16, cache_bits=16, compute_bits=16)
MIX = Traffic(1850, 925)


def both(traffic: Traffic, utilisation: float) -> tuple[ServePlan, ServePlan]:
    return (
        plan_serving(V2, replace(DP, utilisation=utilisation), traffic, H800),
        plan_serving(DENSE, replace(DENSE_TP, utilisation=utilisation), traffic, H800),
    )


def test_memory_left_and_tokens_held() -> None:
    """Spec 7: 404 GB left; 15.6M tokens partitioned, 1.95M replicated, 1.30M for DeepSeek 67B in 16 bit."""
    left, tokens = cache_tokens_beside_one_copy(V2, DP, H800)
    assert left == 640e9 - 235_741_434_880
    assert left / 1e9 == pytest.approx(404.26, abs=0.01)
    assert tokens / 1e6 == pytest.approx(15.6, abs=0.01)
    assert cache_tokens_beside_one_copy(V2, TP, H800)[1] / 1e6 == pytest.approx(1.95, abs=0.005)
    assert cache_tokens_beside_one_copy(DENSE, DENSE_TP, H800)[1] / 1e6 == pytest.approx(1.30, abs=0.005)
    plan = plan_serving(V2, DP, MIX, H800)
    assert plan.cache_token_bytes == 25_920
    assert plan_serving(V2, TP, MIX, H800).cache_token_bytes == 8 * 25_920
    assert plan_serving(DENSE, DENSE_TP, MIX, H800).cache_token_bytes == 389_120


def test_parameters_are_counted_once() -> None:
    assert V2.parameters == 235_741_434_880
    assert V2.activated == 20_851_512_320
    assert DENSE.parameters == DEEPSEEK_67B.parameters
    for name in PRESETS:
        served = served_model(preset(name), name)
        assert served.fixed > served.head > 0


def test_one_mix_and_one_utilisation_give_the_published_throughput() -> None:
    ours, theirs = both(MIX, 0.42)
    assert ours.generated_per_second > 50e3
    assert ours.prompt_per_second > 100e3
    assert ours.generated_per_second / theirs.generated_per_second == pytest.approx(5.76, rel=0.25)
    plain = plan_serving(V2, TP, MIX, H800)
    assert plain.generated_per_second < 0.3 * 50e3
    assert plain.decode.limit == "memory"


def test_the_shipped_mix_is_the_fitted_one() -> None:
    fit = fit_traffic(both)
    assert fit is not None
    options = read_serve(preset("v2"), [])
    assert (fit.traffic, fit.utilisation) == (Traffic(options.prompt_tokens, options.output_tokens), options.utilisation)
    assert fit.error < 0.02


def test_the_ratio_holds_where_the_traffic_is_unknown() -> None:
    """The fit is not a knife's edge: within 25 % for mean contexts from 700 to 5,000 tokens."""
    for resident in (700, 1000, 1500, 2000, 3000, 4000, 5000):
        ours, theirs = both(Traffic(0.8 * resident, 0.4 * resident), 0.42)
        assert ours.generated_per_second / theirs.generated_per_second == pytest.approx(5.76, rel=0.25)


@given(
    st.sampled_from(["dp", "tp"]), st.sampled_from([1, 2, 4, 8, 16]), st.floats(50, 20_000), st.floats(50, 20_000), st.floats(0.05, 1),
    st.booleans(),
)  # fmt: skip
def test_what_holds_for_any_traffic(attention: str, gpus: int, prompt: float, output: float, share: float, overlap: bool) -> None:
    layout = replace(DP, gpus=gpus, attention=attention, utilisation=share, overlap=overlap)  # type: ignore[arg-type]
    plan = plan_serving(V2, layout, Traffic(prompt, output), H800)
    if not plan.fits:
        assert plan.generated_per_second == plan.prompt_per_second == plan.mixed_per_second == 0
        return
    used = plan.weight_bytes + plan.batch * plan.traffic.resident * plan.cache_token_bytes + gpus * layout.reserve_bytes
    assert used <= plan.memory_bytes
    roof = plan.decode
    assert roof.seconds == (max if overlap else sum)((roof.compute, roof.memory, roof.communication))  # type: ignore[operator]
    # no faster than the matrix units and the memories allow
    assert plan.generated_per_second * 2 * V2.activated <= gpus * H800.fp8_flops * share * 1.0001
    assert plan.user_per_second * plan.batch == pytest.approx(plan.generated_per_second)
    assert plan.mixed_per_second < plan.generated_per_second
    smaller = plan_serving(V2, replace(layout, batch=max(1, plan.batch // 2)), plan.traffic, H800)
    assert smaller.generated_per_second <= plan.generated_per_second * 1.0001
    assert smaller.user_per_second >= plan.user_per_second * 0.9999
    doubled = plan_serving(V2, replace(layout, utilisation=share / 2), plan.traffic, H800)
    assert doubled.generated_per_second == pytest.approx(plan.generated_per_second / 2)


def test_one_token_reads_what_it_activates() -> None:
    one = replace(DP, gpus=1, weight_bits=16)
    assert weights_read(V2, one, 1) == pytest.approx(2 * V2.activated)
    assert weights_read(V2, one, 1e6) == pytest.approx(2 * (V2.fixed + V2.routed))
    assert weights_read(DENSE, replace(DENSE_TP, gpus=8), 1) == DENSE.fixed * 2 / 8


def test_a_cache_with_heads_is_cut_as_far_as_they_go() -> None:
    assert plan_serving(DENSE, replace(DENSE_TP, gpus=16), MIX, H800).cache_copies == 2
    assert plan_serving(DENSE, replace(DENSE_TP, gpus=4), MIX, H800).cache_copies == 1


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (replace(DP, gpus=3), "gpus = 3, attention=dp: ep = 3 does not cut 160 routed experts in 8 groups"),
        (replace(TP, gpus=3), "128 heads do not divide by 3 GPUs with attention=tp"),
    ],
)
def test_what_does_not_divide_is_refused_in_serving(layout: ServeLayout, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_serving(V2, layout, MIX, H800)
    assert says in error.value.message
