"""What ``dsv2 plan serve`` says: tables, sentences and assumptions."""

from collections.abc import Callable
from typing import NamedTuple

from dsv2.model.config import ModelConfig
from dsv2.parallel.fit import GENERATED, LEAST_PROMPT, RATIO, YARDSTICK_GENERATED
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.serving import ServePlan, cache_tokens_beside_one_copy
from dsv2.plan.cases import Case
from dsv2.plan.options import ServeOptions, recipe_for
from dsv2.plan.sheet import Sheet, clock, count, gb, percent
from dsv2.plan.what_if import Change

SLOWER = 0.9  # a layout with less than this share of another's rate is called slower


class Figure(NamedTuple):
    """A planned number beside the published one."""

    what: str
    planned: float
    published: float
    source: str


def price(plan: ServePlan, rate: float | None = None) -> float | None:
    """Return dollars per million tokens.

    Args:
        plan: what is served.
        rate: tokens/s; left out: generated ones with their prompts.

    Returns:
        None where nothing is served, since JSON has no infinity.
    """
    rate = plan.mixed_per_second if rate is None else rate
    return plan.dollars_per_million(rate) if rate else None


def title_of(name: str, options: ServeOptions, hardware: Hardware, main: ServePlan) -> str:
    """Return the two lines above everything: the model, where and how it is served, and to whom."""
    return (
        f"Serving {name} on {options.gpus} x {hardware.name}: {main.layout.label}\n"
        f"traffic: prompts of {options.prompt_tokens:g}, answers of {options.output_tokens:g} tokens; utilisation {options.utilisation:g}"
    )


def capacity(title: str, cases: list[Case], hardware: Hardware) -> Sheet:
    """Say what memory holds.

    Args:
        title: see ``title_of``.
        cases: the columns; all replicas of one together.
        hardware: memory of a GPU.

    Returns:
        A table.
    """
    views = [cache_tokens_beside_one_copy(case.plan.model, case.plan.layout, hardware) for case in cases]
    plans, times = [case.plan for case in cases], [case.replicas for case in cases]
    per_gpu = f"GPUs x {gb(hardware.memory_bytes)} GB less that"
    reserve = f"{gb(plans[0].layout.reserve_bytes)} GB per GPU reserved"
    rows = [
        ("one copy of weights, GB", [gb(p.model.parameters * p.layout.weight_bits / 8) for p in plans], "parameters x bits / 8"),
        ("memory left beside it, GB", [gb(n * left) for n, (left, _) in zip(times, views, strict=True)], per_gpu),
        (
            "cache bytes per token",
            [f"{p.model.cache_elements * p.layout.cache_bits / 8:,.0f}" for p in plans],
            "numbers x bits / 8, section 2.1.4",
        ),
        ("copies of the cache", [f"{p.cache_copies:g}" for p in plans], "TP holds MLA's one latent on every GPU"),
        ("tokens it holds", [count(max(0.0, n * held)) for n, (_, held) in zip(times, views, strict=True)], "left / (bytes x copies)"),
        (
            "weights as laid out, GB",
            [gb(n * p.weight_bytes) for n, p in zip(times, plans, strict=True)],
            "DP: all but routed experts on every GPU",
        ),
        ("tokens, reserve taken", [count(max(0.0, n * p.capacity_tokens)) for n, p in zip(times, plans, strict=True)], reserve),
        (
            "requests at once",
            [f"{n * p.batch:,}" for n, p in zip(times, plans, strict=True)],
            "tokens/(prompt + answer/2), DP: per GPU",
        ),
    ]
    return _sheet(f"{title}\nCapacity", cases, rows)


def decode(cases: list[Case]) -> Sheet:
    """Say what a generation step takes; "-" for what does not fit.

    Args:
        cases: the columns.

    Returns:
        A table.
    """
    layout = cases[0].plan.layout
    rows = [
        ("compute", _cells(cases, lambda p: clock(p.decode.compute)), "2 x activated, attention over cached tokens"),
        ("memory", _cells(cases, lambda p: clock(p.decode.memory)), "weights and cache a GPU reads"),
        ("communication", _cells(cases, lambda p: clock(p.decode.communication)), "all-to-all, or 2 all-reduces a layer"),
        ("waits for", _cells(cases, lambda p: p.decode.limit), "the longest" if layout.overlap else "the sum counts: no overlap"),
        ("step", _cells(cases, lambda p: clock(p.decode.seconds / p.layout.utilisation)), f"/ utilisation {layout.utilisation:g}"),
    ]
    return _sheet("One generation step: a token for each request", cases, rows)


