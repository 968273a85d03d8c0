"""Published counts: parameters, activated parameters, tensors, cached numbers; by arithmetic and from the real modules (spec 1.2, 2.3)."""

import pytest
import torch

from dsv2.checkpoint.huggingface import to_huggingface
from dsv2.model.accounting import attention_parameters, cache_elements_per_token, count_parameters, training_flops_per_token
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.presets import PRESETS, preset
from reference.tiny import CONFIGS

PUBLISHED = {
    "v2": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320, 29_102, 149_227_520),
    "v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808, 5_291, 13_763_072),
}


def on_meta(config):
    """The model's modules without memory for their weights."""
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    total, activated, without_embedding, without_both, tensors, attention = PUBLISHED[name]
    config = preset(name)
    counts = count_parameters(config)
    assert counts.total == total
    assert counts.activated == activated
    assert counts.activated_without_embedding == without_embedding
    assert counts.activated_without_embedding_and_head == without_both
    assert attention_parameters(config) == attention
    assert len(to_huggingface(dict(on_meta(config).state_dict()), config)) == tensors


@pytest.mark.parametrize("config", [*(preset(name) for name in PRESETS), *(ModelConfig.from_dict(raw) for raw in CONFIGS.values())])
def test_arithmetic_equals_the_modules(config):
    assert count_parameters(config).total == sum(parameter.numel() for parameter in on_meta(config).parameters())


def test_cached_numbers_and_attention_flops_of_v2():
    assert cache_elements_per_token(preset("v2")) == 34_560
    assert cache_elements_per_token(preset("v2-lite")) == 15_552
    assert 1 - cache_elements_per_token(preset("v2")) * 6 / 8 / 389_120 == pytest.approx(0.93339, abs=5e-6)
    attention = training_flops_per_token(preset("v2"), 4096) - training_flops_per_token(preset("v2"), 0)
    assert attention == pytest.approx(30.2e9, rel=2e-3)
