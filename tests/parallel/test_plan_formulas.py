"""Single terms of the planner, each against a figure of its own: data sheets, exchange, activations, recompute, rates."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.parallel.hardware import load_hardware
from dsv2.parallel.layout import Layout, Stage, layer_parameters
from dsv2.parallel.memory import activation_items
from dsv2.parallel.routing import expected_devices
from dsv2.parallel.served import served_model
from dsv2.parallel.serving import ServeLayout, Traffic, plan_serving, weights_read
from dsv2.parallel.simulate import TrainPlan, simulate, stage_times
from dsv2.parallel.sync import exposed_seconds, sync_seconds
from dsv2.plan.options import EFFICIENCY
from dsv2.presets import preset

V2, H800 = preset("v2"), load_hardware("h800")
PAPER = Layout(16, 8, 16, "zb-h1", 1, 1, "selective", 1, 9216, 4096, EFFICIENCY, 4e9)
DP = ServeLayout(8, "dp", 8, 6, 8, 0.42, True, 4e9, None)
MIX = Traffic(1850, 925)


def plan(**changes: object) -> TrainPlan:
    return simulate(V2, replace(PAPER, **changes), H800)  # type: ignore[arg-type]


# The data sheets: bf16 and fp8 TFLOPS without sparsity, GB, TB/s, GB/s to the node in one direction, GB/s to other nodes, $ per hour.
@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "memory", "bandwidth", "intra", "inter", "price"),
    [
        ("h800", 989.4, 1978.9, 80, 3.35, 200, 50, 2.0),
        ("h100", 989.4, 1978.9, 80, 3.35, 450, 50, 2.5),
        ("h200", 989.4, 1978.9, 141, 4.8, 450, 50, 3.0),
        ("a100", 312, 0, 80, 2.039, 300, 25, 1.5),
        ("cpu", 0.41, 0, 25.77, 0.056, 56, 1.25, 0.1),
    ],
)
def test_rates_are_those_of_the_data_sheets(
    name: str, bf16: float, fp8: float, memory: float, bandwidth: float, intra: float, inter: float, price: float
) -> None:
    h = load_hardware(name)
    assert (h.bf16_flops / 1e12, h.fp8_flops / 1e12, h.memory_bytes / 1e9) == pytest.approx((bf16, fp8, memory))
    assert (h.memory_bandwidth / 1e12, h.intra_bandwidth / 1e9, h.inter_bandwidth / 1e9) == pytest.approx((bandwidth, intra, inter))
    assert (h.price_per_hour, h.gpus_per_node) == (price, 1 if name == "cpu" else 8)
    assert h.matrix_flops(8) == (h.fp8_flops or h.bf16_flops)


# Exchange among copies ------------------------------------------------------------------------------------------------------------


def test_an_exchange_goes_layer_by_layer() -> None:
    assert exposed_seconds(4.0, 8.0, layers=4, times=1) == 1, "hidden but for one layer's"
    assert exposed_seconds(4.0, 8.0, layers=4, times=10) == 1, "it runs on from one microbatch to the next"
    assert exposed_seconds(8.0, 4.0, layers=4, times=1) == 2 + 3 * 1, "one layer's, and of three others what exceeds a layer of compute"
    assert exposed_seconds(3.0, 8.0, layers=1, times=1) == 3, "one layer has nothing to hide behind"


seconds = st.floats(0, 10)


@given(seconds, seconds, seconds, st.integers(1, 8), st.integers(1, 20))
def test_more_to_exchange_never_takes_less(exchange: float, more: float, behind: float, layers: int, times: int) -> None:
    exposed = exposed_seconds(exchange, behind, layers, times)
    assert exposed <= exposed_seconds(exchange + more, behind, layers, times) + 1e-9
    assert exchange / layers <= exposed <= times * exchange + 1e-9


@pytest.mark.parametrize("dp", [1, 2, 16, 72])
def test_sync_never_falls_as_zero_moves_more(dp: int) -> None:
    """ZeRO-1, 2, 3 move 6, 2 + 4m, 8m bytes per parameter, ZeRO-0 8 at once: none of them is hidden better than ZeRO-1."""
    zero, one, two, three = (plan(zero=level, dp=dp) for level in range(4))
    m = one.layout.microbatches
    once = one.sync_links_seconds / 6
    sent = [found.sync_links_seconds / once for found in (zero, one, two, three)]
    assert sent == pytest.approx([8, 6, 2 + 4 * m, 8 * m])
    for less, more in ((one, zero), (one, two), (two, three), (zero, three)):
        assert less.cost["sync"] <= more.cost["sync"] + 1e-12
    assert three.cost["sync"] > 0


def test_sync_of_the_paper_layout_by_hand() -> None:
    """Rank 1: four MoE layers without embedding or head, 2.68e9 parameters of which 6 B each travel at 50 GB/s in part behind compute."""
    fixed, expert = layer_parameters(V2, moe=True)
    moved = 4 * (fixed * 127 / 128 + 20 * expert * 15 / 16) / 50e9
    assert sync_seconds(V2, PAPER, H800, Stage(0, 4, 0, 0), 1e9, 1e9) == pytest.approx((6 * moved, 6 * moved / 4))
    sent, exposed = sync_seconds(V2, PAPER, H800, Stage(0, 4, 0, 0), 0.0, 0.0)
    assert exposed == sent
    slow = H800.model_copy(update={"inter_bandwidth": 25e9})
    assert sync_seconds(V2, PAPER, slow, Stage(0, 4, 0, 0), 0.1, 0.2)[1] > sync_seconds(V2, PAPER, H800, Stage(0, 4, 0, 0), 0.1, 0.2)[1]


def test_copies_within_a_node_use_its_links() -> None:
    """Eight copies on eight GPUs of a node; with two nodes all of it is counted at the slow links' speed."""
    fixed, expert = layer_parameters(V2, moe=True)
    inside = sync_seconds(V2, replace(PAPER, dp=1), H800, Stage(0, 4, 0, 0), 1.0, 1.0)[0]
    assert inside == pytest.approx(6 * 4 * fixed * 7 / 8 / 200e9)
    outside = sync_seconds(V2, replace(PAPER, dp=2), H800, Stage(0, 4, 0, 0), 1.0, 1.0)[0]
    assert outside == pytest.approx(6 * 4 * (fixed * 15 / 16 + 20 * expert / 2) / 50e9)


