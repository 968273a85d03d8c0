"""What is set side by side: the model as asked, with the other attention, DeepSeek 67B. Fits and rankings are made of these."""

from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, replace
from math import gcd

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.parallel.fit import fit_traffic
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.served import served_dense, served_model
from dsv2.parallel.serving import ServeLayout, ServePlan, Traffic, plan_serving
from dsv2.plan.options import ServeOptions, YardstickOptions, recipe_for
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


def is_published(config: ModelConfig, options: ServeOptions, hardware: Hardware) -> bool:
    """Tell whether the published throughput is that of this model on these GPUs.

    Args:
        config: the model.
        options: their gpus.
        hardware: where.
    """
    return (hardware.name, options.gpus) == PUBLISHED_ON and recipe_for(config, "plan-serve") == "v2"


def _products(weight_bits: float, hardware: Hardware) -> int:
    """Bits of the products' format where nobody states it."""
    return 8 if weight_bits == 8 and hardware.fp8_flops else 16


def layout_of(options: ServeOptions, hardware: Hardware) -> ServeLayout:
    """Return the layout that the options state.

    Args:
        options: what was asked.
        hardware: where.

    Returns:
        A layout that need not divide.

    Raises:
        ConfigError: products in 8 bits are asked of a GPU without fp8.
    """
    if options.compute_bits == 8 and not hardware.fp8_flops:
        raise ConfigError(f"compute_bits = 8, but {hardware.name} has no fp8 products", hint="use compute_bits=16 or other hardware")
    return ServeLayout(
        options.gpus, options.attention, options.weight_bits, options.cache_bits,
        options.compute_bits or _products(options.weight_bits, hardware), options.utilisation, options.overlap, options.reserve_gb * 1e9,
        options.batch,
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
        A column, named by its layout.

    Raises:
        ConfigError: heads or experts do not divide.
    """
    plan = plan_serving(served_model(config, name), layout_of(options, hardware), traffic_of(options), hardware)
    return Case(f"{options.attention.upper()}-{options.gpus}" if options.gpus > 1 else "1 GPU", plan)


def _yardstick(options: ServeOptions, stick: YardstickOptions, gpus: int, hardware: Hardware) -> ServePlan:
    layout = replace(
        layout_of(options, hardware), gpus=gpus, attention="tp", weight_bits=stick.weight_bits, cache_bits=stick.cache_bits,
        compute_bits=_products(stick.weight_bits, hardware),
    )  # fmt: skip
    return plan_serving(served_dense(DEEPSEEK_67B, "DeepSeek 67B"), layout, traffic_of(options), hardware)


def with_yardstick_gpus(options: ServeOptions, hardware: Hardware) -> ServeOptions:
    """Decide how many GPUs one replica of DeepSeek 67B has, where there is one and nobody stated it.

    Args:
        options: their ``yardstick``.
        hardware: where.

    Returns:
        The options with ``yardstick.gpus``: of the numbers that divide both the GPUs and its heads the largest within a node on which it
        fits, else the smallest beyond; where it fits on none the largest within a node.
    """
    stick = options.yardstick
    if stick is None or stick.gpus is not None:
        return options
    shared = gcd(options.gpus, DEEPSEEK_67B.num_attention_heads)
    sizes = [size for size in range(1, shared + 1) if shared % size == 0]
    inside = [size for size in reversed(sizes) if size <= hardware.gpus_per_node]
    order = inside + [size for size in sizes if size > hardware.gpus_per_node]
    gpus = next((size for size in order if _yardstick(options, stick, size, hardware).fits), order[0])
    return options.model_copy(update={"yardstick": stick.model_copy(update={"gpus": gpus})})


def yardstick_case(options: ServeOptions, hardware: Hardware) -> Case:
    """Plan DeepSeek 67B on the same number of GPUs: replicas with tensor parallelism.

    Args:
        options: their ``yardstick``, traffic and utilisation.
        hardware: where.

    Returns:
        A column.

    Raises:
        ConfigError: its replicas do not divide the GPUs, or its heads by theirs.
    """
    stick = with_yardstick_gpus(options, hardware).yardstick or YardstickOptions(gpus=1)
    gpus = stick.gpus or 1
    if options.gpus % gpus:
        raise ConfigError(f"yardstick.gpus = {gpus} does not divide gpus = {options.gpus}", hint="use a divisor, or yardstick=false")
    try:
        plan = _yardstick(options, stick, gpus, hardware)
    except ConfigError as error:
        raise ConfigError(error.message, hint="use another yardstick.gpus, or yardstick=false") from error
    replicas, name = options.gpus // gpus, f"67B TP-{gpus}" if gpus > 1 else "67B"
    return Case(f"{replicas} x {name}" if replicas > 1 else name, plan, replicas)


def cases_of(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware) -> list[Case]:
    """Return the columns: the model as asked, with the other attention where that divides, DeepSeek 67B where it is wanted.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.

    Returns:
        At least one; the yardstick last.

    Raises:
        ConfigError: heads or experts do not divide.
    """
    cases = [model_case(config, name, options, hardware)]
    if options.gpus > 1:
        other = options.model_copy(update={"attention": "tp" if options.attention == "dp" else "dp"})
        with suppress(ConfigError):  # a comparison that was not asked for
            cases.append(model_case(config, name, other, hardware))
    if options.yardstick is not None:
        cases.append(yardstick_case(options, hardware))
    return cases


def does_not_fit(plan: ServePlan) -> ConfigError:
    """Return the error for a layout whose memory does not suffice.

    Args:
        plan: one that does not fit.

    Returns:
        What is needed and what there is.
    """
    reserved = plan.layout.gpus * plan.layout.reserve_bytes
    left = plan.memory_bytes - plan.weight_bytes - reserved
    taken = f"does not fit: weights {gb(plan.weight_bytes)} GB and {gb(reserved)} GB reserved"
    if left <= 0:
        message = f"{taken} exceed the {gb(plan.memory_bytes)} GB of {plan.layout.label.partition(',')[0]}"
    else:
        single = plan.layout.attention == "dp" and plan.layout.gpus > 1
        place = f", {gb(plan.room)} GB on a GPU" if single else ""
        need = gb(plan.traffic.resident * plan.cache_token_bytes)
        message = f"{taken} leave {gb(left)} of {gb(plan.memory_bytes)} GB{place}; one request needs {need} GB"
    return ConfigError(message, hint="use more gpus, attention=tp, fewer weight_bits or other hardware")


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
        ConfigError: it is another model, other hardware or without a yardstick, or nothing reaches the published rates.
    """

    def plan(traffic: Traffic, utilisation: float) -> tuple[ServePlan, ServePlan]:
        tried = options.model_copy(update={"prompt_tokens": traffic.prompt, "output_tokens": traffic.output, "utilisation": utilisation})
        return model_case(config, name, tried, hardware).plan, yardstick_case(tried, hardware).plan

    if options.yardstick is None or recipe_for(config, "plan-serve") != "v2":
        raise ConfigError("fit = true fits a model of V2's shape and DeepSeek 67B together", hint="use the preset v2 with its yardstick")
    if not is_published(config, options, hardware):
        raise ConfigError(
            f"fit = true needs the published 8 x H800, not {options.gpus} x {hardware.name}", hint="leave hardware and gpus out"
        )
    best = fit_traffic(plan, longest=min(8000, 2 * config.max_position_embeddings // 3))
    if best is None:
        raise ConfigError(
            "no traffic and utilisation give > 50K generated and > 100K prompt tokens/s on this layout", hint="use attention=dp on 8 H800"
        )
    found = {"prompt_tokens": best.traffic.prompt, "output_tokens": best.traffic.output, "utilisation": best.utilisation}
    return options.model_copy(update=found)


def ranked(config: ModelConfig, name: str, options: ServeOptions, hardware: Hardware, stated: Set[str]) -> list[ServePlan]:
    """Return the layouts that fit, fewest GPU-seconds per generated token first, reading prompts counted.

    Args:
        config: the model.
        name: what it was called.
        options: layout and traffic.
        hardware: where.
        stated: options that keep their value.

    Returns:
        At least one plan.

    Raises:
        ConfigError: none divides, or none fits.
    """
    sizes = [options.gpus] if "gpus" in stated else [1, 2, 4, 8, 16, 32]
    kinds = [options.attention] if "attention" in stated else ["dp", "tp"]
    plans, refused = [], None
    for gpus in sizes:
        for kind in kinds if gpus > 1 else kinds[:1]:
            tried = options.model_copy(update={"gpus": gpus, "attention": kind})
            try:
                plans.append(model_case(config, name, tried, hardware).plan)
            except ConfigError as error:
                refused = error
    if refused is not None and not plans:
        raise refused
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        nearest = max(plans, key=lambda plan: plan.capacity_tokens / plan.cache_copies)
        on = f"{name} on {' or '.join(map(str, sizes))} x {hardware.name}, nearest {nearest.layout.label}"
        raise ConfigError(f"{on}: {does_not_fit(nearest).message}", hint="use more gpus, fewer weight_bits or other hardware")
    return sorted(fitting, key=lambda plan: -plan.mixed_per_second / plan.layout.gpus)
