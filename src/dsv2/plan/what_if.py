"""Sensitivity: one thing changed at a time, named by its value; what is in force already or cannot be is left out."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.parallel.hardware import Hardware
from dsv2.plan.cases import Case, layout_of, model_case, with_yardstick_gpus, yardstick_case
from dsv2.plan.options import ServeOptions, YardstickOptions

MANY_REQUESTS = 1024


class Change(NamedTuple):
    """What was changed, and tokens/s then: the model's generated, DeepSeek 67B's generated, the model's prompts."""

    name: str
    generated: float
    yardstick: float
    prompts: float


def what_if(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> list[Change]:
    """Return the sensitivity.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.

    Returns:
        The plan itself first, then each change with which both models still fit.

    Raises:
        ConfigError: the plan itself does not divide.
    """
    options = with_yardstick_gpus(options, hardware)
    ours, theirs = model_case(config, name, options, hardware), yardstick_case(options, hardware)
    rows = [Change("as planned", ours.generated, theirs.generated, ours.prompts)]
    for change, update in (*_of_model(config, options, hardware, ours), *_of_yardstick(options, hardware, theirs)):
        changed = options.model_copy(update=update)
        with suppress(ConfigError):  # a comparison that was not asked for
            ours, theirs = model_case(config, name, changed, hardware), yardstick_case(changed, hardware)
            if ours.plan.fits and theirs.plan.fits:
                rows.append(Change(change, ours.generated, theirs.generated, ours.prompts))
    return rows


def _of_model(config: ModelConfig, o: ServeOptions, hardware: Hardware, planned: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of traffic, utilisation and the model's own layout: (name, fields of ``ServeOptions``)."""
    for word, factor in (("x 2", 2.0), ("/ 2", 0.5)):
        prompt, output = factor * o.prompt_tokens, factor * o.output_tokens
        if min(prompt, output) >= 1 and prompt + output <= config.max_position_embeddings:
            yield f"prompts and answers {word}", {"prompt_tokens": prompt, "output_tokens": output}
    for share in (min(1.0, 1.2 * o.utilisation), 0.8 * o.utilisation):
        if share != o.utilisation:
            yield f"utilisation {share:.3g}", {"utilisation": share}
    yield "no overlap" if o.overlap else "with overlap", {"overlap": not o.overlap}
    if planned.plan.batch > MANY_REQUESTS:
        yield f"at most {MANY_REQUESTS:,} requests", {"batch": MANY_REQUESTS}
    for bits in (8, 16):
        if bits != o.cache_bits:
            yield f"its cache in {bits} bits", {"cache_bits": bits}
    if layout_of(o, hardware).compute_bits == 8:
        yield "its products in bf16", {"compute_bits": 16}
    elif hardware.fp8_flops and o.weight_bits == 8:
        yield "its products in fp8", {"compute_bits": 8}
    if o.reserve_gb:
        yield "no memory reserved", {"reserve_gb": 0.0}


def _of_yardstick(o: ServeOptions, hardware: Hardware, planned: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of DeepSeek 67B: (name, fields of ``ServeOptions``)."""
    stick, gpus = o.yardstick or YardstickOptions(), planned.plan.layout.gpus
    weights: dict[str, Any] = {} if stick.weight_bits == 8 else {"weight_bits": 8}
    if weights:
        how = "fp8 weights and products" if hardware.fp8_flops else "8-bit weights"
        yield f"67B with {how}", {"yardstick": stick.model_copy(update=weights)}
    if stick.cache_bits != o.cache_bits:
        also = " as well" if weights else ""
        cache = {"cache_bits": o.cache_bits}
        yield f"67B with a {o.cache_bits:g}-bit cache{also}", {"yardstick": stick.model_copy(update=weights | cache)}
    if gpus % 2 == 0:
        half = f"TP-{gpus // 2}" if gpus > 2 else "single GPU"
        yield f"67B as {2 * planned.replicas} {half} replicas", {"yardstick": stick.model_copy(update={"gpus": gpus // 2})}