# Memory and recompute ---------------------------------------------------------------------------------------------------------------


def test_activations_tensor_by_tensor() -> None:
    """Bytes per token of a layer of V2: d 5120, 128 heads of 192 and 128, latents 1536 and 576, 6 + 2 experts of 1536, 160 affinities."""
    attention = 2 * (5120 + 5120 + 1536 + 1536 + 24576 + 576 + 512 + 24576 + 16384 + 16384) + 4 * 128
    rows = 2 * (2.995 * 5120 + 6 * 5120)
    experts = 4 * 160 + rows + 2 * 6 * (3 * 1536) + 2 * (3 * 3072)
    items = activation_items(V2, 2.995, moe=True)
    assert sum(item.num_bytes for item in items) == pytest.approx(attention + 2 * 2 * 5120 + experts)
    kept = 2 * (5120 + 1536 + 576 + 16384 + 5120) + 4 * 128 + 4 * 160 + 2 * 2.995 * 5120 + 2 * 6 * 2 * 1536 + 2 * 2 * 3072
    assert sum(item.num_bytes for item in items if item.kept) == pytest.approx(kept)
    dense = activation_items(V2, 2.995, moe=False)
    assert sum(item.num_bytes for item in dense) == pytest.approx(attention + 2 * 2 * 5120 + 2 * 3 * 12288)
    assert not any("outputs of routed experts" in item.name for item in items), "a gate's gradient is <W_down^T dy, h>"


