"""The oracle's network against itself: two readings of attention, causality, documents, selection, counts of cached numbers."""

import pytest
import torch

from reference import balance, layers, moe, rope, transformer
from reference.tiny import CONFIGS, random_state, split_experts, stack_experts

TOKENS = [0, 5, 17, 99, 5, 2, 64, 127]


@pytest.mark.parametrize("name", ["lite", "v2", "v2.5", "unequal-mscale"])
def test_expanded_equals_absorbed(name):
    config = CONFIGS[name]
    state = random_state(config)
    positions = [0, 1, 2, 100, 4095, 4096, 5000, 9000]
    expanded = transformer.forward(state, config, TOKENS, positions)
    absorbed = transformer.forward(state, config, TOKENS, positions, absorbed=True)
    assert torch.allclose(expanded.logits, absorbed.logits, rtol=0, atol=1e-12)


def test_no_token_sees_the_future():
    config = CONFIGS["v2"]
    state = random_state(config)
    whole = transformer.forward(state, config, TOKENS)
    changed = transformer.forward(state, config, TOKENS[:5] + [11, 12, 13])
    assert torch.equal(whole.logits[:5], changed.logits[:5])
    assert not torch.allclose(whole.logits[5:], changed.logits[5:])


def test_packed_documents_are_separate_sequences():
    config = CONFIGS["v2"]
    state = random_state(config)
    packed = transformer.forward(state, config, TOKENS, [0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1, 1, 1])
    first = transformer.forward(state, config, TOKENS[:3])
    second = transformer.forward(state, config, TOKENS[3:])
    assert torch.allclose(packed.logits, torch.cat([first.logits, second.logits]), rtol=0, atol=1e-12)


def test_cache_holds_latent_and_one_rope_key_per_token():
    config = CONFIGS["v2"]
    output = transformer.forward(random_state(config), config, TOKENS)
    numbers = sum(part.numel() for part in output.latents + output.k_ropes)
    per_token_and_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert numbers == len(TOKENS) * config["num_hidden_layers"] * per_token_and_layer


# 16 experts in 8 groups of 2; unrestricted top-6 = experts 0, 2, 4, 6, 8, 1 in five groups.
SPREAD = [0.16, 0.09, 0.15, 0.01, 0.14, 0.02, 0.13, 0.03, 0.12, 0.04, 0.05, 0.005, 0.02, 0.015, 0.01, 0.01]


def test_group_limited_selection_where_the_global_best_span_five_groups():
    affinity = torch.tensor(SPREAD, dtype=torch.float64)
    config = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}
    assert sorted(moe.select(affinity, {**config, "topk_method": "greedy"})) == [0, 1, 2, 4, 6, 8]
    chosen = moe.select(affinity, config)
    assert chosen == [0, 2, 4, 1, 5, 3]  # groups 0, 1, 2 entirely
    assert moe.gates(affinity, chosen, config).tolist() == pytest.approx([16 * SPREAD[i] for i in chosen])


def test_a_group_is_scored_by_its_best_expert_not_by_its_sum():
    affinity = torch.tensor([0.30, 0.01, 0.20, 0.19, 0.15, 0.15], dtype=torch.float64)
    config = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1, "num_experts_per_tok": 2}
    assert moe.select(affinity, config) == [0, 1]


def test_a_masked_group_stays_out_even_when_affinities_underflow():
    affinity = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    config = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    assert moe.select(affinity, config) == [0, 1]
    assert moe.select(affinity.flip(0), config) == [3, 2]


def test_shared_expert_is_the_sum_of_its_parts():
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
    down, x = torch.randn(6, 8, generator=generator, dtype=torch.float64), torch.randn(6, generator=generator, dtype=torch.float64)
    fused = layers.swiglu(x, gate, up, down)
    parts = layers.swiglu(x, gate[:4], up[:4], down[:, :4]) + layers.swiglu(x, gate[4:], up[4:], down[:, 4:])
    assert torch.allclose(fused, parts, rtol=0, atol=1e-12)


def test_uniform_router_brings_the_routed_part_of_v2_to_six_tenths():
    config = {"topk_method": "greedy", "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}
    uniform = torch.full((160,), 1 / 160, dtype=torch.float64)
    assert moe.gates(uniform, moe.select(uniform, config), config).sum().item() == pytest.approx(0.6)
    assert moe.select(uniform, config) == [0, 1, 2, 3, 4, 5]  # ties: the lower index


WORKED = [
    ([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], [[0, 1], [2, 3]], 1.0),
    ([[0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.1, 0.1]], [[0, 1], [0, 1]], 1.5),
]


@pytest.mark.parametrize(("affinity", "experts", "expected"), WORKED)
def test_balance_losses_of_the_worked_cases(affinity, experts, expected):
    affinity, experts = torch.tensor(affinity, dtype=torch.float64), torch.tensor(experts)
    assert balance.expert_loss(affinity, experts).item() == pytest.approx(expected)
    assert balance.device_loss(affinity, experts, 2).item() == pytest.approx(expected)
    assert balance.communication_loss(affinity, experts, 2, 1).item() == pytest.approx(expected)


def test_stacking_and_splitting_experts_are_inverse():
    config = CONFIGS["v2"]
    state = random_state(config)
    again = split_experts(stack_experts(state, config), config)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_softmax_scale_reaches_every_dimension():
    config = CONFIGS["v2"]
    ratio = rope.softmax_scale(config) * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** 0.5
    assert ratio == pytest.approx(1.5896261652, abs=1e-9)
