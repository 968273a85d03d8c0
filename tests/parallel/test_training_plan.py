"""Training planned: published figures, sums that must hold, and layouts that must be refused."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.model.accounting import count_parameters, training_flops_per_token
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.parallel.hardware import Hardware, load_hardware
from dsv2.parallel.layout import Layout, stage_parameters, stages_of
from dsv2.parallel.memory import GRADIENT, OPTIMIZER, WEIGHT, activation_bytes, rank_memories
from dsv2.parallel.search import search, smallest_cluster
from dsv2.parallel.simulate import COST, TrainPlan, flops_per_token, mfu_from_gpu_hours, simulate
from dsv2.plan.options import EFFICIENCY
from dsv2.plan.train_sheets import explain
from dsv2.presets import preset

V2, H800 = preset("v2"), load_hardware("h800")
PAPER = Layout(16, 8, 16, "zb-h1", 1, 1, "selective", 1, 9216, 4096, EFFICIENCY, 4e9)


def plan(**changes: object) -> TrainPlan:
    return simulate(V2, replace(PAPER, **changes), H800)  # type: ignore[arg-type]


def test_published_mfu_and_saving() -> None:
    six, whole = flops_per_token(V2, 4096)
    assert six == pytest.approx(128.25e9, rel=1e-3)
    assert mfu_from_gpu_hours(six, 172.8e3, 989.4e12) == pytest.approx(0.208, abs=5e-4)
    assert mfu_from_gpu_hours(whole, 172.8e3, 989.4e12) == pytest.approx(0.257, abs=5e-4)
    dense = 6 * DEEPSEEK_67B.parameters
    assert mfu_from_gpu_hours(dense, 300.6e3, 989.4e12) == pytest.approx(0.378, abs=5e-4)
    assert mfu_from_gpu_hours(DEEPSEEK_67B.training_flops_per_token(4096), 300.6e3, 989.4e12) == pytest.approx(0.396, abs=5e-4)
    assert mfu_from_gpu_hours(6 * 67.0e9, 300.6e3, 989.4e12) == pytest.approx(0.375, abs=5e-4)
    assert round(100 * (1 - 172.8 / 300.6), 3) == 42.515


def test_the_paper_layout_costs_what_the_paper_says() -> None:
    """The efficiency is fitted to this, so it shows only that nothing has moved."""
    found = plan()
    assert found.fits
    assert found.layout.gpus == 2048
    assert found.gpu_hours_per_trillion == pytest.approx(172.8e3, rel=0.005)
    assert found.mfu == pytest.approx((0.208, 0.257), abs=2e-3)
    exchange = found.all_to_all
    assert exchange is not None
    assert (exchange.bound, exchange.inter_share) == (3, 0.0)
    assert exchange.token_bytes == pytest.approx(4 * 7 / 8 * 2.995 * 10240, rel=1e-4)
    assert 2 * exchange.seconds < exchange.shared_seconds, "the shared experts hide it (section 3.1.3)"


layouts = st.builds(
    replace,
    st.just(PAPER),
    pp=st.sampled_from([1, 2, 4, 16, 60]),
    ep=st.sampled_from([1, 2, 8, 16, 32]),
    dp=st.sampled_from([1, 2, 4]),
    schedule=st.sampled_from(["1f1b", "zb-h1", "zb-h2"]),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(["none", "selective", "full"]),
    micro_batch=st.sampled_from([1, 2]),
)


@settings(max_examples=60)
@given(layouts)
def test_parts_add_up(layout: Layout) -> None:
    found = simulate(V2, layout, H800)
    for memory in found.memory:
        kinds = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.working, memory.logits)
        assert memory.total == pytest.approx(sum(kinds) + memory.all_to_all + memory.reserve)
        assert min(kinds) >= 0
    assert set(found.cost) == set(COST)
    assert min(found.cost.values()) >= -1e-9
    forward, backward, weight = found.phases
    step = layout.microbatches * (forward + backward + weight) + found.cost["bubble"] + found.cost["sync"]
    assert found.step_seconds == pytest.approx(step)
    flops = training_flops_per_token(V2, 4096)
    assert found.mfu[1] <= layout.efficiency * flops / (flops - 6 * 524288000) * 1.0001, "6N counts the embedding, which is no product"


@settings(max_examples=60)
@given(layouts)
def test_shards_add_up_to_the_whole(layout: Layout) -> None:
    """All ranks together hold each state once where it is sharded, else once for each copy."""
    stages = stages_of(V2, layout)
    assert sum(stage.layers for stage in stages) == 60
    assert sum(sum(stage_parameters(V2, stage)) for stage in stages) == count_parameters(V2).total
    memories = rank_memories(V2, layout, stages)
    copied, experts = (sum(values) for values in zip(*(stage_parameters(V2, stage) for stage in stages), strict=True))
    wide, narrow = layout.ep * layout.dp, layout.dp
    for kind, each, level in (("weights", WEIGHT, 3), ("gradients", GRADIENT, 2), ("optimizer", OPTIMIZER, 1)):
        total = wide * sum(getattr(memory, kind) for memory in memories)
        whole = copied + experts if layout.zero >= level else wide * copied + narrow * experts
        assert total == pytest.approx(each * whole, rel=1e-9)


def test_compute_is_the_published_flops() -> None:
    """On one GPU without recompute the time is FLOP / rate; only the input embedding, which 6N counts, is no product."""
    roomy = H800.model_copy(update={"memory_bytes": 1e15})
    one = replace(PAPER, pp=1, ep=1, dp=1, schedule="1f1b", zero=0, recompute="none", batch=4)
    found = simulate(V2, one, roomy)
    flops = (training_flops_per_token(V2, 4096) - 6 * V2.vocab_size * V2.hidden_size) * one.batch * 4096
    assert found.step_seconds == pytest.approx(flops / (H800.bf16_flops * one.efficiency), rel=1e-4)
    assert found.cost["compute"] == found.step_seconds


def test_recompute_trades_memory_for_time() -> None:
    none, some, full = (plan(recompute=name) for name in ("none", "selective", "full"))
    assert none.needed > some.needed > full.needed
    assert none.step_seconds < some.step_seconds < full.step_seconds
    assert not none.fits
    kept = [activation_bytes(V2, found.layout, moe=True)[0] for found in (none, some, full)]
    assert kept[2] == 2 * 5120
    assert kept[0] > 3 * kept[1] / 2


def test_what_memory_follows_the_schedule() -> None:
    held = {name: plan(schedule=name).memory for name in ("1f1b", "zb-h1", "zb-h2")}
    assert held["1f1b"][1].activations == pytest.approx(15 / 16 * held["zb-h1"][1].activations)
    assert held["zb-h2"][1].activations == pytest.approx(31 / 16 * held["zb-h1"][1].activations)
    assert held["1f1b"][14].activations < held["1f1b"][1].activations / 7


def test_all_to_all_between_nodes_costs_more() -> None:
    inside, outside = plan(ep=8, dp=2).all_to_all, plan(ep=16, dp=1).all_to_all
    assert inside is not None
    assert outside is not None
    assert outside.inter_share == pytest.approx(8 / 15)
    assert outside.seconds > 2 * inside.seconds
    assert plan(ep=16, dp=1).cost["all-to-all"] > 0


@pytest.mark.parametrize(
    ("changes", "says", "hint"),
    [
        ({"ep": 7}, "ep = 7 does not cut 160 routed experts in 8 groups into equal parts", "use ep = 1, 2, 4, 8, 16"),
        ({"pp": 61}, "60 layers do not fill 61 pipeline stages", "60 at most"),
        ({"batch": 9217}, "batch = 9217 sequences do not divide by ep * dp * micro_batch = 8 * 16 * 1 = 128", "use batch=9216"),
        ({"schedule": "interleaved"}, "schedule = interleaved with chunks = 1", "chunks=2"),
        ({"chunks": 2}, "schedule = zb-h1 with chunks = 2", "chunks=1"),
        ({"schedule": "interleaved", "chunks": 2}, "interleaved needs a multiple of pp = 16 microbatches per rank, not 72", "change batch"),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict[str, object], says: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(**changes)
    assert says in error.value.message
    assert hint in (error.value.hint or "")


def test_the_search_finds_what_a_loop_finds_and_explains_it() -> None:
    lite = preset("v2-lite")
    base = replace(PAPER, batch=64, micro_batch=1)
    found = search(lite, base, H800, 8, {"micro_batch": 1, "schedule": "1f1b"})
    every = []
    for pp in (1, 2, 4, 8):
        for ep in (1, 2, 4, 8):
            for zero in (0, 1, 2, 3):
                for recompute in ("none", "selective", "full"):
                    if 8 % (pp * ep) == 0:
                        layout = replace(base, pp=pp, ep=ep, dp=8 // pp // ep, schedule="1f1b", zero=zero, recompute=recompute)
                        every.append(simulate(lite, layout, H800))
    best = min((each for each in every if each.fits), key=lambda each: each.gpu_hours_per_trillion)
    assert found.best[0].gpu_hours_per_trillion == pytest.approx(best.gpu_hours_per_trillion)
    assert all(each.fits and each.layout.gpus == 8 for each in found.best)
    hours = [each.gpu_hours_per_trillion for each in found.best]
    assert hours == sorted(hours)
    said = explain(found)
    assert said[0].startswith(f"Best: {found.best[0].layout.label}")
    assert " more: " in said[1]
    assert found.best[1].layout.label in said[1]


def test_the_search_finds_the_papers_layout_among_the_first_two() -> None:
    """Nothing in the model is fitted to it but one efficiency, which all layouts share; half as many stages are 0.8 % ahead."""
    first, second = search(V2, PAPER, H800, 2048, {"micro_batch": 1}).best[:2]
    found = [(p.layout.pp, p.layout.ep, p.layout.dp, p.layout.schedule, p.layout.zero) for p in (first, second)]
    assert found == [(8, 8, 32, "zb-h1", 1), (16, 8, 16, "zb-h1", 1)]
    assert second.gpu_hours_per_trillion < 1.01 * first.gpu_hours_per_trillion
    assert second.needed < 0.8 * first.needed


def test_small_models_find_their_cluster() -> None:
    cpu = load_hardware("cpu")
    for name in ("tour", "nano", "small"):
        found = smallest_cluster(preset(name), replace(PAPER, batch=64, seq_len=256), cpu, {})
        assert (found.layout.gpus, found.fits) == (1, True)
    tiny = Hardware(name="toy", bf16_flops=1e6, memory_bytes=4.1e9, memory_bandwidth=1e3, intra_bandwidth=1e3, inter_bandwidth=1e3)
    with pytest.raises(ConfigError, match=r"does not fit on 16384 x toy: .* GB on one GPU, which has 4.1 GB"):
        smallest_cluster(V2, PAPER, tiny, {"schedule": "1f1b", "recompute": "full", "micro_batch": 1, "zero": 1})
