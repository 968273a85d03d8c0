"""Published counts of parameters, tensors and cached numbers: by arithmetic, from the modules, and name by name (spec 1.2, 2.3)."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.checkpoint.folder import expected_shapes
from dsv2.checkpoint.names import place_of, published_shapes
from dsv2.model.accounting import (
    attention_parameters,
    cache_bytes,
    cache_elements_per_token,
    caches,
    count_parameters,
    count_tensors,
    parts,
    saving,
    training_flops_per_token,
    weight_memory,
)
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.presets import PRESETS, PUBLISHED, preset
from reference.tiny import CONFIGS

# Spec 1.2: total, activated in the three conventions, tensors.
COUNTS = {
    "v2": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320, 29_102),
    "v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808, 5_291),
}
# Spec 1.2: parameters of one.
ONE = {
    "v2": {
        "attention": 149_227_520,
        "dense FFN": 188_743_680,
        "routed expert": 23_592_960,
        "shared experts": 47_185_920,
        "router": 819_200,
        "embedding": 524_288_000,
        "head": 524_288_000,
    },
    "v2-lite": {
        "attention": 13_763_072,
        "dense FFN": 67_239_936,
        "routed expert": 8_650_752,
        "shared experts": 17_301_504,
        "router": 131_072,
        "embedding": 209_715_200,
        "head": 209_715_200,
    },
}
SHAPED_LIKE = {name: "v2-lite" if "lite" in name else "v2" for name in (*PUBLISHED, "v2-4k", "v2-lite-4k")}


def on_meta(config):
    """The model's modules without memory for their weights."""
    with torch.device("meta"):
        return Transformer(config)


@st.composite
def configs(draw):
    """Small configs that use every field a count depends on."""
    size = st.integers(1, 40)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    raw = {name: draw(size) for name in sizes}
    raw |= {"num_hidden_layers": draw(st.integers(1, 5)), "num_attention_heads": draw(st.integers(1, 12))}
    raw |= {"tie_word_embeddings": draw(st.booleans())}
    raw |= {"qk_rope_head_dim": 2 * draw(st.integers(1, 8)), "q_lora_rank": draw(st.none() | size)}
    if draw(st.booleans()):
        routed = draw(st.integers(1, 6))
        raw |= {"n_routed_experts": routed, "num_experts_per_tok": draw(st.integers(1, routed)), "moe_intermediate_size": draw(size)}
        raw |= {"n_shared_experts": draw(st.none() | st.integers(0, 3)), "first_k_dense_replace": draw(st.integers(0, 5))}
        raw |= {"moe_layer_freq": draw(st.integers(1, 3))}
    return ModelConfig.from_dict(raw)


@pytest.mark.parametrize("name", SHAPED_LIKE)
def test_published_counts(name):
    total, activated, without_embedding, without_both, tensors = COUNTS[SHAPED_LIKE[name]]
    config = preset(name)
    counts = count_parameters(config)
    assert counts.total == total
    assert counts.activated == activated
    assert counts.activated_without_embedding == without_embedding
    assert counts.activated_without_embedding_and_head == without_both
    assert count_tensors(config) == tensors


@pytest.mark.parametrize("name", ONE)
def test_published_parts(name):
    config = preset(name)
    assert {part.name: part.each for part in parts(config) if part.name in ONE[name]} == ONE[name]
    assert attention_parameters(config) == ONE[name]["attention"]
    assert sum(part.total for part in parts(config)) == COUNTS[name][0]


