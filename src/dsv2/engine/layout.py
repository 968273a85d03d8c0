"""What a packed model holds, from its config and scheme alone: every matrix with its format and size, in the order of the file.

One file, ``packed.safetensors``: a plain tensor under the slot's name, a quantised one as NAME.data and NAME.scales in the tiles of
kernels/formats.py. Experts of a layer are stacked; kv_b_proj is there twice, once as the absorbed reading multiplies by it and once,
rounded to the same values, as the expanded one does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from dsv2.checkpoint.shard import TensorSpec
from dsv2.kernels.cpu.library import Type, tiles
from dsv2.kernels.formats import TILE
from dsv2.model.config import ModelConfig

FILE, METHOD = "packed.safetensors", "dsv2-packed"  # METHOD: quant_method of config.json's quantization_config
Scheme = Literal["4", "mixed", "8", "bf16", "fp32"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
# Format of the routed experts' matrices, and of all others. Norms and routers keep theirs in any scheme.
_FORMATS: dict[Scheme, tuple[Type, Type]] = {
    "4": (Type.I4, Type.I4),
    "mixed": (Type.I4, Type.I8),
    "8": (Type.I8, Type.I8),
    "bf16": (Type.BF16, Type.BF16),
    "fp32": (Type.F32, Type.F32),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """One weight of a packed model.

    Args:
        name: "final_norm", "layers.3.expert_down", ...; the last part is the field of ``kernels.cpu.library.Layer``.
        type: how it is stored.
        rows: stacked rows, filled up where tiles need it; 1 for a norm's gain.
        cols: columns.
        sources: published tensors that it is made of, one below the other.
    """

    name: str
    type: Type
    rows: int
    cols: int
    sources: tuple[str, ...]

    @property
    def quantised(self) -> bool:
        """Whether it is stored in tiles."""
        return self.type in (Type.I8, Type.I4)

    def specs(self) -> dict[str, TensorSpec]:
        """Return its tensors in the file."""
        if not self.quantised:
            return {self.name: TensorSpec("F32" if self.type == Type.F32 else "BF16", (self.rows, self.cols))}
        count = tiles(self.rows, self.cols)
        data = count * (256 if self.type == Type.I4 else 512)
        return {f"{self.name}.data": TensorSpec("U8", (data,)), f"{self.name}.scales": TensorSpec("BF16", (count * TILE,))}


def padded(rows: int, unit: int) -> int:
    """Return the next multiple of ``unit``."""
    return -(-rows // unit) * unit


def expert_stride(config: ModelConfig, kind: Type) -> int:
    """Return the rows from an expert's gate matrix to its up matrix."""
    width = config.moe_intermediate_size or 0
    return padded(width, 32) if kind in (Type.I8, Type.I4) else width


def slots(config: ModelConfig, scheme: Scheme) -> Iterator[Slot]:
    """Yield every slot, in the order of the file."""
    _, other = _FORMATS[scheme]
    hidden = config.hidden_size
    yield Slot("embedding", other, config.vocab_size, hidden, ("model.embed_tokens.weight",))
    for index in range(config.num_hidden_layers):
        yield from _attention(config, scheme, f"layers.{index}", f"model.layers.{index}")
        yield from _feed_forward(config, scheme, index)
    yield Slot("final_norm", Type.F32, 1, hidden, ("model.norm.weight",))
    if not config.tie_word_embeddings:
        yield Slot("head", other, config.vocab_size, hidden, ("lm_head.weight",))


def _attention(config: ModelConfig, scheme: Scheme, to: str, prefix: str) -> Iterator[Slot]:
    _, kind = _FORMATS[scheme]
    hidden, heads, latent, at = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, f"{prefix}.self_attn"
    yield Slot(f"{to}.attention_norm", Type.F32, 1, hidden, (f"{prefix}.input_layernorm.weight",))
    if config.q_lora_rank is None:
        yield Slot(f"{to}.query", kind, heads * config.qk_head_dim, hidden, (f"{at}.q_proj.weight",))
    else:
        yield Slot(f"{to}.query_down", kind, config.q_lora_rank, hidden, (f"{at}.q_a_proj.weight",))
        yield Slot(f"{to}.query_norm", Type.F32, 1, config.q_lora_rank, (f"{at}.q_a_layernorm.weight",))
        yield Slot(f"{to}.query", kind, heads * config.qk_head_dim, config.q_lora_rank, (f"{at}.q_b_proj.weight",))
    yield Slot(f"{to}.latent", kind, config.latent_dim, hidden, (f"{at}.kv_a_proj_with_mqa.weight",))
    yield Slot(f"{to}.latent_norm", Type.F32, 1, latent, (f"{at}.kv_a_layernorm.weight",))
    up = (f"{at}.kv_b_proj.weight",)
    if kind in (Type.I8, Type.I4):
        yield Slot(f"{to}.key_up", kind, heads * padded(latent, TILE), config.qk_nope_head_dim, up)
        yield Slot(f"{to}.value_up", kind, heads * padded(config.v_head_dim, TILE), latent, up)
    plain = kind if kind == Type.F32 else Type.BF16
    yield Slot(f"{to}.up", plain, heads * (config.qk_nope_head_dim + config.v_head_dim), latent, up)
    yield Slot(f"{to}.out", kind, hidden, heads * config.v_head_dim, (f"{at}.o_proj.weight",))


def _feed_forward(config: ModelConfig, scheme: Scheme, index: int) -> Iterator[Slot]:
    experts_kind, kind = _FORMATS[scheme]
    to, prefix, hidden = f"layers.{index}", f"model.layers.{index}", config.hidden_size
    yield Slot(f"{to}.feed_forward_norm", Type.F32, 1, hidden, (f"{prefix}.post_attention_layernorm.weight",))
    if not config.is_moe_layer(index):
        yield from _network(to, kind, f"{prefix}.mlp", config.intermediate_size, hidden)
        return
    count, width = config.n_routed_experts or 0, config.moe_intermediate_size or 0
    yield Slot(f"{to}.router", Type.F32, count, hidden, (f"{prefix}.mlp.gate.weight",))
    if config.shared_intermediate_size:
        yield from _network(to, kind, f"{prefix}.mlp.shared_experts", config.shared_intermediate_size, hidden)
    experts = [f"{prefix}.mlp.experts.{expert}" for expert in range(count)]
    both = tuple(f"{expert}.{half}_proj.weight" for expert in experts for half in ("gate", "up"))
    yield Slot(f"{to}.expert_gate_up", experts_kind, 2 * count * expert_stride(config, experts_kind), hidden, both)
    rows = padded(hidden, TILE) if experts_kind in (Type.I8, Type.I4) else hidden
    yield Slot(f"{to}.expert_down", experts_kind, count * rows, width, tuple(f"{expert}.down_proj.weight" for expert in experts))


def _network(to: str, kind: Type, prefix: str, width: int, hidden: int) -> Iterator[Slot]:
    yield Slot(f"{to}.gate", kind, width, hidden, (f"{prefix}.gate_proj.weight",))
    yield Slot(f"{to}.up_gate", kind, width, hidden, (f"{prefix}.up_proj.weight",))
    yield Slot(f"{to}.down", kind, hidden, width, (f"{prefix}.down_proj.weight",))
