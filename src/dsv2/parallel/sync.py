"""What copies of a weight exchange in a step, and how much of it computation hides. Works without torch.

One rule for all: an exchange goes layer by layer, the gradients of a layer while the backward of the next is computed, the weights of a
layer while the forward (or backward) of the one before it is. So one layer's exchange is never hidden, and of the others what takes
longer than the layer they hide behind is not. What is exchanged for every microbatch runs on from one to the next.
"""

from typing import NamedTuple

from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.layout import Layout, Stage, stage_parameters
from dsv2.parallel.memory import GRADIENT, WEIGHT


class Exchange(NamedTuple):
    """One kind of exchange: bytes per parameter, whether behind the backward (else the forward), and for every microbatch (else once)."""

    num_bytes: int
    backward: bool
    every: bool


# By ZeRO level. 0: all-reduce of the gradients. 1: their reduce-scatter; the new weights are gathered behind the next step's first forward.
# 2: the reduce-scatter for every microbatch. 3: the weights gathered for every forward and every backward as well.
EXCHANGES: tuple[tuple[Exchange, ...], ...] = (
    (Exchange(2 * GRADIENT, True, False),),
    (Exchange(GRADIENT, True, False), Exchange(WEIGHT, False, False)),
    (Exchange(GRADIENT, True, True), Exchange(WEIGHT, False, False)),
    (Exchange(GRADIENT + WEIGHT, True, True), Exchange(WEIGHT, False, True)),
)


def exposed_seconds(exchange: float, behind: float, layers: int, times: int) -> float:
    """Return what computation does not hide of an exchange that goes layer by layer.

    Args:
        exchange: seconds on the links, all layers, each time.
        behind: seconds of the computation that runs meanwhile, all layers, each time.
        layers: of the stage.
        times: how often in a step, one after the other.

    Returns:
        One layer's exchange, and of the other times * layers - 1 what exceeds a layer's computation.
    """
    return (exchange + (times * layers - 1) * max(0.0, exchange - behind)) / layers


def sync_seconds(
    config: ModelConfig, layout: Layout, hardware: Hardware, stage: Stage, forward: float, backward: float
) -> tuple[float, float]:
    """Return the seconds in which copies exchange gradients and weights in one step.

    Args:
        config: the model.
        layout: its zero, ep, dp and microbatches.
        hardware: bandwidths; a group that fits into a node uses the fast links.
        stage: what the rank holds.
        forward: F, seconds of a microbatch.
        backward: B + W.

    Returns:
        (on the links, of it not hidden).
    """
    copied, experts = stage_parameters(config, stage)
    wide, narrow = layout.ep * layout.dp, layout.dp
    bandwidth = hardware.intra_bandwidth if wide <= hardware.gpus_per_node else hardware.inter_bandwidth
    moved = (copied * (wide - 1) / wide + experts / layout.ep * (narrow - 1) / narrow) / bandwidth
    sent = exposed = 0.0
    for kind in EXCHANGES[layout.zero]:
        times, seconds = layout.microbatches if kind.every else 1, kind.num_bytes * moved
        sent += times * seconds
        exposed += exposed_seconds(seconds, backward if kind.backward else forward, stage.layers, times)
    return sent, exposed
