"""The config.json of every published model (spec 1.1), old and new spelling: read, equal to its preset, written back without loss."""

from typing import Any

import pytest

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.presets import PRESETS, PUBLISHED, preset

# Field for field as the files hold them; what differs between the models comes below.
COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
LARGE: dict[str, Any] = COMMON | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160,
    "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "topk_group": 3, "topk_method": "group_limited_greedy",
}  # fmt: skip
LITE: dict[str, Any] = COMMON | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
    "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
# Written for other tools; they say nothing about the function and are not kept.
NOT_KEPT = {"auto_map", "ep_size", "torch_dtype", "transformers_version"}


def yarn(mscale: float) -> dict[str, Any]:
    settings = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
    return {"rope_scaling": settings | {"mscale": mscale, "mscale_all_dim": mscale}}


FILES = {
    "v2": LARGE | yarn(0.707),
    "v2-chat": LARGE | yarn(0.707) | {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]},  # the very first upload
    "v2-lite": LITE | yarn(0.707),
    "v2-lite-chat": LITE | yarn(0.707),
    "coder-v2": LARGE | yarn(0.707),
    "coder-v2-instruct": LARGE | yarn(0.707) | {"ep_size": 1},
    "coder-v2-lite": LITE | yarn(0.707),
    "coder-v2-lite-instruct": LITE | yarn(0.707),
    "v2-chat-0628": LARGE | yarn(1.0) | {"ep_size": 1},
    "coder-v2-instruct-0724": LARGE | yarn(1.0) | {"ep_size": 1},
    "v2.5": LARGE | yarn(1.0) | {"ep_size": 1},
    "v2.5-1210": LARGE | yarn(1.0) | {"ep_size": 1},
    # ESFT's checkpoints of V2-Lite keep the shape before the extension
    "v2-lite-4k": LITE | {"max_position_embeddings": 4096, "rope_scaling": None},
}


def new_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it (spec 1.5)."""
    old = dict(values)
    scaling = dict(old.pop("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    parameters = {"rope_type": kind, "rope_theta": old.pop("rope_theta"), **scaling}
    return {**old, "dtype": old.pop("torch_dtype"), "head_dim": 64, "rope_parameters": parameters}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_its_preset(name: str) -> None:
    config = ModelConfig.from_dict(FILES[name])
    training = {"initializer_range": 0.02} if name.endswith("-4k") else {}
    assert config == preset(name, **training)
    assert ModelConfig.from_dict(new_spelling(FILES[name])) == config


@pytest.mark.parametrize("name", FILES)
def test_writing_keeps_every_field(name: str) -> None:
    written = ModelConfig.from_dict(FILES[name]).to_dict()
    expected = FILES[name] | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    kept = {field: value for field, value in expected.items() if field not in NOT_KEPT}
    assert {field: written[field] for field in kept} == kept
    assert ModelConfig.from_dict(written) == ModelConfig.from_dict(FILES[name])


def test_every_release_has_a_preset_and_what_its_config_does_not_say() -> None:
    assert set(PUBLISHED) == {name for name in FILES if not name.endswith("-4k")}
    assert set(PUBLISHED) < set(PRESETS)
    assert len({published.hub_id for published in PUBLISHED.values()}) == len(PUBLISHED)
    assert {name for name, published in PUBLISHED.items() if published.context == 32768} == {"v2-lite", "v2-lite-chat"}
    assert {name for name, published in PUBLISHED.items() if published.fim} == {
        "coder-v2-lite", "coder-v2-lite-instruct", "coder-v2-instruct-0724", "v2.5",
    }  # fmt: skip
    assert {name for name, published in PUBLISHED.items() if published.template is None} == {"v2", "v2-lite", "coder-v2", "coder-v2-lite"}
    assert {name for name, published in PUBLISHED.items() if published.tools} == {
        "v2-chat-0628", "coder-v2-instruct-0724", "v2.5", "v2.5-1210",
    }  # fmt: skip
    for name, published in PUBLISHED.items():
        assert published.context <= preset(name).max_position_embeddings
        assert published.fim_source


@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_where_mscale_was_not_seen_the_file_decides(mscale: float) -> None:
    unseen = {name for name, published in PUBLISHED.items() if published.unseen}
    assert unseen == {"coder-v2", "coder-v2-instruct", "v2-chat-0628", "coder-v2-instruct-0724", "v2.5-1210"}
    for name in unseen:
        scaling = ModelConfig.from_dict(FILES[name] | yarn(mscale)).rope_scaling
        assert scaling is not None
        assert scaling.mscale == scaling.mscale_all_dim == mscale


def test_presets_for_pre_training_are_the_shapes_before_extension() -> None:
    for name in ("v2", "v2-lite"):
        assert preset(f"{name}-4k") == preset(name, rope_scaling=None, max_position_embeddings=4096, initializer_range=0.006)


@pytest.mark.parametrize(("wrong", "nearest"), [("v2-lit", "v2-lite"), ("coder-v2-light", "coder-v2-lite"), ("v25", "v2.5")])
def test_an_unknown_preset_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match="unknown preset") as caught:
        preset(wrong)
    assert caught.value.hint == f"did you mean {nearest!r}?"
