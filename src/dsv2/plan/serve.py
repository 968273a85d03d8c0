"""``dsv2 plan serve``: a model on its GPUs, the same with plain tensor parallelism, and DeepSeek 67B beside it."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.parallel.fit import GENERATED, LEAST_PROMPT, RATIO, YARDSTICK_GENERATED
from dsv2.parallel.hardware import Hardware, load_hardware
from dsv2.parallel.serving import ServePlan, cache_tokens_beside_one_copy
from dsv2.plan.cases import PUBLISHED_ON, Case, cases_of, fitted, ranked, traffic_of, what_if
from dsv2.plan.options import ServeOptions, keys_of, read_serve
from dsv2.plan.sheet import Answer, Sheet, clock, count, gb, percent


def plan_serve(config: ModelConfig, name: str, overrides: Sequence[str], searching: bool) -> Answer:
    """Answer ``dsv2 plan serve``.

    Args:
        config: the model.
        name: what it was called.
        overrides: KEY=VALUE.
        searching: try numbers of GPUs and both attentions; what the overrides state stays.

    Returns:
        Tables and values; ``problem`` is set where weights and one request do not fit.

    Raises:
        ConfigError: a wrong option, or heads or experts that do not divide.
    """
    options = read_serve(config, overrides)
    hardware = load_hardware(options.hardware)
    ranking: list[ServePlan] = []
    if searching:
        ranking = ranked(config, name, options, hardware, keys_of(overrides))
        options = options.model_copy(update={"gpus": ranking[0].layout.gpus, "attention": ranking[0].layout.attention})
    if options.fit:
        options = fitted(config, name, options, hardware)
    cases = cases_of(config, name, options, hardware)
    return _answer(config, name, options, hardware, cases, ranking)


def _answer(
    config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware, cases: list[Case], ranking: list[ServePlan]
) -> Answer:
    main = cases[0].plan
    traffic = traffic_of(options)
    title = (
        f"Serving {name} on {options.gpus} x {hardware.name}: {main.layout.label}\n"
        f"traffic: prompts of {traffic.prompt:g}, answers of {traffic.output:g} tokens; utilisation {options.utilisation:g}"
    )
    sheets, words, problem = [_capacity(title, cases, hardware)], [], None
    if main.fits:
        sheets += [_decode(cases), _rates(cases, options)]
        if options.yardstick is not None:
            published = (hardware.name, options.gpus) == PUBLISHED_ON
            sheets += [_published(cases)] if published else []
            sheets.append(_sensitivity(config, name, options, hardware))
            words += _why_not_tp(cases, published)
    else:
        room = main.memory_bytes - main.weight_bytes - main.layout.gpus * main.layout.reserve_bytes
        problem = ConfigError(
            f"does not fit: weights {gb(main.weight_bytes)} GB and {gb(main.layout.gpus * main.layout.reserve_bytes)} GB reserved leave"
            f" {gb(room)} of {gb(main.memory_bytes)} GB; one request needs {gb(traffic.resident * main.cache_token_bytes)} GB",
            hint="use more gpus, attention=tp, fewer weight_bits or other hardware",
        )
    values: dict[str, Any] = {"model": name, "hardware": hardware.model_dump(), "options": options.model_dump()}
    values["cases"] = {case.name: _values(case, hardware) for case in cases}
    if main.fits and options.yardstick is not None:
        values["ratio"] = cases[0].generated / cases[-1].generated
        values["sensitivity"] = [
            {"change": row[0], "generated": row[1], "yardstick_generated": row[2], "ratio": row[1] / row[2], "prompt": row[3]}
            for row in what_if(config, name, options, hardware)
        ]
    if ranking:
        sheets.append(_ranking_sheet(ranking))
        words += _explain(ranking)
        values["search"] = [asdict(plan.layout) | {"dollars_per_million": _price(plan)} for plan in ranking]
    return Answer(sheets, words, _assumptions(options, hardware), values, partial(_draw, config, name, options, hardware), problem)


def _values(case: Case, hardware: Hardware) -> dict[str, Any]:
    plan = case.plan
    left, tokens = cache_tokens_beside_one_copy(plan.model, plan.layout, hardware)
    return {
        "layout": asdict(plan.layout), "replicas": case.replicas, "bytes_left_beside_one_copy": left, "tokens_beside_one_copy": tokens,
        "weight_bytes": plan.weight_bytes, "cache_token_bytes": plan.cache_token_bytes, "cache_copies": plan.cache_copies,
        "capacity_tokens": plan.capacity_tokens, "batch": plan.batch, "fits": plan.fits,
        "decode_seconds": asdict(plan.decode), "limit": plan.decode.limit, "generated_per_second": case.generated,
        "prompt_per_second": case.prompts, "user_per_second": plan.user_per_second,
        "mixed_per_second": case.replicas * plan.mixed_per_second,
        "dollars_per_million_generated": _price(plan, plan.generated_per_second),
        "dollars_per_million_prompt": _price(plan, plan.prompt_per_second),
        "dollars_per_million_generated_mixed": _price(plan),
    }  # fmt: skip


def _price(plan: ServePlan, rate: float | None = None) -> float | None:
    """Dollars per million tokens; None where nothing is served, since JSON has no infinity."""
    rate = plan.mixed_per_second if rate is None else rate
    return plan.dollars_per_million(rate) if rate else None


# Tables -----------------------------------------------------------------------------------------------------------------------------


def _capacity(title: str, cases: list[Case], hardware: Hardware) -> Sheet:
    views = [cache_tokens_beside_one_copy(case.plan.model, case.plan.layout, hardware) for case in cases]
    plans = [case.plan for case in cases]
    rows = [
        ("one copy of weights, GB", [gb(p.model.parameters * p.layout.weight_bits / 8) for p in plans], "parameters x bits / 8"),
        (
            "memory left beside it, GB",
            [gb(left) for left, _ in views],
            f"{plans[0].layout.gpus} x {gb(hardware.memory_bytes)} GB less that",
        ),
        (
            "cache bytes per token",
            [f"{p.model.cache_elements * p.layout.cache_bits / 8:,.0f}" for p in plans],
            "numbers x bits / 8, section 2.1.4",
        ),
        ("copies of the cache", [f"{p.cache_copies:g}" for p in plans], "TP holds MLA's one latent on every GPU"),
        ("tokens it holds", [count(tokens) for _, tokens in views], "left / (bytes x copies)"),
        ("weights as laid out, GB", [gb(p.weight_bytes) for p in plans], "DP: all but routed experts on every GPU"),
        ("tokens, reserve taken", [count(p.capacity_tokens) for p in plans], f"{gb(plans[0].layout.reserve_bytes)} GB per GPU reserved"),
        ("requests at once", [f"{p.batch:,}" for p in plans], "tokens / (prompt + answer / 2)"),
    ]
    return _sheet(f"{title}\nCapacity", cases, rows)


def _decode(cases: list[Case]) -> Sheet:
    plans = [case.plan for case in cases]
    rows = [
        ("compute", [clock(p.decode.compute) for p in plans], "2 x activated, attention over cached tokens"),
        ("memory", [clock(p.decode.memory) for p in plans], "weights and cache a GPU reads"),
        ("communication", [clock(p.decode.communication) for p in plans], "all-to-all, or 2 all-reduces a layer"),
        ("waits for", [p.decode.limit for p in plans], "the longest" if plans[0].layout.overlap else "the sum counts: no overlap"),
        (
            "step",
            [clock(p.decode.seconds / p.layout.utilisation) if p.fits else "-" for p in plans],
            f"/ utilisation {plans[0].layout.utilisation:g}",
        ),
    ]
    return _sheet("One generation step: a token for each request", cases, rows)


def _rates(cases: list[Case], options: ServeOptions) -> Sheet:
    plans = [case.plan for case in cases]
    mixed = [case.replicas * case.plan.mixed_per_second for case in cases]
    ratio = options.prompt_tokens / options.output_tokens
    prices = [[_price(p, p.generated_per_second), _price(p, p.prompt_per_second), _price(p)] for p in plans]
    rows = [
        ("generated tokens/s", [f"{case.generated:,.0f}" for case in cases], "requests / step, generation only"),
        ("  of one request", [f"{p.user_per_second:.1f}" for p in plans], "1 / step"),
        ("prompt tokens/s", [f"{case.prompts:,.0f}" for case in cases], "prompts only, attention expanded"),
        ("both on one node", [f"{rate:,.0f}" for rate in mixed], f"generated, with {ratio:g} prompt tokens read for each"),
        *(
            (what, ["-" if price[place] is None else f"{price[place]:.3f} $" for price in prices], how)
            for place, (what, how) in enumerate(
                (
                    ("1M generated", "GPUs x price / 3600 / tokens/s"),
                    ("1M prompt", "the same"),
                    ("1M generated, both", "its prompts included"),
                )
            )
        ),
    ]
    return _sheet("Rates and prices", cases, rows)


def _sheet(title: str, cases: list[Case], rows: list[tuple[str, list[str], str]]) -> Sheet:
    return Sheet(title, ("what", *(case.name for case in cases), "how"), [(what, *cells, how) for what, cells, how in rows])


def _published(cases: list[Case]) -> Sheet:
    ours, theirs = cases[0], cases[-1]
    figures = [
        ("V2 generated tokens/s", ours.generated, GENERATED, "> 50K; about 55.5K read off figure 1(b)"),
        ("67B generated tokens/s", theirs.generated, YARDSTICK_GENERATED, "about 9.65K read off figure 1(b)"),
        ("ratio", ours.generated / theirs.generated, RATIO, "section 3.2.3"),
        ("V2 prompt tokens/s", ours.prompts, LEAST_PROMPT, "a lower bound: > 100K, section 3.2.3"),
    ]
    rows = [
        (
            what,
            f"{planned:,.2f}" if planned < 100 else f"{planned:,.0f}",
            f"{said:g}" if said < 100 else f"{said:,.0f}",
            f"{planned / said - 1:+.1%}",
            how,
        )
        for what, planned, said, how in figures
    ]
    return Sheet(
        "Beside the published figures (traffic and utilisation are fitted to them, ours)",
        ("figure", "planned", "published", "off", "how"),
        rows,
    )


def _sensitivity(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> Sheet:
    rows = [
        (change, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}", f"{prompts:,.0f}")
        for change, ours, theirs, prompts in what_if(config, name, options, hardware)
    ]
    return Sheet("Sensitivity: one thing changed at a time, tokens/s", ("change", name, "67B", "ratio", f"{name} prompt"), rows)


def _why_not_tp(cases: list[Case], published: bool) -> list[str]:
    found = [case for case in cases[:-1] if case.plan.layout.attention == "tp"]
    if not found or found[0].plan.layout.gpus == 1:
        return []
    plain, stick = found[0], cases[-1]
    p = plain.plan
    against = f" instead of {RATIO} x" if published else ""
    return [
        f"Why plain {plain.name.split()[-1]} cannot: MLA has one latent for all heads, so every GPU holds and reads the whole cache,"
        f" {p.cache_copies:g} copies. {count(p.capacity_tokens)} tokens fit, {p.batch:,} requests; a step waits for {p.decode.limit} and"
        f" gives {plain.generated:,.0f} tokens/s, {plain.generated / stick.generated:.2f} x DeepSeek 67B{against}."
    ]


def _ranking_sheet(ranking: list[ServePlan]) -> Sheet:
    rows = [
        (
            plan.layout.label,
            f"{plan.batch:,}",
            f"{plan.generated_per_second / plan.layout.gpus:,.0f}",
            plan.decode.limit,
            f"{plan.dollars_per_million(plan.mixed_per_second):.3f} $",
        )
        for plan in ranking[:5]
    ]
    return Sheet(
        "Layouts ranked by the price of 1M generated tokens with their prompts",
        ("layout", "requests", "tok/s/GPU", "waits for", "1M"),
        rows,
    )


def _explain(ranking: list[ServePlan]) -> list[str]:
    best = ranking[0]
    said = [
        f"Best: {best.layout.label}: {best.batch:,} requests at once, {best.generated_per_second / best.layout.gpus:,.0f} generated"
        f" tokens/s per GPU, a step waits for {best.decode.limit}."
    ]
    for other in ranking[1:3]:
        more = other.dollars_per_million(other.mixed_per_second) / best.dollars_per_million(best.mixed_per_second) - 1
        said.append(
            f"{other.layout.label} costs {more:.1%} more: {_cached(other)} cached tokens per GPU against {_cached(best)}, generation waits"
            f" for {other.decode.limit}, prompts for {other.prefill.limit} against {best.prefill.limit}; links are busy {_links(other)} of"
            f" a generation step against {_links(best)}."
        )
    return said


def _cached(plan: ServePlan) -> str:
    return count(plan.capacity_tokens / plan.layout.gpus)


def _links(plan: ServePlan) -> str:
    return percent(plan.decode.communication / plan.decode.seconds)


def _assumptions(options: ServeOptions, hardware: Hardware) -> list[tuple[str, str]]:
    said = [
        (
            f"traffic {options.prompt_tokens:g} in, {options.output_tokens:g} out",
            "ours, fitted; the paper's traffic is not public",
        ),
        (f"utilisation {options.utilisation:g}", "ours, fitted; the same for every model, prompts and generation"),
        ("compute, memory and links overlap" if options.overlap else "nothing overlaps", "overlap=false adds them up instead"),
        ("lengths are means", "a real mix is spread; a full cache is kept full, nothing is evicted"),
        ("products in FP8 with 8-bit weights", "where the GPU has it; attention in bf16, activations travel in bf16"),
        ("experts evenly loaded", "a token goes to each device once, as in training"),
        (f"rates of {hardware.name}", f"src/dsv2/recipes/hardware; {hardware.price_per_hour:g} $ per GPU-hour; or hardware=FILE.toml"),
        ("not modelled", "latency limits, scheduling, prefix reuse, kernel launches"),
    ]
    if options.yardstick is not None:
        said.insert(2, ("DeepSeek 67B: precision and layout", "ours: bf16, 16-bit cache as figure 1 counts it, tensor parallel"))
    return said


def _draw(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> bytes:
    from dsv2.plan.figures import contexts

    share = options.prompt_tokens / (options.prompt_tokens + options.output_tokens / 2)
    curves: dict[str, list[tuple[float, float]]] = {}
    for power in range(31):
        resident = 256 * 2 ** (power / 4)
        scaled = options.model_copy(update={"prompt_tokens": share * resident, "output_tokens": 2 * (1 - share) * resident})
        for case in cases_of(config, name, scaled, hardware):
            if case.plan.fits:
                curves.setdefault(case.name, []).append((resident, case.generated))
    published = options.yardstick is not None and (hardware.name, options.gpus) == PUBLISHED_ON
    return contexts(name, hardware, options.gpus, traffic_of(options).resident, options.utilisation, curves, published)
