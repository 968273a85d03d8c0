"""What ``dsv2 plan train`` says: tables, sentences and assumptions."""

from collections.abc import Mapping
from typing import Any

from dsv2.model.accounting import count_parameters
from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.schedules import SCHEDULES, microbatches_held
from dsv2.parallel.search import Found
from dsv2.parallel.simulate import COST, TrainPlan
from dsv2.plan.options import CODERS, TrainOptions, recipe_for
from dsv2.plan.sheet import Sheet, clock, count, gb, percent

FEW_PERCENT = 0.03  # of the activated parameters; an embedding with more shows in the MFU


def how_found(plan: TrainPlan, gpus: int | None) -> list[str]:
    """Say how the layout came about.

    Args:
        plan: what was found.
        gpus: as asked; None where the number was found, too.

    Returns:
        One sentence.
    """
    if gpus is not None:
        return [f"The layout is the cheapest found on {gpus:,} GPUs; KEY=VALUE holds a part of it."]
    number = plan.layout.gpus
    subject = "1 GPU is" if number == 1 else f"{number:,} GPUs are"
    return [f"{subject} the fewest on which it trains (numbers doubled from the smallest), with the cheapest layout; gpus=N asks for more."]


def memory(plan: TrainPlan, title: str) -> Sheet:
    """Say what the first, the fullest and the last pipeline rank hold.

    Args:
        plan: with its memory.
        title: the line above.

    Returns:
        A table.
    """
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


def pipeline(config: ModelConfig, plan: TrainPlan) -> Sheet:
    """Set the schedules side by side; "-" where one cannot be had with so many stages.

    Args:
        config: the model.
        plan: with its bubbles.

    Returns:
        A table.
    """
    layout, (forward, backward, weight) = plan.layout, plan.phases
    title = f"Pipeline: p = {layout.pp}, m = {layout.microbatches} microbatches of {layout.tokens:,} tokens"
    if layout.pp == 1:
        names = ("forward", "backward of inputs", "backward of weights")
        phases = [(name, clock(seconds), "of one microbatch") for name, seconds in zip(names, plan.phases, strict=True)]
        return Sheet(f"{title}; one stage has no bubble", ("phase", "time", "how"), phases)
    rows = []
    for schedule, formula in SCHEDULES.items():
        chunks = max(2, layout.chunks) if schedule == "interleaved" else 1
        chosen = "-> " if schedule == layout.schedule else "   "
        if schedule not in plan.bubbles:
            rows.append(
                (chosen + schedule, "-", "-", f"{formula}, v = {chunks}: {config.num_hidden_layers} layers do not fill p x v chunks")
            )
            continue
        held = microbatches_held(schedule, layout.pp, 0, layout.microbatches, chunks)
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


def exchange(plan: TrainPlan, hardware: Hardware) -> list[Sheet]:
    """Say what the expert all-to-all moves.

    Args:
        plan: with its all-to-all.
        hardware: GPUs of a node.

    Returns:
        A table; none where experts are not spread.
    """
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


def step(plan: TrainPlan) -> Sheet:
    """Say where a step's time goes.

    Args:
        plan: with its cost.

    Returns:
        A table.
    """
    how = {
        "compute": "m x mean stage: 6 N and attention / (peak x kernel efficiency)",
        "recompute": f"{plan.layout.recompute}",
        "all-to-all": "what the shared experts do not hide",
        "imbalance": f"m x (slowest stage - mean): rank {plan.slowest}{' has the head' if plan.stages[plan.slowest].head else ''}",
        "bubble": SCHEDULES[plan.layout.schedule],
        "sync": f"ZeRO-{plan.layout.zero} among copies: not hidden of {clock(plan.sync_links_seconds)}",
    }
    whole = plan.step_seconds
    rows = [(part, clock(plan.cost[part]), percent(plan.cost[part] / whole), how[part]) for part in COST]
    tokens = f"{plan.tokens_per_step / 1e6:.2f}M tokens = {plan.layout.batch} x {plan.layout.seq_len}"
    return Sheet("One step", ("part", "time", "share", "how"), [*rows, ("step", clock(whole), "100.0 %", tokens)])


