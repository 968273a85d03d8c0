"""ModelConfig: published configs are read, everything that would be ignored is refused, derived numbers are the paper's."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.presets import PRESETS, preset
from reference import rope
from reference.tiny import CONFIGS, LITE, V2, YARN


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_config_json(name):
    config = ModelConfig.from_dict(CONFIGS[name])
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_written_config_repeats_every_value_it_was_read_from(name):
    written = ModelConfig.from_dict(CONFIGS[name]).to_dict()
    assert {field: written[field] for field in CONFIGS[name]} == CONFIGS[name]


def test_new_spelling_of_the_rotary_settings_is_read():
    """transformers 5 writes rope_parameters with rope_type, and the rotary dimension as head_dim (spec 1.5)."""
    new = {name: value for name, value in V2.items() if name not in ("rope_theta", "rope_scaling")}
    scaling = {name: value for name, value in YARN.items() if name != "type"}
    new |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **scaling}, "head_dim": V2["qk_rope_head_dim"]}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(V2)
    plain = {**LITE, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    del plain["rope_scaling"]
    assert ModelConfig.from_dict(plain) == ModelConfig.from_dict({**LITE, "rope_theta": 500.0})


def test_config_saved_by_transformers_is_read(tmp_path):
    from transformers import DeepseekV2Config

    DeepseekV2Config(**deepcopy(V2)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_dict(saved) == ModelConfig.from_dict(V2)


def test_null_groups_mean_one_group():
    """What transformers writes for a model without device-limited routing."""
    assert ModelConfig.from_dict({**LITE, "n_group": None, "topk_group": None}) == ModelConfig.from_dict(LITE)


REFUSED = {
    "scoring_func": "sigmoid",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "num_key_value_heads": 1,
    "head_dim": 5,
    "topk_method": "noaux_tc",
    "model_type": "deepseek_v3",
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "qk_rope_head_dim": 7,
    "hidden_size": 0,
    "rope_interleave": False,
    "pretraining_tp": 2,
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_without_implementation_is_refused_by_name(field):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**V2, field: REFUSED[field]})
    assert field in str(caught.value)


@pytest.mark.parametrize("scaling", [{**YARN, "attention_factor": 1.5}, {**YARN, "mscle": 1.0}])
def test_unknown_rope_scaling_field_is_refused(scaling):
    with pytest.raises(ConfigError, match="attention_factor|mscle"):
        ModelConfig.from_dict({**V2, "rope_scaling": scaling})


@pytest.mark.parametrize("scaling", [{"rope_type": "default", "rope_theta": 10000.0, "factor": 4.0}])
def test_scaling_that_its_own_type_would_ignore_is_refused(scaling):
    with pytest.raises(ConfigError, match="factor"):
        ModelConfig.from_dict({**LITE, "rope_parameters": scaling})


def test_misspelt_field_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**V2, "kv_lora_rnk": 16})
    assert "kv_lora_rnk" in caught.value.message
    assert caught.value.hint is not None and "kv_lora_rank" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_routed_experts": 9},
        {"topk_group": 3},
        {"num_experts_per_tok": 5},  # the one reachable group has four experts
        {"num_experts_per_tok": 9, "topk_method": "greedy"},
        {"moe_intermediate_size": None},
    ],
)
def test_routing_that_does_not_fit_together_is_refused_with_its_numbers(wrong):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**V2, **wrong})
    name, value = next(iter(wrong.items()))
    assert name in str(caught.value)
    assert value is None or str(value) in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(
    nope=st.integers(1, 256),
    rope_pairs=st.integers(1, 64),
    factor=st.floats(0.5, 100),
    mscale=st.floats(0, 2),
    all_dim=st.floats(0, 2),
    yarn=st.booleans(),
)
def test_scales_are_the_reference(nope, rope_pairs, factor, mscale, all_dim, yarn):
    scaling = {**YARN, "factor": factor, "mscale": mscale, "mscale_all_dim": all_dim} if yarn else None
    raw = {**V2, "qk_nope_head_dim": nope, "qk_rope_head_dim": 2 * rope_pairs, "rope_scaling": scaling}
    config = ModelConfig.from_dict(raw)
    assert config.softmax_scale == pytest.approx(rope.softmax_scale(raw), rel=1e-12)
    assert config.rotation_scale == pytest.approx(rope.amplitude(raw), rel=1e-12)


@pytest.mark.parametrize(("name", "scale"), [("v2", 0.1147213868), ("v2-lite", 0.1147213868), ("v2.5", 0.1352337789), ("nano", 48**-0.5)])
def test_softmax_scale_of_the_presets(name, scale):
    assert preset(name).softmax_scale == pytest.approx(scale, abs=1e-10)


def test_v2_caches_576_numbers_per_token_and_layer():
    assert preset("v2").latent_dim == 576
    assert preset("v2").latent_dim * preset("v2").num_hidden_layers == 34560
    assert preset("v2-lite").latent_dim * preset("v2-lite").num_hidden_layers == 15552


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        preset("v2-light")
    assert caught.value.hint is not None and "v2-lite" in caught.value.hint
    assert set(PRESETS) >= {"nano", "small", "v2-lite", "v2", "v2.5", "coder-v2", "coder-v2-lite"}


def test_which_layers_are_moe():
    assert [ModelConfig.from_dict(LITE).is_moe_layer(i) for i in range(3)] == [False, True, True]
    sparse = ModelConfig.from_dict({**LITE, "num_hidden_layers": 6, "moe_layer_freq": 2, "first_k_dense_replace": 1})
    assert [sparse.is_moe_layer(i) for i in range(6)] == [False, False, True, False, True, False]
    assert sparse.num_moe_layers == 2