def rates(cases: list[Case], options: ServeOptions) -> Sheet:
    """Say tokens/s and prices; "-" for what does not fit.

    Args:
        cases: the columns.
        options: the traffic.

    Returns:
        A table.
    """
    replicas = {id(case.plan): case.replicas for case in cases}

    def dollars(rate: Callable[[ServePlan], float]) -> list[str]:
        return _cells(cases, lambda p: f"{p.dollars_per_million(rate(p)):.3f} $")

    per_token = f"generated, with {options.prompt_tokens / options.output_tokens:.3g} prompt tokens read for each"
    rows = [
        (
            "generated tokens/s",
            _cells(cases, lambda p: f"{replicas[id(p)] * p.generated_per_second:,.0f}"),
            "requests / step, generation only",
        ),
        ("  of one request", _cells(cases, lambda p: f"{p.user_per_second:.1f}"), "1 / step"),
        (
            "prompt tokens/s",
            _cells(cases, lambda p: f"{replicas[id(p)] * p.prompt_per_second:,.0f}"),
            "prompts only, attention expanded",
        ),
        ("both on one node", _cells(cases, lambda p: f"{replicas[id(p)] * p.mixed_per_second:,.0f}"), per_token),
        ("1M generated", dollars(lambda p: p.generated_per_second), "GPUs x price / 3600 / tokens/s"),
        ("1M prompt", dollars(lambda p: p.prompt_per_second), "the same"),
        ("1M generated, both", dollars(lambda p: p.mixed_per_second), "its prompts included"),
    ]
    return _sheet("Rates and prices", cases, rows)


def _cells(cases: list[Case], write: Callable[[ServePlan], str]) -> list[str]:
    return [write(case.plan) if case.plan.fits else "-" for case in cases]


def _sheet(title: str, cases: list[Case], rows: list[tuple[str, list[str], str]]) -> Sheet:
    return Sheet(title, ("what", *(case.name for case in cases), "how"), [(what, *cells, how) for what, cells, how in rows])


def off_published(ours: Case, theirs: Case) -> list[Figure]:
    """Return the published figures beside the planned ones.

    Args:
        ours: V2.
        theirs: DeepSeek 67B.

    Returns:
        Two rates, their ratio and the prompt rate.
    """
    return [
        Figure("V2 generated tokens/s", ours.generated, GENERATED, "> 50K; about 55.5K read off figure 1(b)"),
        Figure("67B generated tokens/s", theirs.generated, YARDSTICK_GENERATED, "about 9.65K read off figure 1(b)"),
        Figure("ratio", ours.generated / theirs.generated, RATIO, "section 3.2.3"),
        Figure("V2 prompt tokens/s", ours.prompts, LEAST_PROMPT, "a lower bound: > 100K, section 3.2.3"),
    ]


def beside_published(ours: Case, theirs: Case, typed: set[str]) -> Sheet:
    """Set the plan beside the published figures.

    Args:
        ours: V2.
        theirs: DeepSeek 67B.
        typed: options that were stated, which are then not the fitted ones.

    Returns:
        A table.
    """

    def write(value: float) -> str:
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"

    rows = [
        (figure.what, write(figure.planned), write(figure.published), f"{figure.planned / figure.published - 1:+.1%}", figure.source)
        for figure in off_published(ours, theirs)
    ]
    fitted = not typed & {"prompt_tokens", "output_tokens", "utilisation"}
    title = "Beside the published figures" + (" (traffic and utilisation are fitted to them, ours)" if fitted else "")
    return Sheet(title, ("figure", "planned", "published", "off", "how"), rows)


def sensitivity(changes: list[Change]) -> Sheet:
    """Say what one change does.

    Args:
        changes: see ``what_if``.

    Returns:
        A table.
    """
    rows = [
        (c.name, f"{c.generated:,.0f}", f"{c.yardstick:,.0f}", f"{c.generated / c.yardstick:.2f}", f"{c.prompts:,.0f}") for c in changes
    ]
    return Sheet("Sensitivity: one thing changed at a time, tokens/s", ("change", "generated", "67B", "ratio", "prompt"), rows)


