"""How a training run is laid over GPUs: the three axes, the schedule, what is sharded and recomputed. Works without torch.

GPUs = pp * ep * dp. Every one of the ep * dp ranks of a pipeline stage reads data of its own. A routed expert has dp copies; every other
weight has ep * dp copies (spec 4.2: V2's smallest replica is pp * ep = 16 * 8 = 128 GPUs).
"""

from dataclasses import dataclass
from typing import Literal

from dsv2.errors import ConfigError
from dsv2.model.accounting import attention_parameters
from dsv2.model.config import ModelConfig
from dsv2.parallel.routing import check_expert_parallel
from dsv2.parallel.schedules import Schedule, split_layers

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to train: every number decided.

    Args:
        pp: pipeline stages.
        ep: ranks that share the routed experts of a stage.
        dp: copies of each routed expert.
        schedule: of the pipeline.
        chunks: v, model chunks per rank; 1 unless interleaved.
        zero: what is sharded over the copies: 0 nothing, 1 optimiser, 2 and gradients, 3 and weights.
        recompute: what the backward computes again.
        micro_batch: sequences in one forward.
        batch: sequences in one step, all ranks together.
        seq_len: tokens in a sequence.
        efficiency: share of the bf16 peak that the kernels reach while they run.
        reserve_bytes: memory per GPU left to the CUDA context, NCCL and fragmentation.
    """

    pp: int
    ep: int
    dp: int
    schedule: Schedule
    chunks: int
    zero: int
    recompute: Recompute
    micro_batch: int
    batch: int
    seq_len: int
    efficiency: float
    reserve_bytes: float

    @property
    def gpus(self) -> int:
        """All ranks: pp * ep * dp."""
        return self.pp * self.ep * self.dp

    @property
    def microbatches(self) -> int:
        """m, microbatches of one rank in one step."""
        return self.batch // (self.ep * self.dp * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch."""
        return self.micro_batch * self.seq_len

    @property
    def label(self) -> str:
        """The layout in a few words."""
        schedule = f"{self.schedule} x{self.chunks}" if self.schedule == "interleaved" else self.schedule
        axes = f"pp {self.pp} x ep {self.ep} x dp {self.dp}"
        return f"{axes}, {schedule}, ZeRO-{self.zero}, recompute {self.recompute}, mb {self.micro_batch}"

    def check(self, config: ModelConfig) -> None:
        """Refuse what cannot be laid out.

        Args:
            config: the model.

        Raises:
            ConfigError: layers, experts or the batch do not divide; the message says by what.
        """
        check_expert_parallel(config, self.ep)
        check_chunks(self.schedule, self.chunks)
        split_layers(config.num_hidden_layers, self.pp * self.chunks)
        ranks = self.ep * self.dp * self.micro_batch
        if self.batch % ranks:
            product = f"ep * dp * micro_batch = {self.ep} * {self.dp} * {self.micro_batch} = {ranks}"
            near = max(1, round(self.batch / ranks)) * ranks
            raise ConfigError(f"batch = {self.batch} sequences do not divide by {product}", hint=f"use batch={near}")
        if self.schedule == "interleaved" and self.microbatches % self.pp:
            raise ConfigError(
                f"interleaved needs a multiple of pp = {self.pp} microbatches per rank, not {self.microbatches}",
                hint="change batch, dp or micro_batch",
            )


def check_chunks(schedule: Schedule, chunks: int) -> None:
    """Refuse a schedule that has not so many chunks.

    Args:
        schedule: of the pipeline.
        chunks: model chunks per rank.

    Raises:
        ConfigError: interleaved with one chunk, or another schedule with several.
    """
    if (schedule == "interleaved") != (chunks > 1):
        raise ConfigError(
            f"schedule = {schedule} with chunks = {chunks}", hint="interleaved needs chunks=2 or more, the other schedules chunks=1"
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pipeline rank holds.

    Args:
        dense_layers: layers with one dense feed-forward network.
        moe_layers: layers with experts.
        embedding: parameters of the input embedding held here.
        head: parameters of the output head and final norm held here.
    """

    dense_layers: int
    moe_layers: int
    embedding: int
    head: int

    @property
    def layers(self) -> int:
        """All layers."""
        return self.dense_layers + self.moe_layers


def stages_of(config: ModelConfig, layout: Layout) -> tuple[Stage, ...]:
    """Return what each pipeline rank holds; chunk c of rank r is virtual stage c * pp + r.

    Args:
        config: the model.
        layout: its pp and chunks.

    Returns:
        One ``Stage`` per rank; the embedding on the first, the head on the last. Tied weights are held by both.
    """
    split = split_layers(config.num_hidden_layers, layout.pp * layout.chunks)
    dense, moe, start = [0] * layout.pp, [0] * layout.pp, 0
    for virtual, count in enumerate(split):
        routed = sum(config.is_moe_layer(layer) for layer in range(start, start + count))
        moe[virtual % layout.pp] += routed
        dense[virtual % layout.pp] += count - routed
        start += count
    vocabulary, last = config.vocab_size * config.hidden_size, layout.pp - 1
    return tuple(
        Stage(
            dense[rank],
            moe[rank],
            vocabulary if rank == 0 else 0,
            (0 if config.tie_word_embeddings and last == 0 else vocabulary) + config.hidden_size if rank == last else 0,
        )
        for rank in range(layout.pp)
    )


def layer_parameters(config: ModelConfig, moe: bool) -> tuple[int, int]:
    """Return the parameters of one layer: those every token uses, and those of one routed expert (spec 1.2).

    Args:
        config: the model.
        moe: whether the layer holds experts.

    Returns:
        (attention, norms, router, shared experts or the dense network; one routed expert or 0).
    """
    always = attention_parameters(config) + 2 * config.hidden_size
    if not moe:
        return always + 3 * config.hidden_size * config.intermediate_size, 0
    router = config.hidden_size * (config.n_routed_experts or 0)
    shared = 3 * config.hidden_size * config.shared_intermediate_size
    return always + router + shared, 3 * config.hidden_size * (config.moe_intermediate_size or 0)


def stage_parameters(config: ModelConfig, stage: Stage) -> tuple[int, int]:
    """Return the parameters of a stage before any sharding.

    Args:
        config: the model.
        stage: which one.

    Returns:
        (those that ep * dp ranks hold copies of, those of all routed experts).
    """
    dense, _ = layer_parameters(config, moe=False)
    fixed, expert = layer_parameters(config, moe=True)
    copied = stage.dense_layers * dense + stage.moe_layers * fixed + stage.embedding + stage.head
    return copied, stage.moe_layers * expert * (config.n_routed_experts or 0)