@pytest.mark.parametrize("config", [*(preset(name) for name in PRESETS), *(ModelConfig.from_dict(raw) for raw in CONFIGS.values())])
def test_arithmetic_equals_the_modules(config):
    assert count_parameters(config).total == sum(parameter.numel() for parameter in on_meta(config).parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_every_published_tensor_has_its_place_in_the_modules(name):
    config = preset(name)
    state, seen, taken = on_meta(config).state_dict(), set(), 0
    for published, shape in published_shapes(config):
        place = place_of(published)
        tensor = state[place.name]
        tensor = tensor if place.expert is None else tensor[place.expert]
        tensor = tensor if place.half is None else tensor.chunk(2, dim=0)[place.half]
        assert tuple(tensor.shape) == shape, published
        seen.add(published)
        taken += tensor.numel()
    assert (taken, len(seen)) == (COUNTS[name][0], COUNTS[name][4])


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_closed_forms_equal_the_enumeration_and_the_modules(config):
    listed = dict(published_shapes(config))
    assert Counter(listed.values()) == sum((Counter(part.shapes * part.number) for part in parts(config)), Counter())
    assert count_tensors(config) == len(listed)
    assert count_parameters(config).total == sum(map(math.prod, listed.values()))
    assert count_parameters(config).total == sum(parameter.numel() for parameter in on_meta(config).parameters())
    unused = 0
    if config.n_routed_experts:
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        unused = config.num_moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert count_parameters(config).activated == count_parameters(config).total - unused
    assert cache_elements_per_token(config) == caches(config)[0].elements


@settings(deadline=None, max_examples=30)
@given(config=configs())
def test_weight_memory_is_that_of_the_tensors_one_by_one(config):
    fp32, bf16, eight, four = (memory.num_bytes for memory in weight_memory(config))
    matrices = [shape for _, shape in published_shapes(config) if len(shape) == 2]
    gains = sum(shape[0] for _, shape in published_shapes(config) if len(shape) == 1)
    assert (fp32, bf16) == (4 * count_parameters(config).total, 2 * count_parameters(config).total)
    assert eight == 2 * gains + sum(rows * width + 4 * rows for rows, width in matrices)
    assert four == 2 * gains + sum(rows * 18 * -(-width // 32) for rows, width in matrices)


def test_int8_folders_have_a_scale_for_every_row():
    listed = dict(expected_shapes(preset("tour"), quantised=True))
    assert listed["lm_head.weight_scale"] == (4096,)
    assert "model.layers.1.mlp.gate.weight_scale" not in listed


def test_cached_numbers_and_bytes_of_v2():
    latent, mha, gqa, mqa = caches(preset("v2"))
    assert [cache.elements for cache in (latent, mha, gqa, mqa)] == [34_560, 1_966_080, 122_880, 15_360]
    assert [cache.groups for cache in (latent, mha, gqa, mqa)] == [2.25, 128, 8, 1]
    assert [cache_bytes(34_560, bits) for bits in (16, 8, 6)] == [69_120, 34_560, 25_920]
    assert all(isinstance(cache_bytes(34_560, bits), int) for bits in (16, 8, 6))
    assert cache_bytes(1, 6) == 0.75
    assert cache_elements_per_token(preset("v2-lite")) == 15_552
    assert caches(preset("v2-lite"))[1].elements == 110_592  # the small MoE with MHA of table 9
    assert cache_bytes(34_560 * 131_072, 16) / 2**30 == 8.4375


def test_published_savings():
    yardstick = cache_bytes(DEEPSEEK_67B.cache_elements_per_token, 16)
    assert (DEEPSEEK_67B.cache_elements_per_token, yardstick) == (194_560, 389_120)
    assert saving(cache_bytes(34_560, 6), yardstick) == pytest.approx(0.93339, abs=5e-6)
    assert saving(cache_bytes(34_560, 8), yardstick) == pytest.approx(0.9112, abs=5e-5)
    assert saving(cache_bytes(34_560, 16), yardstick) == pytest.approx(0.8224, abs=5e-5)
    assert saving(34_560, 1_966_080) == pytest.approx(0.9824, abs=5e-5)


@pytest.mark.parametrize(("heads", "kinds"), [(1, "MLA MHA MQA"), (8, "MLA MHA MQA"), (12, "MLA MHA GQA MQA"), (9, "MLA MHA MQA")])
def test_a_gqa_twin_is_neither_mha_nor_mqa(heads, kinds):
    twins = caches(preset("tour", num_attention_heads=heads))
    assert [cache.name for cache in twins] == kinds.split()
    assert all(heads % cache.groups == 0 for cache in twins[1:])


def test_attention_flops_of_v2():
    attention = training_flops_per_token(preset("v2"), 4096) - training_flops_per_token(preset("v2"), 0)
    assert attention == pytest.approx(30.2e9, rel=2e-3)
    assert training_flops_per_token(preset("v2"), 0) == pytest.approx(128.3e9, rel=1e-3)
