"""Serving planned: what a node can cache, how many requests it can hold, and tokens/s by roofline. Works without torch.

A step takes max(compute, memory, communication) / utilisation, each a sum over the step. What limits whom on 8 H800s, by hand, per
generated token with 2,300 tokens of context (the mix fitted in ``fit.py``) and full use of the peaks:

- DeepSeek 67B, TP-8: memory, 43 us: a key is 389 KB, 14.5 ns on 8 memories, and 525 requests share the weights' 5 ms. The links are next:
  2 all-reduces x 95 layers x 16 KB x 7/4 = 5.4 MB, 27 us at 200 GB/s. Matrix units 18 us.
- V2, data-parallel attention: matrix units, 7.5 us: 41.7 GFLOP in fp8 are 2.6 us, and absorbed attention 16.7 MFLOP a key in bf16, 2.1 ns.
  Memory 4.8 us, links 2.0 us. The cache is no longer what limits: past some 2,500 requests more of them gain nothing.
- V2, plain TP-8: memory, 30 us: all heads share one latent, so each GPU holds and reads the whole cache, 7.7 ns a key, and an eighth of
  the requests shares the weights' 9 ms.
"""

from dataclasses import dataclass
from typing import Literal

from dsv2.errors import ConfigError
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.routing import check_expert_parallel, expected_devices, experts_touched
from dsv2.parallel.served import Served

Attention = Literal["dp", "tp"]
PREFILL_TOKENS = 16_384  # prompt tokens of one node step, which read the weights once
WIRE_BYTES = 2  # activations travel as bf16


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked, as means.

    Args:
        prompt: tokens of a prompt.
        output: tokens of an answer.
    """

    prompt: float
    output: float

    @property
    def resident(self) -> float:
        """Cached tokens of a request, averaged over its generation: prompt + output/2."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, slots=True)
class ServeLayout:
    """How a model is laid over GPUs.

    Args:
        gpus: that hold the model together.
        attention: "dp": attention, shared experts and head on every GPU, requests and their cache divided, routed experts spread (expert
            parallelism); "tp": every matrix cut into as many parts as there are GPUs, but for what spec 2.4 replicates.
        weight_bits: per weight.
        cache_bits: per cached number, on average.
        compute_bits: format of the matrix products: 8 or 16.
        utilisation: share of the roofline that is reached.
        overlap: whether compute, memory and communication run at the same time; False: one after the other.
        reserve_bytes: per GPU, for activations and the CUDA context.
        batch: most requests at once; None: as many as the cache holds.
    """

    gpus: int
    attention: Attention
    weight_bits: float
    cache_bits: float
    compute_bits: int
    utilisation: float
    overlap: bool
    reserve_bytes: float
    batch: int | None

    @property
    def label(self) -> str:
        """The layout in a few words."""
        how = {"dp": " GPUs, attention DP, experts EP", "tp": " GPUs, tensor parallel"}[self.attention] if self.gpus > 1 else " GPU"
        return f"{self.gpus}{how}, {self.weight_bits:g}-bit weights, {self.cache_bits:g}-bit cache"


