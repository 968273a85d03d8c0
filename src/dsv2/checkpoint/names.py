"""Names and shapes of a published checkpoint's tensors, from its config alone (spec 1.3). Without torch.

Published files hold experts one by one, the model holds them stacked (spec 1.5); ``place_of`` says where a published tensor belongs.
An int8 folder of ours holds, for every matrix that ``is_quantised`` names, the weight as int8 and its ``weight_scale``, one per row.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from dsv2.model.config import FLOAT_IN_INT8, Head, ModelConfig

Shape = tuple[int, ...]

SCORE = "score.weight"  # a reward model's head [1, D], in place of lm_head.weight
SCALE = "_scale"  # of an int8 weight: its name with this behind it

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight(_scale)?")
_MATRIX = re.compile(r"lm_head\.weight|model\.layers\.\d+\..*\.(\w+_proj|kv_a_proj_with_mqa)\.weight")


class Place(NamedTuple):
    """Where a published tensor lives in the model's state.

    Args:
        name: of the model's tensor.
        expert: index along its first axis; None: all of it.
        half: 0 for the gate rows, 1 for the up rows of ``gate_up_proj``; None: all rows.
    """

    name: str
    expert: int | None = None
    half: int | None = None


def place_of(name: str) -> Place:
    """Return the place of a published tensor."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return Place("score_head.weight" if name == SCORE else name)
    prefix, index, kind, scale = match.groups()
    half = {"gate": 0, "up": 1, "down": None}[kind]
    return Place(f"{prefix}.{'down' if half is None else 'gate_up'}_proj{scale or ''}", int(index), half)


def is_quantised(name: str) -> bool:
    """Tell whether an int8 model holds this tensor as int8: all projections but kv_b_proj, and the head; not router or embedding."""
    match = _MATRIX.fullmatch(name)
    return match is not None and match[1] not in FLOAT_IN_INT8


def published_shapes(config: ModelConfig, head: Head = "lm_head") -> Iterator[tuple[str, Shape]]:
    """Yield name and shape ``[out, in]`` of every tensor, layer by layer."""
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield from _attention(f"{layer}.self_attn", config)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if config.is_moe_layer(index):
            yield from _moe(f"{layer}.mlp", config)
        else:
            yield from _swiglu(f"{layer}.mlp", hidden, config.intermediate_size)
    yield "model.norm.weight", (hidden,)
    if head == "score":
        yield SCORE, (1, hidden)
    elif not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _attention(prefix: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_width = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield f"{prefix}.q_proj.weight", (query_width, hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (config.q_lora_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{prefix}.q_b_proj.weight", (query_width, config.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (config.latent_dim, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * config.v_head_dim)


def _moe(prefix: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, experts, width = config.hidden_size, config.n_routed_experts or 0, config.moe_intermediate_size or 0
    yield f"{prefix}.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _swiglu(f"{prefix}.experts.{expert}", hidden, width)
    if config.shared_intermediate_size:
        yield from _swiglu(f"{prefix}.shared_experts", hidden, config.shared_intermediate_size)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)
