"""Layouts searched: every way to train on so many GPUs, those that fit ranked by GPU-hours, and the best explained. Works without torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.layout import Layout
from dsv2.parallel.simulate import COST, TrainPlan, simulate

FREE: dict[str, tuple[Any, ...]] = {
    "schedule": ("1f1b", "interleaved", "zb-h1", "zb-h2"),
    "chunks": (2,),  # of the interleaved schedule
    "micro_batch": (1, 2, 4),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),  # in the order of their cost: the first that fits is the best
}
NOT_PLANNED = 16_384  # GPUs, the largest number tried


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gives.

    Args:
        best: the layouts that fit, one for each (pp, ep, schedule), cheapest first.
        tried: layouts computed.
        smallest: of those that do not fit, the one that needs the least memory per GPU; None where all fit or none divides.
        out_of_reach: of those that do not fit, the cheapest.
    """

    best: tuple[TrainPlan, ...]
    tried: int
    smallest: TrainPlan | None
    out_of_reach: TrainPlan | None


def search(config: ModelConfig, base: Layout, hardware: Hardware, gpus: int, fixed: Mapping[str, Any]) -> Found:
    """Try every layout of so many GPUs.

    Args:
        config: the model.
        base: batch, sequence length, efficiency and reserve; the rest is replaced.
        hardware: where.
        gpus: pp * ep * dp.
        fixed: fields of ``Layout`` that keep their value.

    Returns:
        The layouts that fit, ranked by GPU-hours per 1e12 tokens.
    """
    fitting: dict[tuple[int, int, str], TrainPlan] = {}
    smallest: TrainPlan | None = None
    cheapest: TrainPlan | None = None
    tried = 0
    for group in _candidates(config, base, gpus, fixed):
        for layout in group:
            try:
                layout.check(config)
            except ConfigError:
                break  # only recompute differs within a group
            plan = simulate(config, layout, hardware)
            tried += 1
            if plan.fits:
                key = (layout.pp, layout.ep, layout.schedule)
                if key not in fitting or plan.gpu_hours_per_trillion < fitting[key].gpu_hours_per_trillion * (1 - 1e-9):
                    fitting[key] = plan
                break
            if smallest is None or plan.needed < smallest.needed:
                smallest = plan
            if cheapest is None or plan.gpu_hours_per_trillion < cheapest.gpu_hours_per_trillion:
                cheapest = plan
    ranked = sorted(fitting.values(), key=lambda plan: plan.gpu_hours_per_trillion)
    return Found(tuple(ranked), tried, smallest, cheapest)


def smallest_cluster(config: ModelConfig, base: Layout, hardware: Hardware, fixed: Mapping[str, Any]) -> TrainPlan:
    """Return the best layout of the smallest power of two of GPUs on which the model trains.

    Args:
        config: the model.
        base: batch, sequence length, efficiency and reserve.
        hardware: where.
        fixed: fields of ``Layout`` that keep their value.

    Returns:
        Its plan.

    Raises:
        ConfigError: it does not fit up to ``NOT_PLANNED`` GPUs.
    """
    gpus, nearest = 1, None
    while gpus <= NOT_PLANNED:
        found = search(config, base, hardware, gpus, fixed)
        if found.best:
            return found.best[0]
        nearest, gpus = found.smallest or nearest, 2 * gpus
    raise does_not_fit(nearest, NOT_PLANNED, hardware)


def does_not_fit(plan: TrainPlan | None, gpus: int, hardware: Hardware) -> ConfigError:
    """Return the error for a search without result.

    Args:
        plan: the nearest miss; None where no layout divides.
        gpus: how many were to be used.
        hardware: where.

    Returns:
        What is needed and what there is.
    """
    if plan is None:
        return ConfigError(
            f"no layout of {gpus} GPUs divides layers, experts and batch", hint="use another number of gpus, or a batch with more factors"
        )
    return ConfigError(
        f"does not fit on {gpus} x {hardware.name}: the smallest layout ({plan.layout.label}) needs {plan.needed / 1e9:.1f} GB"
        f" on one GPU, which has {plan.capacity / 1e9:.1f} GB",
        hint="use more gpus or other hardware",
    )


def explain(found: Found) -> list[str]:
    """Say in words why the best layout is ahead of the next two, and what memory rules out.

    Args:
        found: with at least one layout that fits.

    Returns:
        Sentences.
    """
    best = found.best[0]
    said = [f"Best: {best.layout.label}: {best.gpu_hours_per_trillion / 1e3:.1f}K GPU-hours per 1T tokens, {_room(best)}."]
    for other in found.best[1:3]:
        loss = other.gpu_hours_per_trillion / best.gpu_hours_per_trillion - 1
        changes = sorted(((_share(other, part, best) - _share(best, part, best), part) for part in COST), key=lambda pair: -abs(pair[0]))
        words = [f"{'more' if change > 0 else 'less'} {part} ({change:+.1%} of a step)" for change, part in changes if abs(change) > 5e-4]
        said.append(f"{other.layout.label} costs {loss:.1%} more: {', '.join(words[:4]) or 'the same parts'}; {_room(other)}.")
    missed = found.out_of_reach
    if missed is not None and missed.gpu_hours_per_trillion < best.gpu_hours_per_trillion:
        hours = f"{missed.gpu_hours_per_trillion / 1e3:.1f}K"
        said.append(f"Memory rules out {missed.layout.label}, which would cost {hours}: it needs {_room(missed)}.")
    return said


def _share(plan: TrainPlan, part: str, best: TrainPlan) -> float:
    """One part of a step, in steps of the best plan at the same number of GPUs."""
    return plan.cost[part] / best.step_seconds


def _room(plan: TrainPlan) -> str:
    return f"{plan.needed / 1e9:.1f} of {plan.capacity / 1e9:.1f} GB per GPU"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _candidates(config: ModelConfig, base: Layout, gpus: int, fixed: Mapping[str, Any]) -> Iterator[list[Layout]]:
    """Yield groups of layouts that differ in recompute only, cheapest first."""

    def options(name: str) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else FREE[name]

    for pp in _divisors(gpus):
        if pp > config.num_hidden_layers or pp != fixed.get("pp", pp):
            continue
        for ep in _divisors(gpus // pp):
            dp = gpus // pp // ep
            if ep != fixed.get("ep", ep) or dp != fixed.get("dp", dp) or ep > (config.n_routed_experts or 1):
                continue
            schedules = options("schedule") if pp > 1 or "schedule" in fixed else ("1f1b",)
            for schedule in schedules:
                chunk_options = options("chunks") if schedule == "interleaved" else (1,)
                zeros = options("zero") if ep * dp > 1 or "zero" in fixed else (0,)
                for chunks in chunk_options:
                    for micro_batch in options("micro_batch"):
                        if base.batch % (ep * dp * micro_batch):
                            continue
                        for zero in zeros:
                            layout = replace(
                                base, pp=pp, ep=ep, dp=dp, schedule=schedule, chunks=chunks, zero=zero, micro_batch=micro_batch
                            )
                            yield [replace(layout, recompute=recompute) for recompute in options("recompute")]
