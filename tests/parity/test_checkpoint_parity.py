"""Checkpoints against transformers: what we save it loads, what it saves we load, with the names of published files (spec 1.3, 1.5)."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from dsv2.checkpoint.huggingface import load_model, write_model
from dsv2.checkpoint.source import ModelSource
from dsv2.errors import CheckpointError
from dsv2.files import atomic_write_json
from dsv2.model.config import ModelConfig
from dsv2.model.rope import rope_frequencies
from reference import transformer
from reference.subject import our_model
from reference.tiny import CONFIGS, V2, random_state
from reference.upstream import upstream_logits, upstream_model

TOKENS = [[0, 5, 17, 99, 5, 2, 64, 127, 3, 3]]


@pytest.mark.parametrize("name", ["lite", "v2", "tied-head"])
def test_published_names_and_values(name):
    config = CONFIGS[name]
    state = random_state(config)
    source = ModelSource(our_model(state, config, torch.float32))
    assert source.specs.keys() == state.keys()
    assert all(torch.equal(source.read(key), tensor.float()) for key, tensor in state.items())


def save_ours(folder, state, config):
    write_model(folder, ModelSource(our_model(state, config, torch.float32)))


@pytest.mark.parametrize("name", ["lite", "v2", "v2.5", "tied-head"])
def test_transformers_loads_ours(name, tmp_path):
    from transformers import DeepseekV2ForCausalLM

    config = CONFIGS[name]
    state = random_state(config)
    save_ours(tmp_path, state, config)
    model, report = DeepseekV2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = transformer.forward(state, config, TOKENS[0]).logits
    assert torch.allclose(upstream_logits(model.eval(), TOKENS)[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lite", "v2", "v2.5", "tied-head"])
def test_we_load_what_transformers_saves(name, tmp_path):
    config = CONFIGS[name]
    state = random_state(config)
    upstream_model(state, deepcopy(config)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config == ModelConfig.from_dict(config)
    with torch.no_grad():
        ours = model.logits(model(torch.tensor(TOKENS)).hidden)[0]
    assert torch.allclose(ours.double(), transformer.forward(state, config, TOKENS[0]).logits, rtol=0, atol=1e-4)


def test_a_model_loaded_in_bfloat16_keeps_its_angles_in_float32(tmp_path):
    save_ours(tmp_path, random_state(V2), V2)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.frequencies, rope_frequencies(model.config))


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_the_config_are_refused_by_name(damage, tmp_path):
    state = {name: tensor.float() for name, tensor in random_state(V2).items()}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if damage == "missing":
        del state[name]
    elif damage == "unknown":
        name = "model.layers.1.mlp.experts.8.up_proj.weight"
        state[name] = torch.zeros(12, 32)
    else:
        state[name] = torch.zeros(12, 31)
    save_file(state, tmp_path / "model.safetensors")
    atomic_write_json(tmp_path / "config.json", ModelConfig.from_dict(V2).to_dict())
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert name in str(caught.value)
