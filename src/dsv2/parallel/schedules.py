"""Pipeline schedules in closed form: idle time, microbatches held, and how layers are cut into stages.

F, B and W are the seconds of one microbatch on one stage: forward, gradient of the input, gradient of the weights (B + W is the usual
backward). Sources: 1F1B and interleaving, Narayanan et al. 2021 (arXiv 2104.04473, section 2.2); ZB-H1 and ZB-H2, Qi et al. 2024
(arXiv 2401.10241, table 2), where ZB-H2 and its searched form ZB-2p pay with twice the activations. ZB-H2 counts each rank from its own
first to its own last operation, so it needs an optimiser step that does not wait for all ranks. Works without torch.
"""

from typing import Literal

from dsv2.errors import ConfigError

Schedule = Literal["1f1b", "interleaved", "zb-h1", "zb-h2"]
SCHEDULES: dict[Schedule, str] = {
    "1f1b": "(p-1)(F+B+W)",
    "interleaved": "(p-1)(F+B+W)/v",
    "zb-h1": "(p-1)(F+B) - (min(p,m)-1)W",
    "zb-h2": "(p-1)(F+B) - (min(2p-1,m)-1)W",
}


def bubble_seconds(
    schedule: Schedule, stages: int, microbatches: int, forward: float, backward: float, weight: float, chunks: int = 1
) -> float:
    """Return the seconds per step in which a stage waits for others.

    Args:
        schedule: which one.
        stages: p.
        microbatches: m. With few of them there is not enough delayed W to fill the gaps, which the published formulas leave out: ZB-H1
            then fills min(p, m) - 1 of them, ZB-H2 min(2p - 1, m) - 1 (ours; exact for both schedules as simulated in the tests).
        forward: F, seconds of a microbatch on one stage.
        backward: B.
        weight: W.
        chunks: v, model chunks per rank of the interleaved schedule.

    Returns:
        The formula of ``SCHEDULES``.
    """
    if schedule in ("zb-h1", "zb-h2"):
        filled = min(microbatches, stages if schedule == "zb-h1" else 2 * stages - 1) - 1
        return max(0.0, (stages - 1) * (forward + backward) - filled * weight)
    return (stages - 1) * (forward + backward + weight) / (chunks if schedule == "interleaved" else 1)


def bubble_fraction(bubble: float, microbatches: int, one: float) -> float:
    """Return the idle share of a step: bubble / (bubble + m (F+B+W)); (p-1)/(m+p-1) for 1F1B.

    Args:
        bubble: idle seconds.
        microbatches: m.
        one: F + B + W.

    Returns:
        Between 0 and 1.
    """
    return bubble / (bubble + microbatches * one)


def microbatches_held(schedule: Schedule, stages: int, stage: int, microbatches: int, chunks: int = 1) -> float:
    """Return how many microbatches' activations a rank holds at its worst moment, in units of all its layers.

    Args:
        schedule: which one.
        stages: p.
        stage: rank along the pipeline, from 0.
        microbatches: m, an upper bound.
        chunks: v of the interleaved schedule.

    Returns:
        p - rank for 1F1B; (2(p-rank-1) + (v-1)p + 1)/v interleaved; p for ZB-H1 and 2p-1 for ZB-H2 on every rank (arXiv 2401.10241,
        table 2: the first rank's; the others hold what their delayed W need).
    """
    if stages == 1:
        return 1.0
    held = {
        "1f1b": float(stages - stage),
        "interleaved": (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks,
        "zb-h1": float(stages),
        "zb-h2": float(2 * stages - 1),
    }[schedule]
    return min(held, float(microbatches))


def split_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Cut layers into stages as even as possible; where some get one less, the first and last are among them (spec 10.20).

    Args:
        layers: layers of the model.
        stages: stages, chunks counted apart.

    Returns:
        Layers of each stage: 60 over 16 gives 3 on stages 0, 5, 10, 15 and 4 on the others.

    Raises:
        ConfigError: there are more stages than layers.
    """
    if stages > layers:
        raise ConfigError(f"{layers} layers do not fill {stages} pipeline stages", hint=f"pp times chunks can be {layers} at most")
    low, extra = divmod(layers, stages)
    short = stages - extra if extra else 0
    if short == 1:
        places = {stages - 1}
    else:
        places = {round(i * (stages - 1) / (short - 1)) for i in range(short)}
    return tuple(low if stage in places or not extra else low + 1 for stage in range(stages))
