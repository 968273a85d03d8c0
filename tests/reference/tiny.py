"""Tiny config.json dicts that between them use every feature of the architecture, and random weights for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

# V2-Lite in small: no query compression, greedy routing, no YaRN.
LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# V2 in small: query compression, device-limited routing, scaled gates, YaRN.
V2: dict[str, Any] = {
    **LITE,
    "q_lora_rank": 20,
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 16.0,
    "rope_scaling": YARN,
    "max_position_embeddings": 163840,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "lite": LITE,
    "lite-yarn": {**LITE, "rope_scaling": YARN, "max_position_embeddings": 163840},
    "v2": V2,
    "v2.5": {**V2, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "four-groups": {**V2, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "unequal-mscale": {**V2, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707}},
    "two-dense-layers": {**LITE, "first_k_dense_replace": 2},
    # Large, so that a norm with the wrong epsilon shows: the latent norms keep 1e-6.
    "large-eps": {**V2, "rms_norm_eps": 0.05, "n_shared_experts": 1},
    "tied-head": {**LITE, "tie_word_embeddings": True},
}


def random_state(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Float64 weights under Hugging Face's names, one per expert; unit-variance activations, gains away from 1, a decided router."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5

    def gain(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)

    def swiglu(prefix: str, width: int) -> dict[str, Tensor]:
        hidden = config["hidden_size"]
        return {
            f"{prefix}gate_proj.weight": matrix(width, hidden),
            f"{prefix}up_proj.weight": matrix(width, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, width),
        }

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    state = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator, dtype=torch.float64)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        state[layer + "input_layernorm.weight"] = gain(hidden)
        state[layer + "post_attention_layernorm.weight"] = gain(hidden)
        state |= _attention_state(layer + "self_attn.", config, matrix, gain)
        state[layer + "self_attn.o_proj.weight"] = matrix(hidden, heads * config["v_head_dim"])
        if i < config["first_k_dense_replace"]:
            state |= swiglu(layer + "mlp.", config["intermediate_size"])
            continue
        state[layer + "mlp.gate.weight"] = matrix(config["n_routed_experts"], hidden, spread=2.0)
        for e in range(config["n_routed_experts"]):
            state |= swiglu(f"{layer}mlp.experts.{e}.", config["moe_intermediate_size"])
        state |= swiglu(layer + "mlp.shared_experts.", config["n_shared_experts"] * config["moe_intermediate_size"])
    state["model.norm.weight"] = gain(hidden)
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return state


def _attention_state(prefix: str, config: Mapping[str, Any], matrix: Any, gain: Any) -> dict[str, Tensor]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    query_rows = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    state = {
        prefix + "kv_a_proj_with_mqa.weight": matrix(latent + config["qk_rope_head_dim"], hidden),
        prefix + "kv_a_layernorm.weight": gain(latent),
        prefix + "kv_b_proj.weight": matrix(heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), latent),
    }
    if config["q_lora_rank"] is None:
        return state | {prefix + "q_proj.weight": matrix(query_rows, hidden)}
    return state | {
        prefix + "q_a_proj.weight": matrix(config["q_lora_rank"], hidden),
        prefix + "q_a_layernorm.weight": gain(config["q_lora_rank"]),
        prefix + "q_b_proj.weight": matrix(query_rows, config["q_lora_rank"]),
    }


def stack_experts(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Per-expert names -> `experts.gate_up_proj` [E, 2m, d], gate rows first, and `experts.down_proj` [E, d, m] (spec 1.5)."""
    stacked = {name: tensor for name, tensor in state.items() if ".mlp.experts." not in name}
    for i in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        prefix, count = f"model.layers.{i}.mlp.experts.", config["n_routed_experts"]
        gate_up = [torch.cat([state[f"{prefix}{e}.gate_proj.weight"], state[f"{prefix}{e}.up_proj.weight"]]) for e in range(count)]
        stacked[prefix + "gate_up_proj"] = torch.stack(gate_up)
        stacked[prefix + "down_proj"] = torch.stack([state[f"{prefix}{e}.down_proj.weight"] for e in range(count)])
    return stacked


def split_experts(stacked: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `stack_experts`, as views: gradients of the per-expert tensors land in the stacked leaves."""
    width = config["moe_intermediate_size"]
    state = {name: tensor for name, tensor in stacked.items() if ".mlp.experts." not in name}
    for i in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        prefix = f"model.layers.{i}.mlp.experts."
        for e in range(config["n_routed_experts"]):
            state[f"{prefix}{e}.gate_proj.weight"] = stacked[prefix + "gate_up_proj"][e, :width]
            state[f"{prefix}{e}.up_proj.weight"] = stacked[prefix + "gate_up_proj"][e, width:]
            state[f"{prefix}{e}.down_proj.weight"] = stacked[prefix + "down_proj"][e]
    return state
