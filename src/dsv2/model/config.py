"""ModelConfig: the shape of a DeepSeek-V2 model, field for field as in the published config.json.

Every field of a config.json is honoured or refused: a value that this package would have to ignore is a ConfigError, so a model never runs
as something else than its file says. Works without torch.
"""

import math
import reprlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsv2.errors import ConfigError, did_you_mean

# Fields of config.json that say nothing about the function computed: written for other tools, read and dropped.
_DESCRIPTIVE = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "ep_size", "id2label",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "torch_dtype",
    "transformers_version", "unsloth_version", "use_cache",
}  # fmt: skip
# Fields whose only value with an implementation is this one.
_FIXED: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False, "output_router_logits": False,
    "pretraining_tp": 1, "rope_interleave": True, "scoring_func": "softmax",
}  # fmt: skip
Head = Literal["lm_head", "score"]  # of a language model: logits; of a reward model: one number
_ARCHITECTURES = {"lm_head": "DeepseekV2ForCausalLM", "score": "DeepseekV2ForSequenceClassification"}  # as transformers names them
_LARGEST = 2**31  # no size, length or factor of a model is near it
# Projections that an int8 model keeps as they are: the absorbed reading multiplies by the rows of kv_b_proj and by its columns, and it is
# 1 % of a model.
FLOAT_IN_INT8 = ("kv_b_proj",)
_MODEL_TYPES = ("deepseek_v2", "deepseek")  # the very first upload of V2-Chat said "deepseek"


