"""What a run writes of its routers: counts per layer against a plain count, and the figures made of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import recipe

from dsv2.metrics import read_metrics
from dsv2.model.router import RouterStats
from dsv2.train import loop
from dsv2.train.pretrain import pretrain
from dsv2.train.router_load import router_load


def stats_of(experts, num_experts, kept=None, layer=1):
    return RouterStats(layer, torch.zeros(*experts.shape[:2], num_experts), experts, kept)


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 3), length=st.integers(1, 5), groups=st.integers(1, 4), group_len=st.integers(1, 3), data=st.data())
def test_counts_are_those_of_a_plain_loop(batch, length, groups, group_len, data):
    num_experts = groups * group_len
    chosen = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    experts = torch.rand(batch, length, num_experts, generator=generator).argsort(dim=-1)[..., :chosen]
    kept = torch.rand(experts.shape, generator=generator) < 0.6
    load = router_load([stats_of(experts, num_experts, kept), stats_of(experts, num_experts, kept, 2)], groups)
    rows, stays = experts.flatten(0, 1).tolist(), kept.flatten(0, 1).tolist()
    assert load is not None and load.dropped is not None and load.tokens == len(rows)
    for layer in range(2):
        assert load.assignments[layer].tolist() == [sum(row.count(i) for row in rows) for i in range(num_experts)]
        reached = [{i // group_len for i in row} for row in rows]
        assert load.received[layer].tolist() == [sum(d in devices for devices in reached) for d in range(groups)]
        assert load.most_sends[layer] == max(map(len, reached))
        gone = [i // group_len for row, stay in zip(rows, stays, strict=True) for i, k in zip(row, stay, strict=True) if not k]
        assert load.dropped[layer].tolist() == [gone.count(d) for d in range(groups)]
    twice = load + load
    assert twice.tokens == 2 * load.tokens and torch.equal(twice.assignments, 2 * load.assignments)
    assert torch.equal(twice.received, 2 * load.received) and torch.equal(twice.most_sends, load.most_sends)
    assert torch.allclose(twice.shares, load.shares)


def test_figures():
    """Four tokens, top 2 of 4 experts on 2 devices: loads 4 2 2 0; tokens reach 1, 1, 2, 2 devices, which receive 4 and 2."""
    experts = torch.tensor([[[0, 1], [0, 1], [0, 2], [0, 2]]])
    kept = torch.tensor([[[True, True], [True, False], [True, True], [False, True]]])
    load = router_load([stats_of(experts, 4, kept)], 2)
    assert load is not None
    figures = load.metrics(2)
    assert figures == {
        "max_over_mean": [2.0], "entropy": [round(1.5 * math.log(2) / math.log(4), 5)], "dead_experts": [1],
        "device_load": [[0.75, 0.25]], "sends_per_token": [1.5], "most_sends": [2], "received_max": [round(4 / 3, 5)],
        "dropped": [2], "dropped_share": [0.25], "computed_max": [1.0],
    }  # fmt: skip
    near = router_load([stats_of(experts[:, :2], 4)], 2)
    assert near is not None and near.most_sends.tolist() == [1] and (near + load).most_sends.tolist() == [2]
    plain = router_load([stats_of(experts, 4)], 1)
    assert plain is not None and set(plain.metrics(1)) == {"max_over_mean", "entropy", "dead_experts"}


def test_even_and_collapsed_routing_are_the_two_ends():
    even = router_load([stats_of(torch.arange(8).view(1, 4, 2), 8)], 4)
    collapsed = router_load([stats_of(torch.zeros(1, 6, 1, dtype=torch.int64), 8)], 4)
    assert even is not None and collapsed is not None
    assert even.metrics(4)["entropy"] == [1.0] and even.metrics(4)["max_over_mean"] == [1.0]
    assert collapsed.metrics(4)["entropy"] == [0.0] and collapsed.metrics(4)["max_over_mean"] == [8.0]
    assert collapsed.metrics(4)["dead_experts"] == [7]
    assert (even.max_over_mean, collapsed.max_over_mean) == (1.0, 8.0)
    assert router_load([], 1) is None
    assert collapsed.shares[0].tolist() == pytest.approx([1.0] + [0.0] * 7)


def test_large_tables_of_load_are_written_now_and_then(one_thread, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LARGE_LOAD", 3)
    monkeypatch.setattr(loop, "_LARGE_LOAD_EVERY", 4)
    pretrain(recipe(), corpus, tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert len(lines) > 8
    assert [line["step"] for line in lines if "load" in line] == [line["step"] for line in lines if line["step"] % 4 == 0]
