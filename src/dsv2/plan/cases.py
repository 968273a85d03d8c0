"""What is set side by side: the model as asked, with the other attention, DeepSeek 67B. Fits, rankings and what-ifs are made of these."""

from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.parallel.fit import fit_traffic
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.served import served_dense, served_model
from dsv2.parallel.serving import ServeLayout, ServePlan, Traffic, plan_serving
from dsv2.plan.options import ServeOptions, YardstickOptions
from dsv2.plan.sheet import gb

PUBLISHED_ON = ("H800", 8)  # hardware and GPUs of the published throughput


@dataclass(frozen=True, slots=True)
class Case:
    """One column of the tables: what is served and how; ``replicas`` of it share the GPUs."""

    name: str
    plan: ServePlan
    replicas: int = 1

    @property
    def generated(self) -> float:
        """Generated tokens/s on all GPUs."""
        return self.replicas * self.plan.generated_per_second

    @property
    def prompts(self) -> float:
        """Prompt tokens/s on all GPUs."""
        return self.replicas * self.plan.prompt_per_second


def _layout(options: ServeOptions) -> ServeLayout:
    compute = options.compute_bits or (8 if options.weight_bits == 8 else 16)
    return ServeLayout(
        options.gpus, options.attention, options.weight_bits, options.cache_bits, compute, options.utilisation, options.overlap,
        options.reserve_gb * 1e9, options.batch,
    )  # fmt: skip


def traffic_of(options: ServeOptions) -> Traffic:
    """Return the traffic that the options state.

    Args:
        options: its lengths.

    Returns:
        Mean lengths.
    """
    return Traffic(options.prompt_tokens, options.output_tokens)


