"""``dsv2 plan train``: from options to a layout, and the values of what it comes to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.accounting import count_parameters
from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware, load_hardware
from dsv2.parallel.layout import Layout
from dsv2.parallel.search import Found, does_not_fit, search, smallest_cluster
from dsv2.parallel.simulate import TrainPlan, simulate
from dsv2.plan.measured import measured_costs, measured_sheet
from dsv2.plan.options import CODERS, TrainOptions, keys_of, read_train
from dsv2.plan.sheet import Answer, gb
from dsv2.plan.train_sheets import assumptions, exchange, explain, how_found, memory, pipeline, ranking, result, step

LAYOUT_KEYS = ("pp", "ep", "dp", "schedule", "chunks", "zero", "recompute", "micro_batch")
PUBLISHED_ON = ("H800", 4096)  # hardware and sequence length of the GPU-hours in recipes/plan-train
# Coder-V2 goes on from 4.2T tokens of V2's or V2-Lite's pre-training with 6T of its own (Coder-V2 paper, section 3; spec 9.1).
CODER_TOKENS = 10.2e12


def plan_train(config: ModelConfig, name: str, overrides: Sequence[str], searching: bool) -> Answer:
    """Answer ``dsv2 plan train``.

    Args:
        config: the model.
        name: what it was called.
        overrides: KEY=VALUE.
        searching: try every layout; what the overrides state stays.

    Returns:
        Tables and values; ``problem`` is set where the layout does not fit.

    Raises:
        ConfigError: a wrong option, or a layout that does not divide.
    """
    options, typed = read_train(config, overrides), keys_of(overrides)
    hardware = load_hardware(options.hardware)
    options = _comparable(_own_tokens(options, name, typed), hardware, typed)
    stated = {key: getattr(options, key) for key in LAYOUT_KEYS if getattr(options, key) is not None}
    held = {key: value for key, value in stated.items() if key in typed} if searching else dict(stated)
    gpus = _gpus(options, stated, held, typed)
    base = _base(options)
    found: Found | None = None
    decided = not searching and {"pp", "ep"} <= held.keys() and ("dp" in held or gpus is not None)
    if decided:
        plan = simulate(config, _complete(base, held, gpus), hardware)
    elif gpus is None:
        plan = smallest_cluster(config, base, hardware, held)
        found = search(config, base, hardware, plan.layout.gpus, held) if searching else None
    else:
        found = search(config, base, hardware, gpus, held)
        if not found.best:
            raise does_not_fit(found.smallest, gpus, hardware)
        plan = found.best[0]
    words = [] if decided else how_found(plan, gpus)
    return _answer(config, name, options, hardware, plan, found if searching else None, words, typed)


def _base(options: TrainOptions) -> Layout:
    """Return a layout in which only what is not searched has its value."""
    return Layout(
        1, 1, 1, "1f1b", 1, 0, "none", 1, options.batch, options.seq_len or 0, options.kernel_efficiency, options.reserve_gb * 1e9
    )


def _gpus(options: TrainOptions, stated: Mapping[str, Any], held: dict[str, Any], typed: set[str]) -> int | None:
    """Return how many GPUs are used, None where that is to be found out; a recipe's dp gives way to ``gpus``."""
    if "gpus" not in typed and {"pp", "ep", "dp"} <= stated.keys():
        return prod(int(stated[axis]) for axis in ("pp", "ep", "dp"))
    if options.gpus is not None and "dp" not in typed:
        held.pop("dp", None)
    names = [axis for axis in ("pp", "ep", "dp") if axis in held]
    axes = [int(held[axis]) for axis in names]
    if options.gpus is None or not axes:
        return options.gpus
    if (options.gpus != prod(axes)) if len(axes) == 3 else options.gpus % prod(axes):
        product = " x ".join(map(str, axes)) + (f" = {prod(axes)}" if len(axes) > 1 else "")
        ours = [f"{key} = {held.get(key, options.gpus)}" for key in (*names, "gpus") if key not in typed]
        recipe = f"{' and '.join(ours)} {'is' if len(ours) == 1 else 'are'} the recipe's: "
        recipe += "state another" if ours == [f"gpus = {options.gpus}"] else "state others, or let --search find a layout"
        raise ConfigError(
            f"gpus = {options.gpus} is not {'' if len(axes) == 3 else 'a multiple of '}{' x '.join(names)} = {product}",
            hint=recipe if ours else "gpus = pp * ep * dp; leave one of them out",
        )
    return options.gpus


def _complete(base: Layout, held: Mapping[str, Any], gpus: int | None) -> Layout:
    """Return the layout that the options state; dp follows from gpus where those are given."""
    values: dict[str, Any] = {
        "schedule": "1f1b",
        "chunks": 2 if held.get("schedule") == "interleaved" else 1,
        "zero": 1,
        "recompute": "selective",
    }
    values |= {"micro_batch": 1, **held}
    if gpus is not None:
        values["dp"] = gpus // (held["pp"] * held["ep"])
    return Layout(**(asdict(base) | values))


