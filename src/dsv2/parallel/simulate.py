"""Training planned: seconds of a step, MFU and GPU-hours of a layout, in closed form. Works without torch.

A microbatch on a stage costs F, B, W seconds: matrix products at ``efficiency`` of the bf16 peak, plus what recompute repeats and what
the all-to-all leaves uncovered by the shared experts (section 3.1.3). The step is m times the slowest stage, the schedule's bubble, and
what is not hidden of the exchange of gradients and weights among copies (``sync.py``). ``COST`` says which parts a step is made of; they
add up to it exactly.
"""

from dataclasses import dataclass

from dsv2.model.accounting import count_parameters, training_flops_per_token
from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.layout import Layout, Stage, layer_parameters, stages_of
from dsv2.parallel.memory import RankMemory, rank_memories
from dsv2.parallel.routing import expected_devices
from dsv2.parallel.schedules import SCHEDULES, Schedule, bubble_fraction, bubble_seconds
from dsv2.parallel.sync import sync_seconds

TRILLION = 1e12
COST = ("compute", "recompute", "all-to-all", "imbalance", "bubble", "sync")


@dataclass(frozen=True, slots=True)
class AllToAll:
    """The expert all-to-all of one token in one MoE layer.

    Args:
        devices: on how many ranks its experts are, on average.
        unlimited: the same without device-limited routing.
        bound: M; the most with the limit.
        remote: share of those ranks that are other ranks than its own.
        token_bytes: sent per token and layer, forward and backward, dispatch and combine.
        unlimited_bytes: the same without the limit.
        inter_share: share of the sent bytes that leaves the node.
        seconds: of one dispatch of one microbatch; combine and both of the backward take the same.
        shared_seconds: of the shared experts' forward, which runs meanwhile.
    """

    devices: float
    unlimited: float
    bound: int
    remote: float
    token_bytes: float
    unlimited_bytes: float
    inter_share: float
    seconds: float
    shared_seconds: float


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch on one stage: F, B, W and what is in them.

    Args:
        compute: the products of forward and backward, without recompute.
        weight: of them the gradients of the weights, W.
        forward: of them the forward.
        recompute: repeated in the backward.
        exposed_forward: all-to-all not covered, forward.
        exposed_backward: the same, backward.
    """

    compute: float
    weight: float
    forward: float
    recompute: float
    exposed_forward: float
    exposed_backward: float

    @property
    def total(self) -> float:
        """F + B + W."""
        return self.compute + self.recompute + self.exposed_forward + self.exposed_backward

    @property
    def phases(self) -> tuple[float, float, float]:
        """(F, B, W)."""
        forward = self.forward + self.exposed_forward
        return forward, self.total - forward - self.weight, self.weight


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a layout comes to.

    Args:
        layout: the layout.
        stages: what each pipeline rank holds.
        memory: of each pipeline rank.
        capacity: bytes one GPU has.
        all_to_all: per token and MoE layer; None without routed experts.
        phases: F, B, W of the slowest stage.
        slowest: its rank.
        bubbles: idle share of the step by schedule, this layout otherwise; without those that need more layers than there are.
        cost: seconds of a step by part, named as in ``COST``.
        sync_links_seconds: of a step in which the links exchange gradients and weights; ``cost`` holds what is not hidden.
        boundary_seconds: one stage handing one microbatch to the next; hidden behind compute.
        tokens_per_step: tokens of a step.
        flops_per_token: (6N alone, with causal attention).
        peak: bf16 FLOP/s of one GPU.
    """

    layout: Layout
    stages: tuple[Stage, ...]
    memory: tuple[RankMemory, ...]
    capacity: float
    all_to_all: AllToAll | None
    phases: tuple[float, float, float]
    slowest: int
    bubbles: dict[Schedule, float]
    cost: dict[str, float]
    sync_links_seconds: float
    boundary_seconds: float
    tokens_per_step: int
    flops_per_token: tuple[float, float]
    peak: float

    @property
    def worst_rank(self) -> int:
        """The pipeline rank that needs the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def needed(self) -> float:
        """Bytes that this rank needs."""
        return self.memory[self.worst_rank].total

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices."""
        return self.needed <= self.capacity

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimiser step."""
        return sum(self.cost.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens_per_step / self.step_seconds

    @property
    def gpu_hours_per_trillion(self) -> float:
        """GPU-hours for 1e12 tokens."""
        return TRILLION / self.tokens_per_second * self.layout.gpus / 3600

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOP utilisation: (6N alone, with causal attention) (spec 10.21)."""
        rate = self.tokens_per_second / self.layout.gpus / self.peak
        return self.flops_per_token[0] * rate, self.flops_per_token[1] * rate


def mfu_from_gpu_hours(flops_per_token: float, gpu_hours: float, peak: float) -> float:
    """Return the model FLOP utilisation that a measured cost amounts to: FLOP/token * 1e12 / (GPU-hours * 3600 * peak) (spec 4.2).

    Args:
        flops_per_token: forward and backward, in whichever convention.
        gpu_hours: per 1e12 tokens.
        peak: FLOP/s of one GPU.

    Returns:
        A share of the peak.
    """
    return flops_per_token * TRILLION / (gpu_hours * 3600 * peak)