def why_not_tp(cases: list[Case], stick: Case | None, published: bool) -> list[str]:
    """Say what plain tensor parallelism costs, where it is clearly slower.

    Args:
        cases: the columns.
        stick: DeepSeek 67B, where it fits.
        published: hold the ratio against the published one.

    Returns:
        A sentence or none.
    """
    kinds = {case.plan.layout.attention: case for case in cases if case.plan.model.config is not None and case.plan.layout.gpus > 1}
    dp, tp = kinds.get("dp"), kinds.get("tp")
    if dp is None or tp is None or not tp.plan.fits or tp.generated >= SLOWER * dp.generated:
        return []
    p = tp.plan
    against = f", {tp.generated / stick.generated:.2f} x DeepSeek 67B" if stick is not None else ""
    against += f" instead of {RATIO} x" if published else ""
    return [
        f"{dp.name} generates {dp.generated / tp.generated:.1f} x as much as plain {tp.name}: MLA has one latent for all heads, so with TP"
        f" every GPU holds and reads the whole cache, {p.cache_copies:g} copies. {count(p.capacity_tokens)} tokens fit, {p.batch:,}"
        f" requests; a step waits for {p.decode.limit} and gives {tp.generated:,.0f} tokens/s{against}."
    ]


def ranking_sheet(ranking: list[ServePlan]) -> Sheet:
    """List the best layouts.

    Args:
        ranking: the best first.

    Returns:
        A table.
    """
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


def explain(ranking: list[ServePlan]) -> list[str]:
    """Say in words why the best layout is ahead of the next two.

    Args:
        ranking: the best first.

    Returns:
        Sentences.
    """
    best = ranking[0]
    said = [
        f"Best: {best.layout.label}: {best.batch:,} requests at once, {best.generated_per_second / best.layout.gpus:,.0f} generated"
        f" tokens/s per GPU, a step waits for {best.decode.limit}."
    ]
    for other in ranking[1:3]:
        more = best.mixed_per_second / best.layout.gpus / (other.mixed_per_second / other.layout.gpus) - 1
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


def assumptions(config: ModelConfig, options: ServeOptions, hardware: Hardware, main: ServePlan, typed: set[str]) -> list[tuple[str, str]]:
    """Return what the plan rests on: pairs (what, why).

    Args:
        config: the model.
        options: layout and traffic.
        hardware: where.
        main: the plan.
        typed: options that were stated.

    Returns:
        Rows for a table.
    """
    ours = "ours, fitted" if recipe_for(config, "plan-serve") == "v2" else "ours, as fitted for V2"
    said = [
        (f"traffic {options.prompt_tokens:g} in, {options.output_tokens:g} out", _whose_traffic(ours, typed)),
        (
            f"utilisation {options.utilisation:g}",
            f"{'as stated' if 'utilisation' in typed else ours}; the same for every model, prompts and generation",
        ),
        ("compute, memory and links overlap" if options.overlap else "nothing overlaps", "overlap=true or false"),
        ("lengths are means", "a real mix is spread; a full cache is kept full, nothing is evicted"),
        (
            f"products in {'fp8' if main.layout.compute_bits == 8 else 'bf16'}, attention in bf16",
            "as stated; activations travel in bf16" if "compute_bits" in typed
            else "fp8 with 8-bit weights where the GPU has it; activations travel in bf16",
        ),
        ("experts evenly loaded", "a token goes to each device once, as in training"),
        (f"rates of {hardware.name}", f"src/dsv2/recipes/hardware; {hardware.price_per_hour:g} $ per GPU-hour; or hardware=FILE.toml"),
        ("not modelled", "latency limits, scheduling, prefix reuse, kernel launches"),
    ]  # fmt: skip
    if config.num_moe_layers == 0:
        said.pop(5)
    stick = options.yardstick
    if stick is not None:
        whose = "as stated" if "yardstick" in typed else "ours; figure 1 counts a 16-bit cache"
        precise = f"DeepSeek 67B: {stick.weight_bits:g}-bit weights, {stick.cache_bits:g}-bit cache"
        said.insert(2, (precise, f"{whose}; {stick.gpus or 1}-way tensor parallel"))
    return said


def _whose_traffic(ours: str, typed: set[str]) -> str:
    stated = [word for word, key in (("prompt", "prompt_tokens"), ("answer", "output_tokens")) if key in typed]
    if len(stated) == 2:
        return "as stated"
    if stated:
        return f"the {stated[0]} as stated, the other {ours}"
    return f"{ours}; the paper's traffic is not public, and answers half as long as prompts are assumed"
