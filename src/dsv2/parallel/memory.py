"""Memory of one training rank, by kind, from shapes alone. Works without torch.

Mixed precision as in spec 10.11: bf16 weights, fp32 gradients that accumulate over microbatches, fp32 master weights and two fp32 moments.
Activations are counted tensor by tensor (``activation_items``); flash attention keeps no score matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from dsv2.model.config import ModelConfig
from dsv2.parallel.layout import Layout, Stage, layer_parameters, stage_parameters
from dsv2.parallel.routing import expected_devices
from dsv2.parallel.schedules import microbatches_held

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes per parameter: bf16; fp32; fp32 master weight and two moments


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank at its worst moment.

    Args:
        weights: bf16.
        gradients: fp32.
        optimizer: fp32 master weights and moments.
        activations: kept for the backward of all microbatches in flight.
        working: one layer at work: what its backward needs at once, and with ZeRO-3 the gathered weights of two layers.
        logits: of one microbatch, fp32, the gradient written in place; last stage only.
        all_to_all: send and receive buffers of dispatch and combine.
        reserve: CUDA context, NCCL, fragmentation.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    logits: float
    all_to_all: float
    reserve: float

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return sum(float(getattr(self, kind.name)) for kind in fields(self))


class Activation(NamedTuple):
    """A tensor that a layer's backward needs: name, bytes per token, and whether selective recompute still keeps it."""

    name: str
    num_bytes: float
    kept: bool


def activation_items(config: ModelConfig, devices: float, moe: bool) -> list[Activation]:
    """Return what one layer keeps per token for its backward.

    Selective recompute does again what is cheap: norms, the up-projections of MLA, the SwiGLU product, the sorting of rows by expert.
    The outputs of routed experts are not among them: the gradient of a gate g in g W_down h is <W_down^T dy, h>, and both factors are
    there for the gradients of h and W_down anyway (``kernels/grouped.py`` does the same).

    Args:
        config: the model.
        devices: on how many ranks the routed experts of a token are, on average.
        moe: whether the layer holds experts.

    Returns:
        The tensors; bf16 unless named fp32.
    """
    c, heads, d = config, config.num_attention_heads, config.hidden_size
    queries = 2.0 * heads * c.qk_head_dim
    items = [
        Activation("input of attention", 2.0 * d, True),
        Activation("its norm", 2.0 * d, False),
        Activation("query latent", 2.0 * (c.q_lora_rank or 0), True),
        Activation("its norm", 2.0 * (c.q_lora_rank or 0), False),
        Activation("queries", queries, c.q_lora_rank is None),
        Activation("key/value latent and rotary key", 2.0 * c.latent_dim, True),
        Activation("its norm", 2.0 * c.kv_lora_rank, False),
        Activation("keys", queries, False),
        Activation("values", 2.0 * heads * c.v_head_dim, False),
        Activation("output of attention, fp32 log-sum", heads * (2.0 * c.v_head_dim + 4), True),
        Activation("input of feed-forward", 2.0 * d, True),
        Activation("its norm", 2.0 * d, False),
    ]
    if not moe:
        wide = 2.0 * c.intermediate_size
        return [*items, Activation("gate and up", 2 * wide, True), Activation("their product", wide, False)]
    chosen, narrow = c.num_experts_per_tok or 0, 2.0 * (c.moe_intermediate_size or 0)
    shared = 2.0 * c.shared_intermediate_size
    return [
        *items,
        Activation("affinities, fp32", 4.0 * (c.n_routed_experts or 0), True),
        Activation("rows received, one per device", devices * 2.0 * d, True),
        Activation("rows sorted by expert", chosen * 2.0 * d, False),
        Activation("gate and up of routed experts", chosen * 2 * narrow, True),
        Activation("their product", chosen * narrow, False),
        Activation("gate and up of shared experts", 2 * shared, True),
        Activation("their product", shared, False),
    ]


def activation_bytes(config: ModelConfig, layout: Layout, moe: bool) -> tuple[float, float]:
    """Return bytes per token and layer: kept until the backward, and needed at once when it runs.

    Args:
        config: the model.
        layout: its recompute and ep.
        moe: whether the layer holds experts.

    Returns:
        (kept, at work).
    """
    items = activation_items(config, expected_devices(config, layout.ep), moe)
    whole = sum(item.num_bytes for item in items)
    if layout.recompute == "full":
        return 2.0 * config.hidden_size, whole
    if layout.recompute == "selective":
        return sum(item.num_bytes for item in items if item.kept), whole
    return whole, whole


def shard_sizes(layout: Layout, level: int) -> tuple[int, int]:
    """Return over how many ranks a state is sharded beyond expert parallelism when ZeRO reaches ``level``.

    Args:
        layout: its zero, ep and dp.
        level: 1 optimiser, 2 gradients, 3 weights.

    Returns:
        (parts of a weight that all ranks of a stage hold, parts of an expert).
    """
    return (layout.ep * layout.dp, layout.dp) if layout.zero >= level else (1, 1)


def rank_memories(config: ModelConfig, layout: Layout, stages: Sequence[Stage]) -> tuple[RankMemory, ...]:
    """Return the memory of every pipeline rank.

    Args:
        config: the model.
        layout: how it is trained.
        stages: what each rank holds.

    Returns:
        Bytes by kind, rank by rank.
    """
    layer = {moe: activation_bytes(config, layout, moe=moe) for moe in (False, True)}
    devices = expected_devices(config, layout.ep) if layout.ep > 1 else 0.0
    fixed, expert = layer_parameters(config, moe=config.num_moe_layers > 0)
    gathered = 2 * WEIGHT * (fixed + expert * (config.n_routed_experts or 0) / layout.ep) if layout.zero == 3 else 0.0

    def of(stage: Stage, rank: int) -> RankMemory:
        copied, experts = stage_parameters(config, stage)

        def sharded(num_bytes: int, level: int) -> float:
            parts, expert_parts = shard_sizes(layout, level)
            return num_bytes * (copied / parts + experts / layout.ep / expert_parts)

        held = microbatches_held(layout.schedule, layout.pp, rank, layout.microbatches, layout.chunks) * layout.tokens
        at_work = max(layer[False][1] if stage.dense_layers else 0.0, layer[True][1] if stage.moe_layers else 0.0)
        return RankMemory(
            weights=sharded(WEIGHT, 3),
            gradients=sharded(GRADIENT, 2),
            optimizer=sharded(OPTIMIZER, 1),
            activations=held * (stage.dense_layers * layer[False][0] + stage.moe_layers * layer[True][0]),
            working=layout.tokens * at_work + gathered,
            logits=4.0 * layout.tokens * config.vocab_size if stage.head else 0.0,
            all_to_all=4.0 * layout.tokens * devices * 2 * config.hidden_size if stage.moe_layers else 0.0,
            reserve=layout.reserve_bytes,
        )

    return tuple(of(stage, rank) for rank, stage in enumerate(stages))