def flops_per_token(config: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Return training FLOP per token in both conventions: 6 per activated parameter, and with causal attention (spec 10.21).

    Args:
        config: the model; everything is counted, input embedding and head as well.
        seq_len: tokens of a sequence.

    Returns:
        (6N, 6N + attention).
    """
    return 6.0 * count_parameters(config).activated, training_flops_per_token(config, seq_len)


def all_to_all(config: ModelConfig, layout: Layout, hardware: Hardware) -> AllToAll | None:
    """Return volume and time of the expert all-to-all; a token bound for several experts of one rank is sent there once (spec 3.4b).

    Args:
        config: the model.
        layout: its ep, tokens of a microbatch and efficiency.
        hardware: bandwidths; ranks of one ep group are neighbours, so they fill nodes one after the other.

    Returns:
        None for a model without routed experts.
    """
    if config.n_routed_experts is None:
        return None
    ep, row = layout.ep, 2.0 * config.hidden_size
    devices, unlimited = expected_devices(config, ep), expected_devices(config, ep, limited=False)
    limited = config.topk_method == "group_limited_greedy"
    group_devices = max(1, ep // config.n_group)  # ranks that share one group
    bound = min(ep, config.num_experts_per_tok or 0, config.topk_group * group_devices if limited else ep)
    remote = (ep - 1) / ep
    outside = max(0, ep - hardware.gpus_per_node)
    inter_share = outside / (ep - 1) if ep > 1 else 0.0
    sent = layout.tokens * devices * remote * row
    seconds = max(sent * (1 - inter_share) / hardware.intra_bandwidth, sent * inter_share / hardware.inter_bandwidth)
    shared = 2 * layout.tokens * 3 * config.hidden_size * config.shared_intermediate_size / (hardware.bf16_flops * layout.efficiency)
    volume = 4 * remote * row
    return AllToAll(devices, unlimited, bound, remote, volume * devices, volume * unlimited, inter_share, seconds, shared)


def stage_times(config: ModelConfig, layout: Layout, hardware: Hardware, stage: Stage, exchange: AllToAll | None) -> Times:
    """Return the seconds of one microbatch on one stage.

    Args:
        config: the model.
        layout: how it is trained.
        hardware: where.
        stage: what the rank holds.
        exchange: its all-to-all.

    Returns:
        F, B, W and their parts.
    """
    c, rate = config, hardware.bf16_flops * layout.efficiency
    dense, _ = layer_parameters(c, moe=False)
    fixed, expert = layer_parameters(c, moe=True)
    in_layers = stage.dense_layers * dense + stage.moe_layers * (fixed + expert * (c.num_experts_per_tok or 0))
    head = c.vocab_size * c.hidden_size if stage.head else 0
    products = 2 * layout.tokens * (in_layers + head) / rate
    attention = layout.tokens * stage.layers * 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * layout.seq_len / 2 / rate
    repeated = 0.0
    if layout.recompute == "full":
        repeated = 2 * layout.tokens * in_layers / rate + attention
    elif layout.recompute == "selective":
        heads = c.num_attention_heads
        up = heads * c.qk_head_dim * (c.q_lora_rank or 0) + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        repeated = 2 * layout.tokens * stage.layers * up / rate
    exposed = again = 0.0
    if exchange is not None:
        exposed = stage.moe_layers * max(0.0, 2 * exchange.seconds - exchange.shared_seconds)
        again = exposed if layout.recompute == "full" else 0.0
    return Times(3 * (products + attention), products, products + attention, repeated, exposed, exposed + again)


def simulate(config: ModelConfig, layout: Layout, hardware: Hardware) -> TrainPlan:
    """Plan the training of a model.

    Args:
        config: the model.
        layout: how.
        hardware: where.

    Returns:
        Memory, bubble, all-to-all, time and cost; ``fits`` says whether it can run.

    Raises:
        ConfigError: layers, experts or the batch do not divide as the layout wants.
    """
    layout.check(config)
    stages, exchange = stages_of(config, layout), all_to_all(config, layout, hardware)
    known = {stage: stage_times(config, layout, hardware, stage, exchange) for stage in set(stages)}  # most stages are alike
    parts = [known[stage] for stage in stages]
    totals = [part.total for part in parts]
    slowest = max(range(layout.pp), key=totals.__getitem__)
    forward, backward, weight = parts[slowest].phases
    m, mean = layout.microbatches, lambda values: sum(values) / layout.pp
    bubbles: dict[Schedule, float] = {}
    for schedule in SCHEDULES:
        chunks = max(layout.chunks, 2) if schedule == "interleaved" else 1
        if layout.pp * chunks > config.num_hidden_layers:
            continue
        idle = bubble_seconds(schedule, layout.pp, m, forward, backward, weight, chunks)
        bubbles[schedule] = bubble_fraction(idle, m, totals[slowest])
    phases = {stage: times.phases for stage, times in known.items()}
    synced = [sync_seconds(config, layout, hardware, stage, f, b + w) for stage, (f, b, w) in phases.items()]
    cost = {
        "compute": m * mean([part.compute for part in parts]),
        "recompute": m * mean([part.recompute for part in parts]),
        "all-to-all": m * mean([part.exposed_forward + part.exposed_backward for part in parts]),
        "imbalance": m * (totals[slowest] - mean(totals)),
        "bubble": bubble_seconds(layout.schedule, layout.pp, m, forward, backward, weight, layout.chunks),
        "sync": max(exposed for _, exposed in synced),
    }
    outer = hardware.intra_bandwidth if layout.gpus <= hardware.gpus_per_node else hardware.inter_bandwidth
    return TrainPlan(
        layout=layout,
        stages=stages,
        memory=rank_memories(config, layout, stages),
        capacity=hardware.memory_bytes,
        all_to_all=exchange,
        phases=(forward, backward, weight),
        slowest=slowest,
        bubbles=bubbles,
        cost=cost,
        sync_links_seconds=max(sent for sent, _ in synced),
        boundary_seconds=2.0 * layout.tokens * config.hidden_size / outer if layout.pp > 1 else 0.0,
        tokens_per_step=layout.batch * layout.seq_len,
        flops_per_token=flops_per_token(config, layout.seq_len),
        peak=hardware.bf16_flops,
    )