def result(plan: TrainPlan, hardware: Hardware, v: Mapping[str, Any]) -> Sheet:
    """Say what training comes to.

    Args:
        plan: with its FLOP.
        hardware: its price.
        v: the numbers, named as in JSON.

    Returns:
        A table.
    """
    six, whole = plan.flops_per_token
    peak = f"{plan.peak / 1e12:,.4g} TFLOPS"
    rate = v["tokens_per_second"]
    rows = [
        ("tokens/s", f"{rate:,.0f}", f"step tokens / step time; {rate / plan.layout.gpus:,.0f} per GPU"),
        ("MFU, 6 N", percent(v["mfu_6n"]), f"{six / 1e9:.4g} GFLOP/token x tokens/s/GPU / {peak}"),
        ("MFU, with attention", percent(v["mfu_with_attention"]), f"{whole / 1e9:.4g} GFLOP/token: + 3 l n_h (d_h+d_h^R+d_v) s"),
        ("GPU-hours per 1T tokens", count(v["gpu_hours_per_trillion"]), "1e12 / tokens/s x GPUs / 3600"),
        (f"GPU-hours for {count(v['tokens'])}", count(v["gpu_hours"]), f"{_days(v['days'])} on {plan.layout.gpus:,} x {hardware.name}"),
        ("dollars", count(v["dollars"]), f"at {hardware.price_per_hour:g} $ per GPU-hour"),
    ]
    return Sheet("Result", ("what", "value", "how"), rows)


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:.1f} hours" if days >= 1 / 24 else clock(86400 * days)


def ranking(found: Found) -> Sheet:
    """List the best layouts.

    Args:
        found: by a search.

    Returns:
        A table.
    """
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


def explain(found: Found) -> list[str]:
    """Say in words why the best layout is ahead of the next two, and what memory rules out.

    Args:
        found: with at least one layout that fits.

    Returns:
        Sentences.
    """
    best = found.best[0]
    said = [f"Best: {best.layout.label}: {count(best.gpu_hours_per_trillion)} GPU-hours per 1T tokens, {_room(best)}."]
    for other in found.best[1:3]:
        loss = other.gpu_hours_per_trillion / best.gpu_hours_per_trillion - 1
        changes = sorted(((_share(other, part, best) - _share(best, part, best), part) for part in COST), key=lambda pair: -abs(pair[0]))
        words = [f"{'more' if change > 0 else 'less'} {part} ({change:+.1%} of a step)" for change, part in changes if abs(change) > 5e-4]
        said.append(f"{other.layout.label} costs {loss:.1%} more: {', '.join(words[:4]) or 'the same parts'}; {_room(other)}.")
    missed = found.out_of_reach
    if missed is not None and missed.gpu_hours_per_trillion < best.gpu_hours_per_trillion:
        hours = count(missed.gpu_hours_per_trillion)
        said.append(f"Memory rules out {missed.layout.label}, which would cost {hours}: it needs {_room(missed)}.")
    return said


def _share(plan: TrainPlan, part: str, best: TrainPlan) -> float:
    """One part of a step, in steps of the best plan at the same number of GPUs."""
    return plan.cost[part] / best.step_seconds


def _room(plan: TrainPlan) -> str:
    return f"{plan.needed / 1e9:.1f} of {plan.capacity / 1e9:.1f} GB per GPU"


def assumptions(config: ModelConfig, name: str, options: TrainOptions, hardware: Hardware, typed: set[str]) -> list[tuple[str, str]]:
    """Return what the plan rests on: pairs (what, why).

    Args:
        config: the model.
        name: what it was called.
        options: what was asked.
        hardware: where.
        typed: options that were stated.

    Returns:
        Rows for a table.
    """
    fitted = "as stated" if "kernel_efficiency" in typed else "ours, fitted: V2's layout then costs its 172.8K"
    said = [
        (f"kernels at {percent(options.kernel_efficiency)} of {hardware.name}'s bf16 peak", fitted),
        (f"rates of {hardware.name}", "data sheets, see src/dsv2/recipes/hardware; another machine: hardware=FILE.toml"),
        ("uniform routing, no dropping", "the balance losses aim at it; real load adds imbalance"),
        ("GPUs = pp x ep x dp", "an expert has dp copies, another weight ep x dp; ep ranks are neighbours"),
        ("ZeRO exchange layer by layer, behind compute", "one layer's is never hidden, nor what takes longer than a layer"),
        ("activations counted tensor by tensor, flash attention", "src/dsv2/parallel/memory.py lists them"),
        ("not modelled", "optimiser's time, data loading, stragglers, failures, link contention"),
    ]
    if config.num_moe_layers == 0:
        said.pop(2)
    counts = count_parameters(config)
    share = 0.0 if config.tie_word_embeddings else counts.embedding / counts.activated
    if share > FEW_PERCENT:
        said.append((f"6 N counts the input embedding, {percent(share)} of N", "a look-up, no product: MFU can exceed the kernels' share"))
    return [*said, *_whose_tokens(config, name, options, typed)]


def _whose_tokens(config: ModelConfig, name: str, options: TrainOptions, typed: set[str]) -> list[tuple[str, str]]:
    if options.tokens is None:
        return [("20 tokens per activated parameter", "a rule of thumb; state tokens=...")]
    recipe = recipe_for(config, "plan-train")
    if "tokens" in typed or recipe in ("default", name):
        return []
    if name in CODERS:
        return [(f"{count(options.tokens)} tokens", "4.2T of V2's or V2-Lite's pre-training, 6T of its own (Coder-V2 paper, section 3)")]
    return [(f"{count(options.tokens)} tokens", f"those of {recipe}, which has this shape")]