@dataclass(frozen=True, slots=True)
class Roof:
    """Seconds of a step by what it waits for, before utilisation.

    Args:
        compute: matrix units.
        memory: weights and cache read.
        communication: links between GPUs.
        overlap: whether the three hide behind the longest.
    """

    compute: float
    memory: float
    communication: float
    overlap: bool

    @property
    def seconds(self) -> float:
        """The longest of the three, or their sum without overlap."""
        times = (self.compute, self.memory, self.communication)
        return max(times) if self.overlap else sum(times)

    @property
    def limit(self) -> str:
        """Which of them is the longest."""
        return max(("compute", "memory", "communication"), key=lambda name: float(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What serving comes to.

    Args:
        model: what is served.
        layout: how.
        traffic: to whom.
        weight_bytes: of all GPUs together, copies counted.
        memory_bytes: of all GPUs together.
        cache_token_bytes: of one cached token on all GPUs together, copies counted.
        cache_copies: how often each cached number is held.
        capacity_tokens: tokens the cache holds; 0 or less: the weights do not fit.
        batch: requests at once; with data-parallel attention as many on each GPU as its own part of the cache holds.
        decode: roof of one step that generates one token for each request.
        prefill: roof of one step over ``PREFILL_TOKENS`` prompt tokens.
        cost_per_second: dollars for all GPUs.
    """

    model: Served
    layout: ServeLayout
    traffic: Traffic
    weight_bytes: float
    memory_bytes: float
    cache_token_bytes: float
    cache_copies: float
    capacity_tokens: float
    batch: int
    decode: Roof
    prefill: Roof
    cost_per_second: float

    @property
    def fits(self) -> bool:
        """Whether weights and at least one request fit."""
        return self.batch > 0

    @property
    def room(self) -> float:
        """Bytes that the requests on one GPU have with data-parallel attention, else those on all GPUs together."""
        return self.capacity_tokens * self.cache_token_bytes / (self.layout.gpus if self.layout.attention == "dp" else 1)

    @property
    def generated_per_second(self) -> float:
        """Tokens/s of all requests while the node only generates."""
        return self.batch / self.decode.seconds * self.layout.utilisation if self.fits else 0.0

    @property
    def prompt_per_second(self) -> float:
        """Tokens/s while the node only reads prompts."""
        return PREFILL_TOKENS / self.prefill.seconds * self.layout.utilisation if self.fits else 0.0

    @property
    def user_per_second(self) -> float:
        """Tokens/s that one request sees."""
        return self.generated_per_second / self.batch if self.fits else 0.0

    @property
    def mixed_per_second(self) -> float:
        """Generated tokens/s when the same node also reads the prompts: output / (prompt/prompt rate + output/generation rate)."""
        if not self.fits:
            return 0.0
        busy = self.traffic.prompt / self.prompt_per_second + self.traffic.output / self.generated_per_second
        return self.traffic.output / busy

    def dollars_per_million(self, tokens_per_second: float) -> float:
        """Return the price of a million tokens at a rate.

        Args:
            tokens_per_second: of all GPUs together.

        Returns:
            Dollars; infinite at rate 0.
        """
        return self.cost_per_second / tokens_per_second * 1e6 if tokens_per_second else float("inf")


def cache_copies(model: Served, layout: ServeLayout) -> float:
    """Return how often each cached number is held: once with data-parallel attention, gpus / min(gpus, cache heads) with TP (spec 2.4).

    Args:
        model: what is served.
        layout: how.

    Returns:
        1 for a partitioned cache, ``gpus`` for MLA's latent under plain TP.
    """
    return layout.gpus / min(layout.gpus, model.cache_heads) if layout.attention == "tp" else 1.0


def cache_tokens_beside_one_copy(model: Served, layout: ServeLayout, hardware: Hardware) -> tuple[float, float]:
    """Return the memory view of spec 7: bytes left beside one copy of the weights, and the tokens that they hold; nothing reserved.

    Args:
        model: what is served.
        layout: its gpus, bits and attention.
        hardware: memory of one GPU.

    Returns:
        (bytes left, tokens).
    """
    left = layout.gpus * hardware.memory_bytes - model.parameters * layout.weight_bits / 8
    return left, left / (model.cache_elements * layout.cache_bits / 8 * cache_copies(model, layout))


def check_serving(model: Served, layout: ServeLayout) -> None:
    """Refuse what cannot be laid out.

    Args:
        model: what is served.
        layout: how.

    Raises:
        ConfigError: heads or experts do not divide by the GPUs.
    """
    if layout.attention == "tp" and model.heads % layout.gpus:
        raise ConfigError(
            f"{model.name}: {model.heads} heads do not divide by {layout.gpus} GPUs with attention=tp",
            hint="use attention=dp or another number of gpus",
        )
    if layout.attention == "dp" and model.config is not None and model.config.n_routed_experts is not None:
        try:
            check_expert_parallel(model.config, layout.gpus)
        except ConfigError as error:
            raise ConfigError(f"gpus = {layout.gpus}, attention=dp: {error.message}", hint=f"{error.hint} as gpus") from error


def plan_serving(model: Served, layout: ServeLayout, traffic: Traffic, hardware: Hardware) -> ServePlan:
    """Plan the serving of a model.

    Args:
        model: what is served.
        layout: how.
        traffic: to whom.
        hardware: where.

    Returns:
        Capacity, batch, rates and prices; ``fits`` says whether it can run.

    Raises:
        ConfigError: heads or experts do not divide by the GPUs.
    """
    check_serving(model, layout)
    once, copied = model.routed, model.fixed + model.embedding
    if layout.attention == "tp":
        once, copied = once + copied - model.replicated, model.replicated
    weights = (layout.gpus * copied + once) * layout.weight_bits / 8
    memory, copies = layout.gpus * hardware.memory_bytes, cache_copies(model, layout)
    token_bytes = model.cache_elements * layout.cache_bits / 8 * copies
    capacity = (memory - weights - layout.gpus * layout.reserve_bytes) / token_bytes
    pools = layout.gpus if layout.attention == "dp" else 1  # a request lives on one GPU, so what is left over there serves nobody
    held = pools * max(0, int(capacity / pools / traffic.resident))
    batch = held if layout.batch is None else min(held, layout.batch)
    return ServePlan(
        model, layout, traffic, weights, memory, token_bytes, copies, capacity, batch,
        decode_roof(model, layout, traffic, hardware, batch), prefill_roof(model, layout, traffic, hardware),
        layout.gpus * hardware.price_per_hour / 3600,
    )  # fmt: skip


def decode_roof(model: Served, layout: ServeLayout, traffic: Traffic, hardware: Hardware, batch: int) -> Roof:
    """Return the seconds of one generation step.

    Args:
        model: what is served.
        layout: how.
        traffic: its mean context is what attention reads.
        hardware: where.
        batch: requests, each of which gets one token.

    Returns:
        Compute: 2 FLOP per activated parameter, attention in bf16. Memory: weights once, experts as far as the batch touches them, each
        request's cache. Communication: see ``communication_seconds``.
    """
    gpus, keys = layout.gpus, batch * traffic.resident
    products = 2 * batch * _on_one(model, layout, model.activated) / hardware.matrix_flops(layout.compute_bits)
    attention = keys * model.decode_flops_per_key / (gpus * hardware.bf16_flops)
    cache = keys * model.cache_elements * layout.cache_bits / 8 * cache_copies(model, layout) / gpus
    memory = (weights_read(model, layout, batch) + cache) / hardware.memory_bandwidth
    return Roof(products + attention, memory, communication_seconds(model, layout, hardware, batch), layout.overlap)


def _on_one(model: Served, layout: ServeLayout, parameters: int) -> float:
    """Return the parameters whose products one GPU computes, per token of all GPUs; plain TP repeats what it cannot cut."""
    repeated = model.replicated if layout.attention == "tp" else 0
    return repeated + (parameters - repeated) / layout.gpus


def prefill_roof(model: Served, layout: ServeLayout, traffic: Traffic, hardware: Hardware) -> Roof:
    """Return the seconds of one step over ``PREFILL_TOKENS`` prompt tokens.

    Args:
        model: what is served.
        layout: how.
        traffic: its mean prompt is what causal attention covers, half of it on average.
        hardware: where.

    Returns:
        As ``decode_roof``, attention in the expanded reading, no head.
    """
    tokens = PREFILL_TOKENS
    products = 2 * tokens * _on_one(model, layout, model.activated - model.head) / hardware.matrix_flops(layout.compute_bits)
    attention = tokens * model.prefill_flops_per_key * traffic.prompt / 2 / (layout.gpus * hardware.bf16_flops)
    memory = weights_read(model, layout, tokens) / hardware.memory_bandwidth
    return Roof(products + attention, memory, communication_seconds(model, layout, hardware, tokens), layout.overlap)


def weights_read(model: Served, layout: ServeLayout, tokens: float) -> float:
    """Return the bytes of weights that one GPU reads in a step.

    Args:
        model: what is served.
        layout: how.
        tokens: of all GPUs, which decide how many experts are touched: N (1 - (1 - K/N)^tokens).

    Returns:
        With data-parallel attention everything but routed experts in full, else a share of it and what tensor parallelism replicates.
    """
    share = experts_touched(model.config, tokens) / (model.config.n_routed_experts or 1) if model.config is not None else 0.0
    fixed = model.fixed if layout.attention == "dp" else _on_one(model, layout, model.fixed)
    return (fixed + model.routed * share / layout.gpus) * layout.weight_bits / 8


def communication_seconds(model: Served, layout: ServeLayout, hardware: Hardware, tokens: float) -> float:
    """Return the seconds of communication in a step.

    Args:
        model: what is served.
        layout: how.
        hardware: bandwidths.
        tokens: of all GPUs.

    Returns:
        Data-parallel attention: dispatch and combine of each MoE layer to the devices a token's experts are on, its own left out. Tensor
        parallel: two ring all-reduces a layer, each sending 2 (g-1)/g of the rows. All rows are bf16.
    """
    gpus, row = layout.gpus, WIRE_BYTES * model.hidden_size
    if gpus == 1:
        return 0.0
    outside = max(0, gpus - hardware.gpus_per_node) / (gpus - 1)
    if layout.attention == "tp":
        sent = 2 * model.layers * tokens * row * 2 * (gpus - 1) / gpus
        return sent / (hardware.inter_bandwidth if outside else hardware.intra_bandwidth)
    devices = expected_devices(model.config, gpus) if model.config is not None else 0.0
    sent = 2 * model.moe_layers * tokens / gpus * devices * (gpus - 1) / gpus * row
    return max(sent * (1 - outside) / hardware.intra_bandwidth, sent * outside / hardware.inter_bandwidth)
