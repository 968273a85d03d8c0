"""``dsv2 plan train``: from options to a layout, and the tables that say what it comes to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.accounting import count_parameters
from dsv2.model.config import ModelConfig
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.parallel.hardware import Hardware, load_hardware
from dsv2.parallel.layout import Layout
from dsv2.parallel.schedules import SCHEDULES, microbatches_held
from dsv2.parallel.search import Found, does_not_fit, explain, search, smallest_cluster
from dsv2.parallel.simulate import COST, TrainPlan, flops_per_token, mfu_from_gpu_hours, simulate
from dsv2.plan.options import TrainOptions, keys_of, read_train
from dsv2.plan.sheet import Answer, Sheet, clock, count, gb, percent

LAYOUT_KEYS = ("pp", "ep", "dp", "schedule", "chunks", "zero", "recompute", "micro_batch")
PUBLISHED_ON = ("H800", 4096)  # hardware and sequence length of the GPU-hours in recipes/plan-train
NOMINAL_67B = 67.0e9  # what the name says; the shape has 67.425e9


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
    options = read_train(config, overrides)
    hardware = load_hardware(options.hardware)
    stated = {key: getattr(options, key) for key in LAYOUT_KEYS if getattr(options, key) is not None}
    typed = keys_of(overrides)
    held = {key: value for key, value in stated.items() if key in typed} if searching else dict(stated)
    gpus = _gpus(options, stated, held, typed)
    base = _base(config, options)
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
    words = [] if decided else _how_found(plan, gpus)
    return _answer(config, name, options, hardware, plan, found if searching else None, words, typed)


def _base(config: ModelConfig, options: TrainOptions) -> Layout:
    """Return a layout in which only what is not searched has its value."""
    seq_len = options.seq_len or min(4096, config.max_position_embeddings)
    return Layout(1, 1, 1, "1f1b", 1, 0, "none", 1, options.batch, seq_len, options.kernel_efficiency, options.reserve_gb * 1e9)


def _gpus(options: TrainOptions, stated: Mapping[str, Any], held: dict[str, Any], typed: set[str]) -> int | None:
    """Return how many GPUs are used, None where that is to be found out; a recipe's dp gives way to ``gpus``."""
    if "gpus" not in typed and {"pp", "ep", "dp"} <= stated.keys():
        return prod(int(stated[axis]) for axis in ("pp", "ep", "dp"))
    if options.gpus is not None and "dp" not in typed:
        held.pop("dp", None)
    axes = [int(held[axis]) for axis in ("pp", "ep", "dp") if axis in held]
    if options.gpus is None or not axes:
        return options.gpus
    if (options.gpus != prod(axes)) if len(axes) == 3 else options.gpus % prod(axes):
        product = " x ".join(map(str, axes)) + (f" = {prod(axes)}" if len(axes) > 1 else "")
        raise ConfigError(
            f"gpus = {options.gpus} is not {'' if len(axes) == 3 else 'a multiple of '}{product}",
            hint="gpus = pp * ep * dp; leave one of them out",
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


def _comparable(options: TrainOptions, hardware: Hardware, seq_len: int, typed: set[str]) -> TrainOptions:
    """Drop the GPU-hours that a recipe quotes where they were measured on other hardware or sequences than these."""
    if (hardware.name, seq_len) == PUBLISHED_ON:
        return options
    quoted = {key: None for key in ("measured_gpu_hours", "yardstick_gpu_hours") if key not in typed}
    return options.model_copy(update=quoted)


def _how_found(plan: TrainPlan, gpus: int | None) -> list[str]:
    if gpus is not None:
        return [f"The layout is the cheapest found on {gpus:,} GPUs; KEY=VALUE holds a part of it."]
    return [f"{plan.layout.gpus:,} GPUs are the smallest power of two on which it trains, with the cheapest layout; gpus=N asks for more."]


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
    sheets, problem = [_memory(plan, title)], None
    values: dict[str, Any] = {
        "model": name,
        "hardware": hardware.model_dump(),
        "layout": asdict(plan.layout) | {"gpus": plan.layout.gpus, "microbatches": plan.layout.microbatches},
        "layers_per_stage": [stage.layers for stage in plan.stages],
        "memory_per_rank_bytes": [asdict(memory) | {"total": memory.total} for memory in plan.memory],
        "fits": plan.fits,
    }
    if plan.fits:
        sheets += [_pipeline(plan), *_exchange(plan, hardware), _step(plan), _result(plan, hardware, tokens)]
        values |= _result_values(plan, hardware, tokens)
    else:
        problem = ConfigError(
            f"does not fit: rank {plan.worst_rank} of the pipeline needs {gb(plan.needed)} GB, a GPU has {gb(plan.capacity)} GB",
            hint="run the same command with --search, or use more gpus, zero=3 or recompute=full",
        )
    options = _comparable(options, hardware, plan.layout.seq_len, typed)
    if options.measured_gpu_hours is not None:
        sheet, measured = _measured(config, name, options, hardware, plan.layout.seq_len)
        sheets.append(sheet)
        values["measured"] = measured
    if found is not None:
        sheets.append(_ranking(found))
        words += explain(found)
        values["search"] = {
            "tried": found.tried,
            "best": [asdict(other.layout) | {"gpu_hours_per_trillion": other.gpu_hours_per_trillion} for other in found.best[:5]],
            "explanation": words,
        }
    return Answer(sheets, words, _assumptions(config, options, hardware), values, partial(_draw, config, name, hardware, plan), problem)


# Tables -----------------------------------------------------------------------------------------------------------------------------


def _memory(plan: TrainPlan, title: str) -> Sheet:
    first, worst, last = 0, plan.worst_rank, len(plan.memory) - 1
    ranks = list(dict.fromkeys((first, worst, last)))
    layout = plan.layout
    copies = f"{layout.ep * layout.dp}, an expert's over {layout.dp}"
    split = {level: f"; split over {copies}" if layout.zero >= level and layout.ep * layout.dp > 1 else "" for level in (1, 2, 3)}
    held = [microbatches_held(layout.schedule, layout.pp, rank, layout.microbatches, layout.chunks) for rank in ranks]
    how = {
        "weights": f"2 B each, experts over ep{split[3]}",
        "gradients": f"4 B each, fp32{split[2]}",
        "optimizer": f"12 B each: fp32 weights, 2 moments{split[1]}",
        "activations": f"{', '.join(f'{number:g}' for number in held)} microbatches in flight",
        "working": "one layer's backward" + ("; gathered weights" if layout.zero == 3 else ""),
        "logits": "fp32, one microbatch",
        "all_to_all": "4 buffers of the rows sent",
        "reserve": "context, NCCL, fragmentation",
    }
    rows = [
        (kind.replace("_", "-"), *(gb(float(getattr(plan.memory[rank], kind))) for rank in ranks), words) for kind, words in how.items()
    ]
    rows.append(("total", *(gb(plan.memory[rank].total) for rank in ranks), f"a GPU has {gb(plan.capacity)}"))
    names = [f"rank {rank}, {plan.stages[rank].layers} l" for rank in ranks]
    return Sheet(f"{title}\nMemory per GPU, GB = 1e9 bytes, by pipeline rank", ("kind", *names, "how"), rows)


def _pipeline(plan: TrainPlan) -> Sheet:
    layout, (forward, backward, weight) = plan.layout, plan.phases
    title = f"Pipeline: p = {layout.pp}, m = {layout.microbatches} microbatches of {layout.tokens:,} tokens"
    if layout.pp == 1:
        return Sheet(f"{title}; one stage has no bubble", ("phase", "time", "how"), _phases(plan))
    rows = []
    for schedule, formula in SCHEDULES.items():
        chunks = max(2, layout.chunks) if schedule == "interleaved" else 1
        held = microbatches_held(schedule, layout.pp, 0, layout.microbatches, chunks)
        chosen = "-> " if schedule == layout.schedule else "   "
        note = {"interleaved": f", v = {chunks}", "zb-h2": "; so ZB-2p"}.get(schedule, "")
        note += " (needs p | m)" if schedule == "interleaved" and layout.microbatches % layout.pp else ""
        rows.append((chosen + schedule, percent(plan.bubbles[schedule]), f"{held:g}", f"{formula}{note}"))
    layers = " ".join(str(stage.layers) for stage in plan.stages)
    return Sheet(
        f"{title}\nlayers per rank: {layers}; slowest rank {plan.slowest}: F {clock(forward)}, B {clock(backward)}, W {clock(weight)}"
        "\nidle = bubble/(bubble + m(F+B+W)); Narayanan et al. 2021, Qi et al. 2024 table 2",
        ("schedule", "idle", "held by rank 0", "how"),
        rows,
    )


def _phases(plan: TrainPlan) -> list[tuple[str, str, str]]:
    names = ("forward", "backward of inputs", "backward of weights")
    return [(name, clock(seconds), "of one microbatch") for name, seconds in zip(names, plan.phases, strict=True)]


def _exchange(plan: TrainPlan, hardware: Hardware) -> list[Sheet]:
    a, layout = plan.all_to_all, plan.layout
    if a is None or layout.ep == 1:
        return []
    volume = f"4 x {a.remote:.3f} x devices x 2 d bytes: dispatch, combine, both back"
    rows = [
        ("devices of a token", f"{a.devices:.3f}", f"{a.unlimited:.3f}", f"uniform routing, exact; at most M = {a.bound}, section 2.2.2"),
        ("bytes per token, layer", count(a.token_bytes), count(a.unlimited_bytes), volume),
        ("leaves the node", percent(a.inter_share), percent(a.inter_share), f"ep = {layout.ep}, {hardware.gpus_per_node} GPUs a node"),
        ("dispatch + combine", clock(2 * a.seconds), clock(2 * a.seconds * a.unlimited / a.devices), "one microbatch, one layer, forward"),
        ("shared experts", clock(a.shared_seconds), clock(a.shared_seconds), "run meanwhile and hide it, section 3.1.3"),
    ]
    return [
        Sheet(
            "Expert all-to-all: sent once to a device, however many of its experts a token uses",
            ("what", "limited", "unlimited", "how"),
            rows,
        )
    ]


def _step(plan: TrainPlan) -> Sheet:
    how = {
        "compute": "m x mean stage: 6 N and attention / (peak x kernel efficiency)",
        "recompute": f"{plan.layout.recompute}",
        "all-to-all": "what the shared experts do not hide",
        "imbalance": f"m x (slowest stage - mean): rank {plan.slowest}{' has the head' if plan.stages[plan.slowest].head else ''}",
        "bubble": SCHEDULES[plan.layout.schedule],
        "sync": f"ZeRO-{plan.layout.zero} among copies, not hidden",
    }
    step = plan.step_seconds
    rows = [(part, clock(plan.cost[part]), percent(plan.cost[part] / step), how[part]) for part in COST]
    rows.append(("step", clock(step), "100.0 %", f"{plan.tokens_per_step / 1e6:.2f}M tokens = {plan.layout.batch} x {plan.layout.seq_len}"))
    return Sheet("One step", ("part", "time", "share", "how"), rows)


def _result_values(plan: TrainPlan, hardware: Hardware, tokens: float) -> dict[str, Any]:
    hours = plan.gpu_hours_per_trillion
    exchange = plan.all_to_all
    return {
        "all_to_all": None if exchange is None else asdict(exchange),
        "bubble_share": plan.bubbles,
        "phases_seconds": dict(zip(("forward", "backward", "weight"), plan.phases, strict=True)),
        "step_seconds": plan.step_seconds,
        "step_parts_seconds": plan.cost,
        "tokens_per_second": plan.tokens_per_second,
        "mfu_6n": plan.mfu[0],
        "mfu_with_attention": plan.mfu[1],
        "gpu_hours_per_trillion": hours,
        "tokens": tokens,
        "gpu_hours": hours * tokens / 1e12,
        "days": tokens / plan.tokens_per_second / 86400,
        "dollars": hours * tokens / 1e12 * hardware.price_per_hour,
    }


def _result(plan: TrainPlan, hardware: Hardware, tokens: float) -> Sheet:
    v, six, whole = _result_values(plan, hardware, tokens), *plan.flops_per_token
    peak = f"{plan.peak / 1e12:,.4g} TFLOPS"
    rows = [
        (
            "tokens/s",
            f"{v['tokens_per_second']:,.0f}",
            f"step tokens / step time; {v['tokens_per_second'] / plan.layout.gpus:,.0f} per GPU",
        ),
        ("MFU, 6 N", percent(v["mfu_6n"]), f"{six / 1e9:.4g} GFLOP/token x tokens/s/GPU / {peak}"),
        ("MFU, with attention", percent(v["mfu_with_attention"]), f"{whole / 1e9:.4g} GFLOP/token: + 3 l n_h (d_h+d_h^R+d_v) s"),
        ("GPU-hours per 1T tokens", count(v["gpu_hours_per_trillion"]), "1e12 / tokens/s x GPUs / 3600"),
        (f"GPU-hours for {count(tokens)}", count(v["gpu_hours"]), f"{v['days']:,.1f} days on {plan.layout.gpus:,} x {hardware.name}"),
        ("dollars", count(v["dollars"]), f"at {hardware.price_per_hour:g} $ per GPU-hour"),
    ]
    return Sheet("Result", ("what", "value", "how"), rows)


def _measured(config: ModelConfig, name: str, options: TrainOptions, hardware: Hardware, seq_len: int) -> tuple[Sheet, dict[str, Any]]:
    """Turn measured GPU-hours into MFU; beside it DeepSeek 67B, and what is saved."""
    peak, hours = hardware.bf16_flops, options.measured_gpu_hours or 0.0
    flops = flops_per_token(config, seq_len)
    rows = [_measured_row(name, hours, flops, peak, f"{flops[0] / 1e9:.1f} / {flops[1] / 1e9:.1f} GFLOP/token")]
    values: dict[str, Any] = {"gpu_hours_per_trillion": hours, "mfu_6n": mfu_from_gpu_hours(flops[0], hours, peak)}
    values["mfu_with_attention"] = mfu_from_gpu_hours(flops[1], hours, peak)
    title = f"Measured cost as MFU: FLOP/token x 1e12 / (GPU-hours x 3600 x {peak / 1e12:,.4g} TFLOPS)"
    if options.yardstick_gpu_hours is not None:
        other = options.yardstick_gpu_hours
        dense = 6.0 * DEEPSEEK_67B.parameters, DEEPSEEK_67B.training_flops_per_token(seq_len)
        nominal = 6 * NOMINAL_67B, 6 * NOMINAL_67B + dense[1] - dense[0]
        saving = 1 - hours / other
        rows += [
            _measured_row("DeepSeek 67B", other, dense, peak, "67.425e9 parameters, counted from its shape"),
            _measured_row("  at its nominal size", other, nominal, peak, "67.0e9 parameters"),
            ("saving", f"{100 * saving:.3f} %", "", "", f"1 - {count(hours)} / {count(other)} (section 3.2.3)"),
        ]
        values |= {"yardstick_gpu_hours_per_trillion": other, "saving": saving}
        values |= {"yardstick_mfu_6n": mfu_from_gpu_hours(dense[0], other, peak)}
        values |= {"yardstick_mfu_with_attention": mfu_from_gpu_hours(dense[1], other, peak)}
    return Sheet(title, ("model", "GPU-hours/1T", "6 N", "with attention", "how"), rows), values


def _measured_row(name: str, hours: float, flops: tuple[float, float], peak: float, how: str) -> tuple[str, ...]:
    return (name, count(hours), *(percent(mfu_from_gpu_hours(each, hours, peak)) for each in flops), how)


def _ranking(found: Found) -> Sheet:
    rows = [
        (
            plan.layout.label,
            count(plan.gpu_hours_per_trillion),
            percent(plan.mfu[1]),
            percent(plan.bubbles[plan.layout.schedule]),
            gb(plan.needed),
        )
        for plan in found.best[:5]
    ]
    title = f"Best of {found.tried:,} layouts that divide, one per (pp, ep, schedule), ranked by GPU-hours per 1T tokens"
    return Sheet(title, ("layout", "GPU-h/1T", "MFU", "idle", "GB"), rows)


def _assumptions(config: ModelConfig, options: TrainOptions, hardware: Hardware) -> list[tuple[str, str]]:
    said = [
        (
            f"kernels at {percent(options.kernel_efficiency)} of {hardware.name}'s bf16 peak",
            "ours, fitted: V2's layout then costs its 172.8K",
        ),
        (f"rates of {hardware.name}", "data sheets, see src/dsv2/recipes/hardware; another machine: hardware=FILE.toml"),
        ("uniform routing, no dropping", "the balance losses aim at it; real load adds imbalance"),
        ("GPUs = pp x ep x dp", "an expert has dp copies, another weight ep x dp; ep ranks are neighbours"),
        ("ZeRO exchange at link speed, step's not hidden", "conservative; per-microbatch exchange hides behind compute"),
        ("activations counted tensor by tensor, flash attention", "src/dsv2/parallel/memory.py lists them"),
        ("not modelled", "optimiser's time, data loading, stragglers, failures, link contention"),
    ]
    if config.num_moe_layers == 0:
        said.pop(2)
    if options.tokens is None:
        said.append(("20 tokens per activated parameter", "a rule of thumb; state tokens=..."))
    return said


def _draw(config: ModelConfig, name: str, hardware: Hardware, plan: TrainPlan) -> bytes:
    from dsv2.plan.figures import scaling

    layout = plan.layout
    fixed = {"schedule": layout.schedule, "chunks": layout.chunks, "micro_batch": layout.micro_batch} if layout.pp > 1 else {}
    tried: Callable[[int], Found] = lambda gpus: search(config, layout, hardware, gpus, fixed)  # noqa: E731
    return scaling(name, hardware, plan, [(2**power, tried(2**power)) for power in range(3, 15)])