def test_zero_3_holds_the_gathered_weights_of_two_layers() -> None:
    fixed, expert = layer_parameters(V2, moe=True)
    gathered = plan(zero=3).memory[1].working - plan(zero=2).memory[1].working
    assert gathered == pytest.approx(2 * 2 * (fixed + expert * 160 / 8))


def test_full_recompute_repeats_the_forward_of_the_layers() -> None:
    """Attention included, head and embedding not."""
    stage, flops = Stage(0, 4, 0, 0), H800.bf16_flops * EFFICIENCY
    fixed, expert = layer_parameters(V2, moe=True)
    products = 2 * 4096 * 4 * (fixed + 6 * expert)
    attention = 4096 * 4 * 2 * 128 * (192 + 128) * 2048
    full = stage_times(V2, replace(PAPER, recompute="full"), H800, stage, None)
    assert full.recompute == pytest.approx((products + attention) / flops)
    assert full.recompute == pytest.approx(full.forward)
    some = stage_times(V2, PAPER, H800, stage, None)
    assert some.recompute == pytest.approx(2 * 4096 * 4 * (1536 * 128 * 192 + 512 * 128 * (128 + 128)) / flops)
    assert stage_times(V2, replace(PAPER, recompute="none"), H800, stage, None).recompute == 0
    assert expected_devices(V2, 8) == pytest.approx(2.995, abs=5e-4)


# Serving ----------------------------------------------------------------------------------------------------------------------------


def test_both_on_one_node_share_its_time() -> None:
    found = plan_serving(served_model(V2, "V2"), DP, MIX, H800)
    second = found.mixed_per_second / found.generated_per_second + 2 * found.mixed_per_second / found.prompt_per_second
    assert second == pytest.approx(1), "generating and reading two prompt tokens for each fill a second"


@pytest.mark.parametrize("prompt", [1000.0, 30_000.0, 100_000.0])
def test_a_request_lives_on_one_gpu_with_data_parallel_attention(prompt: float) -> None:
    found = plan_serving(served_model(V2, "V2"), DP, Traffic(prompt, 2), H800)
    assert found.batch % 8 == 0
    assert found.batch / 8 == int(found.capacity_tokens / 8 / (prompt + 1))
    assert plan_serving(served_model(V2, "V2"), DP, Traffic(1.4e6, 2), H800).batch == 0, "in one pool seven would fit"
    assert found.room == pytest.approx(found.capacity_tokens * 25_920 / 8)


def test_plain_tp_replicates_what_spec_2_4_says() -> None:
    v2, lite = served_model(V2, "V2"), served_model(preset("v2-lite"), "Lite")
    assert v2.replicated == 60 * (5120 * 1536 + 1536 + 5120 * 576 + 512)
    assert lite.replicated == 27 * (2048 * 576 + 512), "no query latent"
    tp = replace(DP, attention="tp")
    found = plan_serving(v2, tp, MIX, H800)
    assert found.weight_bytes == v2.parameters + 7 * v2.replicated
    assert weights_read(v2, tp, 1e9) == pytest.approx(v2.replicated + (v2.fixed + v2.routed - v2.replicated) / 8)
    one = replace(tp, batch=1)
    keys = MIX.resident * v2.decode_flops_per_key / 8 / H800.bf16_flops
    compute = 2 * (v2.replicated + (v2.activated - v2.replicated) / 8) / H800.fp8_flops
    assert plan_serving(v2, one, MIX, H800).decode.compute == pytest.approx(compute + keys)


def test_layouts_rise_with_what_they_move() -> None:
    """Slower links never make a step shorter."""
    steps = [simulate(V2, PAPER, H800.model_copy(update={"inter_bandwidth": rate})).step_seconds for rate in (200e9, 50e9, 10e9, 1e9)]
    assert all(fast < slow for fast, slow in pairwise(steps))