class YarnScaling(BaseModel):
    """The ``rope_scaling`` block of a YaRN config (section 3.1.4; spec 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0, description="s, context extension factor")
    original_max_position_embeddings: int = Field(gt=0, description="L0, tokens seen in pre-training")
    beta_fast: float = Field(default=32.0, gt=0, description="rotations within L0 above which a frequency is left alone")
    beta_slow: float = Field(default=1.0, gt=0, description="rotations within L0 below which a frequency is divided by the factor")
    mscale: float = Field(default=1.0, ge=0, description="numerator of the factor on cos and sin")
    mscale_all_dim: float = Field(
        default=0.0, ge=0, description="its square multiplies the softmax scale; denominator of the factor on cos and sin"
    )


class ModelConfig(BaseModel):
    """Shape and routing of one model; names as in config.json, symbols of the paper in the descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int = Field(gt=0, description="rows of the embedding, padded; tokens")
    hidden_size: int = Field(gt=0, description="d")
    num_hidden_layers: int = Field(gt=0, description="l")
    num_attention_heads: int = Field(gt=0, description="n_h")
    intermediate_size: int = Field(gt=0, description="width of a dense feed-forward layer")
    q_lora_rank: int | None = Field(default=None, gt=0, description="d_c', query latent; None: queries are not compressed")
    kv_lora_rank: int = Field(gt=0, description="d_c, cached key/value latent")
    qk_nope_head_dim: int = Field(gt=0, description="d_h, part of a query/key head without position")
    qk_rope_head_dim: int = Field(gt=0, description="d_h^R, rotary part of a query/key head; even")
    v_head_dim: int = Field(gt=0, description="value head dimension")
    n_routed_experts: int | None = Field(default=None, gt=0, description="N_r; None: every layer is dense")
    n_shared_experts: int | None = Field(default=None, ge=0, description="N_s; None or 0: no shared expert")
    num_experts_per_tok: int | None = Field(default=None, gt=0, description="K_r")
    moe_intermediate_size: int | None = Field(default=None, gt=0, description="m, width of one expert")
    first_k_dense_replace: int = Field(default=0, ge=0, description="leading layers that are dense")
    moe_layer_freq: int = Field(default=1, gt=0, description="of the layers after those, one in so many is MoE")
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    n_group: int = Field(default=1, gt=0, description="D, groups (devices) the experts are cut into")
    topk_group: int = Field(default=1, gt=0, description="M, groups a token may reach")
    routed_scaling_factor: float = Field(default=1.0, gt=0, description="c_r, multiplies the gates")
    norm_topk_prob: bool = Field(default=False, description="renormalise the chosen gates to sum 1 (no published V2 does)")
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10000.0, gt=1)
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = Field(default=4096, gt=0, description="tokens")
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0, description="standard deviation of the initial matrices")
    aux_loss_alpha: float = Field(default=0.001, ge=0, description="as published; training recipes state their own factors")
    seq_aux: Literal[True] = Field(default=True, description="of published training; ours: balance.scope in the recipe")
    bos_token_id: int = Field(default=100000, ge=0)
    eos_token_id: int = Field(default=100001, ge=0)
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even: it holds pairs that rotate")
        if self.n_routed_experts is not None:
            self._check_routing(self.n_routed_experts)
        return self

    def _check_routing(self, n_routed_experts: int) -> None:
        if self.num_experts_per_tok is None or self.moe_intermediate_size is None:
            raise ValueError("n_routed_experts is set, so num_experts_per_tok and moe_intermediate_size must be, too")
        groups = self.n_group
        reachable = self.reachable_groups
        if n_routed_experts % groups:
            raise ValueError(
                f"n_routed_experts = {n_routed_experts} does not split into n_group = {groups} equal groups: use a multiple of {groups}"
            )
        if self.topk_group > groups:
            raise ValueError(f"topk_group = {self.topk_group} exceeds n_group = {groups}")
        if self.num_experts_per_tok > n_routed_experts // groups * reachable:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} exceeds the experts a token can reach:"
                f" ({reachable} of {groups} groups of {n_routed_experts // groups})"
            )

    # -- derived sizes ------------------------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """d_h + d_h^R: width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """d_c + d_h^R: numbers cached per token and layer (section 2.1.4)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the fused shared experts, N_s * m; 0 without shared experts."""
        return (self.n_shared_experts or 0) * (self.moe_intermediate_size or 0)

    @property
    def num_moe_layers(self) -> int:
        """How many layers hold routed experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    @property
    def reachable_groups(self) -> int:
        """Groups that a token may reach: M where routing is limited to it, else all."""
        return self.topk_group if self.topk_method == "group_limited_greedy" else self.n_group

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(d_h + d_h^R), times the square of YaRN's m(mscale_all_dim) (spec 5.2): it scales all dimensions, also the unrotated."""
        scale: float = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def rotation_scale(self) -> float:
        """Factor on cos and sin: m(mscale) / m(mscale_all_dim), 1.0 in every DeepSeek config (spec 5.2)."""
        yarn = self.rope_scaling
        return 1.0 if yarn is None else yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer ``layer`` (from 0) holds routed experts instead of one dense feed-forward network."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    # -- config.json --------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config.json") -> "ModelConfig":
        """Read the content of a config.json, old (``rope_scaling``) or new (``rope_parameters``) form.

        Raises:
            ConfigError: an unknown field (the nearest name is given), a value without implementation, or sizes that do not fit together.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: a JSON object was expected, found {type(values).__name__}")
        fields = dict(values)
        _refuse_wrong_kinds(fields, source)
        if fields.get("model_type", "deepseek_v2") not in _MODEL_TYPES:
            raise ConfigError(
                f"{source}: model_type = {fields['model_type']!r} is not a DeepSeek-V2 model; allowed: {', '.join(_MODEL_TYPES)}"
            )
        for name in [name for name, value in fields.items() if name in _DESCRIPTIVE or (value is None and name not in cls.model_fields)]:
            del fields[name]
        _take_fixed(fields, source)
        _take_rope(fields, source)
        return _validated(cls, fields, source)

    def to_dict(self, *, torch_dtype: str = "bfloat16", head: Head = "lm_head") -> dict[str, Any]:
        """Return the content of a config.json as DeepSeek writes it; ``torch_dtype`` and ``head`` are those of the weights beside it."""
        values = self.model_dump()
        values["num_key_value_heads"] = self.num_attention_heads
        values |= {name: value for name, value in _FIXED.items() if name not in ("mlp_bias", "output_router_logits", "rope_interleave")}
        if head == "score":
            values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        return {
            "architectures": [_ARCHITECTURES[head]],
            "model_type": "deepseek_v2",
            **values,
            "torch_dtype": torch_dtype,
            "use_cache": True,
        }


def head_of(fields: dict[str, Any]) -> Head:
    """Return the head that a config.json says its weights have."""
    return "score" if fields.get("architectures") == [_ARCHITECTURES["score"]] else "lm_head"


def yarn_mscale(factor: float, mscale: float) -> float:
    """m(x) = 0.1 x ln s + 1 for s > 1, else 1 (spec 5.2)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _refuse_wrong_kinds(fields: dict[str, Any], source: str) -> None:
    """Numbers are numbers, blocks are blocks: a config that writes 256 as text or true was not meant for a model."""
    for name, field in ModelConfig.model_fields.items():
        value = fields.get(name)
        number = field.annotation in (int, float, int | None)
        if number and value is not None:
            _require_number(name, value, source)
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name), dict | None):
            raise ConfigError(f"{source}: {name} = {fields[name]!r} must be an object or null")
    if fields.get("rope_parameters") and fields.get("rope_scaling"):
        raise ConfigError(f"{source}: rope_parameters and rope_scaling are two spellings of one thing; state one")
    for name in ("qk_nope_head_dim", "qk_rope_head_dim"):
        if name in fields and fields[name] is None:
            raise ConfigError(f"{source}: {name} = null must be a number")


