"""What a GGUF file says of a model and its tokenizer, and what llama.cpp makes of it.

Facts on llama.cpp are those of the tree in llama-cpp-python 0.3.36: src/models/deepseek2.cpp (which models its loader takes),
src/llama-graph.cpp (routing), src/llama-context.cpp (YaRN), src/llama-vocab.cpp (tokens).
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dsv2.errors import ConfigError
from dsv2.model.attention import LATENT_NORM_EPS
from dsv2.model.config import ModelConfig
from dsv2.tokenizer.pretokenize import byte_characters
from dsv2.tokenizer.specials import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from dsv2.tokenizer.tokenizer import Tokenizer

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

ARCHITECTURE = "deepseek2"
PRE_TOKENIZER = "deepseek-llm"  # llama.cpp's name for the splits of tokenizer/pretokenize.py
_FILE_TYPES: dict[Kind, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # token types
_SOFTMAX = 1  # expert_gating_func
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # arrays in llama.cpp


def require_exportable(config: ModelConfig) -> None:
    """Refuse a model that llama.cpp's ``deepseek2`` would run as another function.

    Raises:
        ConfigError: names the field, its value and what llama.cpp can do.
    """
    reason = next(_obstacles(config), None)
    if reason is not None:
        hint = "keep the Hugging Face layout for this model: dsv2, transformers, vLLM and SGLang read it"
        raise ConfigError(f"llama.cpp cannot run this model: {reason}", hint=hint)


def _obstacles(config: ModelConfig) -> Iterator[str]:
    dense = leading_dense_layers(config)
    if any(not config.is_moe_layer(layer) for layer in range(dense, config.num_hidden_layers)):
        yield f"moe_layer_freq = {config.moe_layer_freq} puts dense layers between MoE layers; it knows dense layers at the start only"
    if dense < config.num_hidden_layers and not config.shared_intermediate_size:
        yield f"n_shared_experts = {config.n_shared_experts}; its MoE layers always have shared experts"
    if config.rms_norm_eps != LATENT_NORM_EPS:
        yield f"rms_norm_eps = {config.rms_norm_eps}; it has one value for all norms, and the latent norms have {LATENT_NORM_EPS}"
    if config.num_hidden_layers > _MAX_LAYERS:
        yield f"num_hidden_layers = {config.num_hidden_layers}; at most {_MAX_LAYERS}"
    if (config.n_routed_experts or 0) > _MAX_EXPERTS:
        yield f"n_routed_experts = {config.n_routed_experts}; at most {_MAX_EXPERTS}"
    yarn = config.rope_scaling
    if yarn is None:
        return
    if yarn.factor < 1:
        yield f"rope_scaling.factor = {yarn.factor}; at least 1"
    if not yarn.mscale == yarn.mscale_all_dim > 0:
        yield (
            f"rope_scaling.mscale = {yarn.mscale} and mscale_all_dim = {yarn.mscale_all_dim}; it reads one number for both, as in all"
            " published models, and it must not be 0"
        )
    if (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0):
        yield f"rope_scaling.beta_fast = {yarn.beta_fast} and beta_slow = {yarn.beta_slow}; it has 32 and 1 built in for this architecture"


def leading_dense_layers(config: ModelConfig) -> int:
    """Return how many layers come before the first MoE layer."""
    return next((layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)), config.num_hidden_layers)


def groups_matter(config: ModelConfig) -> bool:
    """Tell whether device-limited routing can choose other experts than plain top-K.

    It cannot when all groups are reachable, or at least K: the K best experts lie in at most K groups, and no other group has a better
    maximum than these (section 2.2.2).
    """
    chosen = config.num_experts_per_tok or 0
    limited = config.n_routed_experts is not None and config.topk_method == "group_limited_greedy"
    return limited and config.topk_group < min(config.n_group, chosen)


def notices(config: ModelConfig, *, with_text: bool) -> Iterator[str]:
    """Yield what whoever runs the file should know, a line each."""
    if with_text:
        yield f"note: the pre-tokeniser is declared as {PRE_TOKENIZER}, llama.cpp's name for the one of the DeepSeek-V2 family"
    lite = config.num_hidden_layers in (26, 27) or (config.num_hidden_layers == 48 and config.vocab_size == 128256)
    if lite and config.q_lora_rank is not None:
        yield (
            f"warning: llama.cpp will refuse this file: it takes {config.num_hidden_layers} layers for a model without q_lora_rank"
            f" (V2-Lite has 27), and this one has q_lora_rank = {config.q_lora_rank}"
        )
    if not lite and config.q_lora_rank is None:
        yield (
            "warning: llama.cpp will refuse this file ('key not found' for q_lora_rank): it takes models without q_lora_rank at 26 or 27"
            f" layers only, or at 48 with 128256 tokens, and this one has {config.num_hidden_layers} layers and {config.vocab_size} tokens"
        )
    if groups_matter(config):
        yield (
            "WARNING: llama.cpp does not route like DeepSeek-V2: it ranks the groups of experts by the sum of their two highest affinities"
            " (the rule of V3), not by the highest. Many tokens get other experts than in training, and answers differ from dsv2's;"
            " no setting of the file changes that."
        )


def model_metadata(config: ModelConfig, kind: Kind, name: str) -> dict[str, Any]:
    """Return the keys that describe the model; whole numbers are stored as uint32, others as float32."""
    dense = leading_dense_layers(config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "leading_dense_block_count": dense,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,  # absorbed, all heads read one key: the latent and the rotary part
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.latent_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": config.rope_theta,
        "expert_feed_forward_length": config.moe_intermediate_size or config.intermediate_size,
        "expert_shared_count": (config.n_shared_experts or 0) if dense < config.num_hidden_layers else 0,
    }
    if config.q_lora_rank is not None:
        values["attention.q_lora_rank"] = config.q_lora_rank
    if dense < config.num_hidden_layers:
        values |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_gating_func": _SOFTMAX,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_weights_norm": config.norm_topk_prob,
        }
    if groups_matter(config):  # not what V2 does, but of random affinities 60 to 80 % keep all their experts, and 11 % without groups
        values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": yarn.factor,
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
            "rope.scaling.yarn_beta_fast": yarn.beta_fast,
            "rope.scaling.yarn_beta_slow": yarn.beta_slow,
        }
    general = {"general.type": "model", "general.name": name, "general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    return general | {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def tokenizer_metadata(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the keys that describe the tokenizer; ids of the model's vocabulary without a token get a placeholder.

    Without a tokenizer the vocabulary is the bytes, which every tool loads and serves: llama.cpp has a kind "none", but then its process
    dies at the first text.

    Raises:
        ConfigError: the tokenizer has more tokens than the model; without one, the config's BOS or EOS lies outside the vocabulary.
    """
    if tokenizer is None:
        markers = {BOS: config.bos_token_id, EOS: config.eos_token_id}
        if max(markers.values()) >= config.vocab_size:
            ids = f"bos_token_id = {config.bos_token_id} and eos_token_id = {config.eos_token_id}"
            raise ConfigError(f"{ids} must be below vocab_size = {config.vocab_size}")
        free = (token_id for token_id in range(config.vocab_size) if token_id not in markers.values())
        return _keys(config, dict(zip(byte_characters().values(), free, strict=False)), [], markers)
    if tokenizer.num_tokens > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.num_tokens} tokens, the model's vocab_size is {config.vocab_size}",
            hint="give the tokenizer that the model was trained with",
        )
    with tempfile.TemporaryDirectory() as folder:  # what save writes is the published form
        tokenizer.save(folder)
        document = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    text = tokenizer.published_template or settings.get("chat_template")  # a folder's own, whatever it is
    template = {} if text is None else {"tokenizer.chat_template": text}
    return _keys(config, document["model"]["vocab"], merges, tokenizer.special_ids) | template


