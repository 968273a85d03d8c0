"""The published models and ours, by name. Works without torch."""

from typing import Any

from dsv2.errors import ConfigError, did_you_mean
from dsv2.model.config import ModelConfig

_YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}

_PUBLISHED: dict[str, Any] = {
    "vocab_size": 102400, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "max_position_embeddings": 163840,
    "bos_token_id": 100000, "eos_token_id": 100001,
}  # fmt: skip

_LARGE: dict[str, Any] = _PUBLISHED | {
    "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
    "routed_scaling_factor": 16.0,
}  # fmt: skip

_LITE: dict[str, Any] = _PUBLISHED | {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64,
}  # fmt: skip


def _yarn(mscale: float) -> dict[str, Any]:
    return {"rope_scaling": _YARN | {"mscale": mscale, "mscale_all_dim": mscale}}


PRESETS: dict[str, dict[str, Any]] = {
    # the tour's: small enough to train in minutes on two cores
    "tour": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
        "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 16,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
        "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    },
    # small models of ours: for a laptop, and for measuring beside other implementations
    "nano": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
        "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 16,
        "n_shared_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    "small": {
        "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
        "kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 48,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 256, "first_k_dense_replace": 1,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    # the published shapes; 0.707 is the paper's 0.0707 ln s + 1 (section 3.1.4), V2.5 uses 1.0
    "v2-lite": _LITE | _yarn(0.707),
    "v2": _LARGE | _yarn(0.707),
    "v2.5": _LARGE | _yarn(1.0),
    "coder-v2-lite": _LITE | _yarn(0.707),
    "coder-v2": _LARGE | _yarn(0.707),  # its published mscale was not seen: a checkpoint's own config decides
}  # fmt: skip


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the named model's config, with single fields replaced.

    Raises:
        ConfigError: no such preset (the nearest name is given), an unknown field, or sizes that do not fit together.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}", hint=did_you_mean(name, PRESETS))
    return ModelConfig.from_dict(PRESETS[name] | overrides, source=f"preset {name}")