def _own_tokens(options: TrainOptions, name: str, typed: set[str]) -> TrainOptions:
    """Replace the tokens of a recipe, which are those of V2 or V2-Lite, where a release of that shape is known to have had more."""
    if options.tokens is None or "tokens" in typed or name not in CODERS:
        return options
    return options.model_copy(update={"tokens": CODER_TOKENS})


def _comparable(options: TrainOptions, hardware: Hardware, typed: set[str]) -> TrainOptions:
    """Drop the GPU-hours that a recipe quotes where they were measured on other hardware or sequences than these."""
    if (hardware.name, options.seq_len) == PUBLISHED_ON:
        return options
    quoted = {key: None for key in ("measured_gpu_hours", "yardstick_gpu_hours") if key not in typed}
    return options.model_copy(update=quoted)


def _answer(
    config: ModelConfig,
    name: str,
    options: TrainOptions,
    hardware: Hardware,
    plan: TrainPlan,
    found: Found | None,
    words: list[str],
    typed: set[str],
) -> Answer:
    tokens = options.tokens or 20.0 * count_parameters(config).activated
    title = f"Training {name} on {plan.layout.gpus:,} x {hardware.name}: {plan.layout.label}"
    sheets, problem = [memory(plan, title)], None
    values: dict[str, Any] = {
        "model": name,
        "hardware": hardware.model_dump(),
        "layout": asdict(plan.layout) | {"gpus": plan.layout.gpus, "microbatches": plan.layout.microbatches},
        "layers_per_stage": [stage.layers for stage in plan.stages],
        "memory_per_rank_bytes": [asdict(memory) | {"total": memory.total} for memory in plan.memory],
        "fits": plan.fits,
    }
    if plan.fits:
        values |= _result_values(plan, hardware, tokens)
        sheets += [pipeline(config, plan), *exchange(plan, hardware), step(plan), result(plan, hardware, values)]
    else:
        problem = ConfigError(
            f"does not fit: rank {plan.worst_rank} of the pipeline needs {gb(plan.needed)} GB, a GPU has {gb(plan.capacity)} GB",
            hint="run the same command with --search, or use more gpus, zero=3 or recompute=full",
        )
    if options.measured_gpu_hours is not None:
        costs = measured_costs(config, name if "measured_gpu_hours" in typed else "V2 (published)", options, hardware)
        sheets.append(measured_sheet(costs, hardware))
        values["measured"] = costs.to_json()
    if found is not None:
        sheets.append(ranking(found))
        words = words + explain(found)
        values["search"] = {
            "tried": found.tried,
            "best": [asdict(other.layout) | {"gpu_hours_per_trillion": other.gpu_hours_per_trillion} for other in found.best[:5]],
            "explanation": words,
        }
    said = assumptions(config, name, options, hardware, typed)
    return Answer(sheets, words, said, values, partial(_draw, config, name, hardware, plan), problem)


def _result_values(plan: TrainPlan, hardware: Hardware, tokens: float) -> dict[str, Any]:
    hours, exchanged = plan.gpu_hours_per_trillion, plan.all_to_all
    return {
        "all_to_all": None if exchanged is None else asdict(exchanged),
        "bubble_share": plan.bubbles,
        "phases_seconds": dict(zip(("forward", "backward", "weight"), plan.phases, strict=True)),
        "step_seconds": plan.step_seconds,
        "step_parts_seconds": plan.cost,
        "sync_links_seconds": plan.sync_links_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu_6n": plan.mfu[0],
        "mfu_with_attention": plan.mfu[1],
        "gpu_hours_per_trillion": hours,
        "tokens": tokens,
        "gpu_hours": hours * tokens / 1e12,
        "days": tokens / plan.tokens_per_second / 86400,
        "dollars": hours * tokens / 1e12 * hardware.price_per_hour,
    }


def _draw(config: ModelConfig, name: str, hardware: Hardware, plan: TrainPlan) -> bytes:
    from dsv2.plan.figures import scaling

    layout = plan.layout
    fixed = {"schedule": layout.schedule, "chunks": layout.chunks, "micro_batch": layout.micro_batch} if layout.pp > 1 else {}
    tried: Callable[[int], Found] = lambda gpus: search(config, layout, hardware, gpus, fixed)  # noqa: E731
    first = min(3, layout.gpus.bit_length() - 1)  # 8 GPUs, or as few as were asked for
    last = max(first + 11, (layout.gpus - 1).bit_length())
    return scaling(name, hardware, plan, [(2**power, tried(2**power)) for power in range(first, last + 1)])