def _keys(config: ModelConfig, vocab: Mapping[str, int], merges: list[str], markers: Mapping[str, int]) -> dict[str, Any]:
    tokens = [f"[PAD{token_id}]" for token_id in range(config.vocab_size)]  # digits stand alone: no text ever becomes one of these
    types = [_UNUSED] * config.vocab_size
    for token, token_id in vocab.items():
        tokens[token_id], types[token_id] = token, _NORMAL
    for marker, token_id in markers.items():
        tokens[token_id], types[token_id] = marker, _CONTROL  # so that what a user writes never becomes a marker
    values: dict[str, Any] = {
        "model": "gpt2",  # byte-level BPE
        "pre": PRE_TOKENIZER,
        "tokens": tokens,
        "token_type": types,
        "merges": merges or [f"{tokens[0]} {tokens[0]}"],  # gguf drops an empty list and llama.cpp wants one; this pair gives no token
        "bos_token_id": markers[BOS],
        "eos_token_id": markers[EOS],
        "padding_token_id": markers[EOS],
        "add_bos_token": True,
        "add_eos_token": False,
    }
    for key, marker in {"fim_pre_token_id": FIM_BEGIN, "fim_suf_token_id": FIM_HOLE, "fim_mid_token_id": FIM_END}.items():
        if marker in markers:
            values[key] = markers[marker]
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}
