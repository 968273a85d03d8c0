"""Layouts searched: every way to train on so many GPUs, those that fit ranked by GPU-hours. Works without torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.layout import Layout, check_chunks
from dsv2.parallel.routing import check_expert_parallel
from dsv2.parallel.schedules import Schedule, split_layers
from dsv2.parallel.simulate import TrainPlan, simulate

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
        The layouts that fit, ranked by GPU-hours per 1e12 tokens; of two that cost the same the lower ZeRO level.

    Raises:
        ConfigError: see ``check_fixed``.
    """
    check_fixed(config, fixed)
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
    """Return the best layout of the smallest cluster on which the model trains: a power of two of GPUs, times the axes that are fixed.

    Args:
        config: the model.
        base: batch, sequence length, efficiency and reserve.
        hardware: where.
        fixed: fields of ``Layout`` that keep their value.

    Returns:
        Its plan.

    Raises:
        ConfigError: it does not fit up to ``NOT_PLANNED`` GPUs, or see ``check_fixed``.
    """
    first = prod(int(fixed.get(axis, 1)) for axis in ("pp", "ep", "dp"))
    gpus, nearest = first, None
    while gpus <= max(first, NOT_PLANNED):
        found = search(config, base, hardware, gpus, fixed)
        if found.best:
            return found.best[0]
        nearest, gpus = found.smallest or nearest, 2 * gpus
    raise does_not_fit(nearest, gpus // 2, hardware)


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


def check_fixed(config: ModelConfig, fixed: Mapping[str, Any]) -> None:
    """Refuse fixed parts that no layout can have, whatever the number of GPUs.

    Args:
        config: the model.
        fixed: fields of ``Layout`` that keep their value.

    Raises:
        ConfigError: experts or layers do not divide, or schedule and chunks contradict each other.
    """
    schedule, chunks = fixed.get("schedule"), fixed.get("chunks")
    check_expert_parallel(config, fixed.get("ep", 1))
    if schedule is not None and chunks is not None:
        check_chunks(schedule, chunks)
    split_layers(config.num_hidden_layers, fixed.get("pp", 1) * (chunks or (2 if schedule == "interleaved" else 1)))


def _divisors(number: int, largest: int) -> list[int]:
    """Divisors up to ``largest``, rising; takes the square root of the number in steps."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({divisor for n in small for divisor in (n, number // n) if divisor <= largest})


def _schedules(pp: int, fixed: Mapping[str, Any]) -> list[tuple[Schedule, int]]:
    """Pairs (schedule, chunks) to be tried; more than one chunk is the interleaved schedule, and no other has them."""
    names: tuple[Schedule, ...] = FREE["schedule"] if pp > 1 or fixed.get("chunks", 1) > 1 else ("1f1b",)
    found = []
    for name in (fixed["schedule"],) if "schedule" in fixed else names:
        for chunks in (fixed["chunks"],) if "chunks" in fixed else FREE["chunks"] if name == "interleaved" else (1,):
            if (name == "interleaved") == (chunks > 1):
                found.append((name, chunks))
    return found


def _candidates(config: ModelConfig, base: Layout, gpus: int, fixed: Mapping[str, Any]) -> Iterator[list[Layout]]:
    """Yield groups of layouts that differ in recompute only, cheapest first."""

    def options(name: str) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else FREE[name]

    for pp in _divisors(gpus, config.num_hidden_layers):
        if pp != fixed.get("pp", pp):
            continue
        for ep in _divisors(gpus // pp, config.n_routed_experts or 1):
            dp = gpus // pp // ep
            if ep != fixed.get("ep", ep) or dp != fixed.get("dp", dp):
                continue
            zeros = options("zero") if ep * dp > 1 or "zero" in fixed else (0,)
            for schedule, chunks in _schedules(pp, fixed):
                for micro_batch in options("micro_batch"):
                    if base.batch % (ep * dp * micro_batch):
                        continue
                    for zero in zeros:  # rising: of two that cost the same the first is kept
                        layout = replace(base, pp=pp, ep=ep, dp=dp, schedule=schedule, chunks=chunks, zero=zero, micro_batch=micro_batch)
                        yield [replace(layout, recompute=recompute) for recompute in options("recompute")]