def _require_number(name: str, value: Any, source: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise ConfigError(f"{source}: {name} = {reprlib.repr(value)} must be a number below 2**31")


def _take_fixed(fields: dict[str, Any], source: str) -> None:
    for name, allowed in _FIXED.items():
        value = fields.pop(name, allowed)
        if value != allowed:
            raise ConfigError(f"{source}: {name} = {value!r} is not supported; allowed: {allowed!r}")
    heads, kv_heads = fields.get("num_attention_heads"), fields.pop("num_key_value_heads", None)
    if kv_heads is not None and kv_heads != heads:
        raise ConfigError(
            f"{source}: num_key_value_heads = {kv_heads} must equal num_attention_heads = {heads}: MLA has one latent for all heads"
        )
    head_dim = fields.pop("head_dim", None)  # newer transformers write qk_rope_head_dim here
    if head_dim is not None and head_dim != fields.get("qk_rope_head_dim"):
        raise ConfigError(f"{source}: head_dim = {head_dim} must equal qk_rope_head_dim = {fields.get('qk_rope_head_dim')}")
    whole, width = fields.pop("qk_head_dim", None), fields.get("qk_nope_head_dim", 0) + fields.get("qk_rope_head_dim", 0)
    if whole is not None and whole != width:
        raise ConfigError(f"{source}: qk_head_dim = {whole} must equal qk_nope_head_dim + qk_rope_head_dim = {width}")
    for name in ("n_group", "topk_group"):  # null where the model has no groups
        if fields.get(name, 1) is None:
            del fields[name]


def _take_rope(fields: dict[str, Any], source: str) -> None:
    """Bring both spellings of the rotary settings to ``rope_theta`` + ``rope_scaling``."""
    parameters = fields.pop("rope_parameters", None)
    scaling = dict(parameters if parameters is not None else fields.pop("rope_scaling", None) or {})
    fields.pop("rope_scaling", None)
    for name, value in scaling.items():
        if name == "rope_theta" or name in YarnScaling.model_fields and name != "type":
            _require_number(name, value, source)
    if "rope_theta" in scaling:
        fields["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type", None) or scaling.get("type") or ("yarn" if scaling else "default")
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{source}: rope_scaling type = {kind!r} is not supported; allowed: 'yarn' or none")
    if scaling.pop("truncate", True) is not True:
        raise ConfigError(f"{source}: rope_scaling truncate = false is not supported; DeepSeek-V2 rounds the ramp's ends")
    scaling.pop("type", None)
    if kind == "default" and scaling:
        raise ConfigError(f"{source}: rope_parameters of type 'default' hold {next(iter(scaling))!r}, which only 'yarn' has")
    fields["rope_scaling"] = {**scaling, "type": "yarn"} if kind == "yarn" else None


def _validated(cls: type[ModelConfig], fields: dict[str, Any], source: str) -> ModelConfig:
    """Build the config; a pydantic error becomes a ConfigError that names the field, the value and the nearest known name."""
    try:
        return cls.model_validate(fields)
    except ValidationError as failure:
        error = failure.errors()[0]
        name = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            known = YarnScaling.model_fields if len(error["loc"]) > 1 else cls.model_fields
            hint = did_you_mean(str(error["loc"][-1]), known)
            raise ConfigError(f"{source}: unknown field {name!r} = {error['input']!r}", hint=hint) from None
        reason = error["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source}: {name + ' = ' + repr(error['input']) + ': ' if name else ''}{reason}") from None