def model_case(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> Case:
    """Plan the model as the options say.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.

    Returns:
        A column.

    Raises:
        ConfigError: heads or experts do not divide.
    """
    return Case(name, plan_serving(served_model(config, name), _layout(options), traffic_of(options), hardware))


def yardstick_case(options: ServeOptions, hardware: Hardware) -> Case:
    """Plan DeepSeek 67B on the same GPUs with tensor parallelism.

    Args:
        options: their ``yardstick``, traffic and utilisation.
        hardware: where.

    Returns:
        A column.

    Raises:
        ConfigError: its replicas do not divide the GPUs.
    """
    stick = options.yardstick or YardstickOptions()
    gpus = stick.gpus or options.gpus
    if options.gpus % gpus:
        raise ConfigError(f"yardstick.gpus = {gpus} does not divide gpus = {options.gpus}", hint="use a divisor")
    layout = replace(
        _layout(options), gpus=gpus, attention="tp", weight_bits=stick.weight_bits, cache_bits=stick.cache_bits,
        compute_bits=8 if stick.weight_bits == 8 else 16,
    )  # fmt: skip
    plan = plan_serving(served_dense(DEEPSEEK_67B, "DeepSeek 67B"), layout, traffic_of(options), hardware)
    return Case(f"67B TP-{gpus}", plan, options.gpus // gpus)


def cases_of(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> list[Case]:
    """Return the columns: the model as asked, with the other attention where that divides, DeepSeek 67B where it is wanted.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.

    Returns:
        At least one.

    Raises:
        ConfigError: heads or experts do not divide.
    """
    if options.gpus == 1:
        cases = [model_case(config, name, options, hardware)]
    else:
        other = options.model_copy(update={"attention": "tp" if options.attention == "dp" else "dp"})
        cases = [model_case(config, f"{name} {options.attention.upper()}-{options.gpus}", options, hardware)]
        with suppress(ConfigError):  # a comparison that was not asked for
            cases.append(model_case(config, f"{name} {other.attention.upper()}-{options.gpus}", other, hardware))
    if options.yardstick is not None:
        cases.append(yardstick_case(options, hardware))
    return cases


def fitted(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> ServeOptions:
    """Return the options with traffic and utilisation fitted to the published throughput.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.

    Returns:
        The options with ``prompt_tokens``, ``output_tokens`` and ``utilisation`` replaced.

    Raises:
        ConfigError: there is no yardstick to fit with, or nothing reaches the published rates.
    """

    def plan(traffic: Traffic, utilisation: float) -> tuple[ServePlan, ServePlan]:
        tried = options.model_copy(update={"prompt_tokens": traffic.prompt, "output_tokens": traffic.output, "utilisation": utilisation})
        return model_case(config, name, tried, hardware).plan, yardstick_case(tried, hardware).plan

    if options.yardstick is None:
        raise ConfigError("fit = true fits a model of V2's shape and DeepSeek 67B together", hint="use the preset v2")
    if (hardware.name, options.gpus) != PUBLISHED_ON:
        raise ConfigError(
            f"fit = true needs the published 8 x H800, not {options.gpus} x {hardware.name}", hint="leave hardware and gpus out"
        )
    best = fit_traffic(plan)
    if best is None:
        raise ConfigError(
            "no traffic and utilisation give > 50K generated and > 100K prompt tokens/s on this layout", hint="use attention=dp on 8 H800"
        )
    found = {"prompt_tokens": best.traffic.prompt, "output_tokens": best.traffic.output, "utilisation": best.utilisation}
    return options.model_copy(update=found)


def ranked(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware, stated: Set[str]) -> list[ServePlan]:
    """Return the layouts that fit, cheapest per generated token first, reading prompts counted.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.
        stated: options that keep their value.

    Returns:
        At least one plan.

    Raises:
        ConfigError: none fits.
    """
    sizes = [options.gpus] if "gpus" in stated else [1, 2, 4, 8, 16, 32]
    kinds = [options.attention] if "attention" in stated else ["dp", "tp"]
    plans = []
    for gpus in sizes:
        for kind in kinds if gpus > 1 else kinds[:1]:
            tried = options.model_copy(update={"gpus": gpus, "attention": kind})
            try:
                plans.append(model_case(config, name, tried, hardware).plan)
            except ConfigError:
                continue
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ConfigError(
            f"{name} does not fit on {' or '.join(map(str, sizes))} x {hardware.name}: its weights alone are"
            f" {gb(served_model(config, name).parameters * options.weight_bits / 8)} GB, a GPU has {gb(hardware.memory_bytes)} GB",
            hint="use more gpus, fewer weight_bits or other hardware",
        )
    return sorted(fitting, key=lambda plan: plan.dollars_per_million(plan.mixed_per_second))


def what_if(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> list[tuple[str, float, float, float]]:
    """Return the sensitivity.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.

    Returns:
        Rows (change, the model's generated, DeepSeek 67B's, the model's prompt tokens/s).
    """
    o, stick = options, options.yardstick or YardstickOptions()
    changes: list[tuple[str, dict[str, Any]]] = [
        ("as planned", {}),
        ("prompts and answers x 2", {"prompt_tokens": 2 * o.prompt_tokens, "output_tokens": 2 * o.output_tokens}),
        ("prompts and answers / 2", {"prompt_tokens": o.prompt_tokens / 2, "output_tokens": o.output_tokens / 2}),
        ("utilisation + 20 %", {"utilisation": min(1.0, 1.2 * o.utilisation)}),
        ("utilisation - 20 %", {"utilisation": 0.8 * o.utilisation}),
        ("no overlap", {"overlap": not o.overlap}),
        ("at most 1,024 requests", {"batch": 1024}),
        ("cache of 8 bits", {"cache_bits": 8}),
        ("cache of 16 bits", {"cache_bits": 16}),
        ("FP8 weights, bf16 products", {"compute_bits": 16}),
        ("67B with FP8 weights and products", {"yardstick": stick.model_copy(update={"weight_bits": 8})}),
        ("67B with a 6-bit cache as well", {"yardstick": stick.model_copy(update={"weight_bits": 8, "cache_bits": 6})}),
        ("67B as two TP-4 replicas", {"yardstick": stick.model_copy(update={"gpus": max(1, o.gpus // 2)})}),
        ("no memory reserved", {"reserve_gb": 0.0}),
    ]
    rows = []
    for change, update in changes:
        changed = o.model_copy(update=update)
        ours, theirs = model_case(config, name, changed, hardware), yardstick_case(changed, hardware)
        if ours.plan.fits and theirs.plan.fits:
            rows.append((change, ours.generated, theirs.generated, ours.prompts))
    return rows
