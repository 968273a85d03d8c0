"""The published models and ours, by name, and what a release says of itself that its config.json does not. Works without torch."""

from dataclasses import dataclass
from typing import Any, Literal

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


_BEFORE_EXTENSION: dict[str, Any] = {"rope_scaling": None, "max_position_embeddings": 4096, "initializer_range": 0.006}


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
    # the published models (spec 1.1); 0.707 is the paper's 0.0707 ln s + 1 (section 3.1.4), V2.5 uses 1.0
    "v2-lite": _LITE | _yarn(0.707),
    "v2-lite-chat": _LITE | _yarn(0.707),
    "v2": _LARGE | _yarn(0.707),
    "v2-chat": _LARGE | _yarn(0.707),
    "coder-v2-lite": _LITE | _yarn(0.707),
    "coder-v2-lite-instruct": _LITE | _yarn(0.707),
    "coder-v2": _LARGE | _yarn(0.707),  # mscale not seen; assumed, since it goes on from V2
    "coder-v2-instruct": _LARGE | _yarn(0.707),  # the same
    "v2-chat-0628": _LARGE | _yarn(1.0),  # not seen; assumed, since V2.5 is a merge of this
    "coder-v2-instruct-0724": _LARGE | _yarn(1.0),  # and this
    "v2.5": _LARGE | _yarn(1.0),
    "v2.5-1210": _LARGE | _yarn(1.0),  # not seen; assumed, since it follows V2.5
    # what pre-training starts from: before the extension to 128K, initial values N(0, 0.006) (section 3.1.2)
    "v2-lite-4k": _LITE | _BEFORE_EXTENSION,
    "v2-4k": _LARGE | _BEFORE_EXTENSION,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Published:
    """What DeepSeek says of a release, in papers and model cards, that its config.json does not (spec 1.1, 4.4, 9).

    Args:
        hub_id: on the Hugging Face hub.
        context: tokens that the release documents; its config may allow more.
        fim: trained to fill in the middle; None: nothing says.
        fim_source: where that is from.
        template: of its chats; None: a base model without one.
        unseen: fields of its config.json that could not be checked, so the preset's values are assumed.
    """

    hub_id: str
    context: int
    fim: bool | None
    fim_source: str
    template: Literal["v2", "v2.5"] | None = None
    unseen: tuple[str, ...] = ()

    @property
    def tools(self) -> bool:
        """Calls tools: the markers for it came with the template of 0628, 0724 and V2.5."""
        return self.template == "v2.5"


_32K, _128K = 32768, 131072
_NO_FIM = "the DeepSeek-V2 paper names no such training"
_CODER_NO_FIM = "Coder-V2 paper, section 3.1.2: only the 16B; the 236B predicts next tokens"
_CODER_FIM = "Coder-V2 paper, section 3.1.2: base model, prefix-suffix-middle at rate 0.5"
_MSCALE = ("rope_scaling.mscale", "rope_scaling.mscale_all_dim")

PUBLISHED: dict[str, Published] = {
    "v2-lite": Published("deepseek-ai/DeepSeek-V2-Lite", _32K, False, _NO_FIM),
    "v2-lite-chat": Published("deepseek-ai/DeepSeek-V2-Lite-Chat", _32K, False, _NO_FIM, "v2"),
    "v2": Published("deepseek-ai/DeepSeek-V2", _128K, False, _NO_FIM),
    "v2-chat": Published("deepseek-ai/DeepSeek-V2-Chat", _128K, False, _NO_FIM, "v2"),
    "coder-v2-lite": Published("deepseek-ai/DeepSeek-Coder-V2-Lite-Base", _128K, True, _CODER_FIM),
    "coder-v2-lite-instruct": Published("deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct", _128K, True, _CODER_FIM, "v2"),
    "coder-v2": Published("deepseek-ai/DeepSeek-Coder-V2-Base", _128K, False, _CODER_NO_FIM, unseen=_MSCALE),
    "coder-v2-instruct": Published("deepseek-ai/DeepSeek-Coder-V2-Instruct", _128K, False, _CODER_NO_FIM, "v2", _MSCALE),
    "v2-chat-0628": Published("deepseek-ai/DeepSeek-V2-Chat-0628", _128K, None, "V2.5's card: DS-FIM-Eval n/a", "v2.5", _MSCALE),
    "coder-v2-instruct-0724": Published(
        "deepseek-ai/DeepSeek-Coder-V2-Instruct-0724", _128K, True, "V2.5's card: DS-FIM-Eval 73.2", "v2.5", _MSCALE
    ),
    "v2.5": Published("deepseek-ai/DeepSeek-V2.5", _128K, True, "its card: DS-FIM-Eval 78.3", "v2.5"),
    "v2.5-1210": Published("deepseek-ai/DeepSeek-V2.5-1210", _128K, None, "no figure seen; V2.5 before it can", "v2.5", _MSCALE),
}


# Fields that say how a model is trained or padded, not what it computes.
_NOT_SHAPE = frozenset({"initializer_range", "aux_loss_alpha", "pad_token_id"})
# Fields that change what it computes, but neither a size nor a cost.
_POSITIONS = frozenset({"rope_scaling", "rope_theta", "max_position_embeddings", "bos_token_id", "eos_token_id"})


def same_shape(one: ModelConfig, other: ModelConfig, *, positions: bool = True) -> bool:
    """Tell whether two configs are of one shape, however they are trained.

    Args:
        one: a config.
        other: a config.
        positions: rotary embedding, context and special tokens must be the same as well; without them the two only cost the same to run.
    """
    ignored = set(_NOT_SHAPE if positions else _NOT_SHAPE | _POSITIONS)
    return one.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the named model's config, with single fields replaced.

    Raises:
        ConfigError: no such preset (the nearest name is given), an unknown field, or sizes that do not fit together.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}", hint=did_you_mean(name, PRESETS))
    return ModelConfig.from_dict(PRESETS[name] | overrides, source=f"preset {name}")
