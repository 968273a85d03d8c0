"""``dsv2 plan serve``: a model on its GPUs, the same with plain tensor parallelism, and DeepSeek 67B beside it."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware, load_hardware
from dsv2.parallel.serving import ServePlan, cache_tokens_beside_one_copy
from dsv2.plan.cases import Case, cases_of, does_not_fit, fitted, is_published, ranked, traffic_of, with_yardstick_gpus
from dsv2.plan.options import ServeOptions, keys_of, read_serve
from dsv2.plan.serve_sheets import (
    assumptions,
    beside_published,
    capacity,
    decode,
    explain,
    off_published,
    price,
    ranking_sheet,
    rates,
    sensitivity,
    title_of,
    why_not_tp,
)
from dsv2.plan.sheet import Answer
from dsv2.plan.what_if import Change, what_if


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
    options, typed = read_serve(config, overrides), keys_of(overrides)
    hardware = load_hardware(options.hardware)
    ranking: list[ServePlan] = []
    if searching:
        ranking = ranked(config, name, options, hardware, typed)
        options = options.model_copy(update={"gpus": ranking[0].layout.gpus, "attention": ranking[0].layout.attention})
    options = with_yardstick_gpus(options, hardware)
    if options.fit:
        options = fitted(config, name, options, hardware)
        typed -= {"prompt_tokens", "output_tokens", "utilisation"}
    return _answer(config, name, options, hardware, ranking, typed)


def _answer(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware, ranking: list[ServePlan], typed: set[str]) -> Answer:
    cases = cases_of(config, name, options, hardware)
    main, stick = cases[0].plan, cases[-1] if options.yardstick is not None else None
    compared = main.fits and stick is not None and stick.plan.fits
    published = compared and is_published(config, options, hardware)
    sheets, words = [capacity(title_of(name, options, hardware, main), cases, hardware)], []
    values: dict[str, Any] = {"model": name, "hardware": hardware.model_dump(), "options": options.model_dump()}
    values["cases"] = {case.name: _values(case, hardware) for case in cases}
    if main.fits:
        sheets += [decode(cases), rates(cases, options)]
        words += why_not_tp(cases, stick if compared else None, published)
    if main.fits and stick is not None:
        values["ratio"] = cases[0].generated / stick.generated if compared else None
    if published and stick is not None:
        sheets.append(beside_published(cases[0], stick, typed))
        values["published"] = [figure._asdict() for figure in off_published(cases[0], stick)]
    if compared:
        changes = what_if(config, name, options, hardware)
        sheets.append(sensitivity(changes))
        values["sensitivity"] = [_change(change) for change in changes]
    elif main.fits and stick is not None:
        words.append(f"DeepSeek 67B does not fit on {options.gpus} x {hardware.name} ({stick.name}): there is no ratio to it.")
    if ranking:
        sheets.append(ranking_sheet(ranking))
        words += explain(ranking)
        values["search"] = [asdict(plan.layout) | {"dollars_per_million": price(plan)} for plan in ranking]
    problem = None if main.fits else does_not_fit(main)
    draw = partial(_draw, config, name, options, hardware, published)
    return Answer(sheets, words, assumptions(config, options, hardware, main, typed), values, draw, problem)


def _change(change: Change) -> dict[str, Any]:
    return {
        "change": change.name, "generated": change.generated, "yardstick_generated": change.yardstick,
        "ratio": change.generated / change.yardstick, "prompt": change.prompts,
    }  # fmt: skip


def _values(case: Case, hardware: Hardware) -> dict[str, Any]:
    """Return a column's numbers; bytes, tokens and requests of one replica, rates of all."""
    plan = case.plan
    left, tokens = cache_tokens_beside_one_copy(plan.model, plan.layout, hardware)
    return {
        "layout": asdict(plan.layout), "replicas": case.replicas, "bytes_left_beside_one_copy": left, "tokens_beside_one_copy": tokens,
        "weight_bytes": plan.weight_bytes, "cache_token_bytes": plan.cache_token_bytes, "cache_copies": plan.cache_copies,
        "capacity_tokens": plan.capacity_tokens, "batch": plan.batch, "fits": plan.fits,
        "decode_seconds": asdict(plan.decode) if plan.fits else None, "limit": plan.decode.limit if plan.fits else None,
        "generated_per_second": case.generated, "prompt_per_second": case.prompts, "user_per_second": plan.user_per_second,
        "mixed_per_second": case.replicas * plan.mixed_per_second,
        "dollars_per_million_generated": price(plan, plan.generated_per_second),
        "dollars_per_million_prompt": price(plan, plan.prompt_per_second),
        "dollars_per_million_generated_mixed": price(plan),
    }  # fmt: skip


def _draw(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware, published: bool) -> bytes:
    from dsv2.plan.figures import contexts

    share = options.prompt_tokens / (options.prompt_tokens + options.output_tokens / 2)
    longest = min(256 * 2**7.5, config.max_position_embeddings / (2 - share))
    curves: dict[str, list[tuple[float, float]]] = {}
    for power in range(30, -1, -1):
        resident = longest / 2 ** (power / 4)
        scaled = options.model_copy(update={"prompt_tokens": share * resident, "output_tokens": 2 * (1 - share) * resident})
        for case in cases_of(config, name, scaled, hardware):
            if case.plan.fits:
                curves.setdefault(case.name, []).append((resident, case.generated))
    return contexts(name, hardware, options.gpus, traffic_of(options).resident, options.utilisation, curves, published)
