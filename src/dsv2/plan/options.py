"""What can be asked of the planner: KEY=VALUE on the command line, defaults in ``recipes/plan-train`` and ``recipes/plan-serve``."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from dsv2.config import Section, load_recipe, parse_override, recipe_names
from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.parallel.schedules import Schedule
from dsv2.presets import PRESETS, preset, same_shape

EFFICIENCY = 0.3204  # with it the published layout costs the published 172.8K GPU-hours
MANY = 10**10  # of anything that is counted: far beyond every machine, and far from what a float cannot hold
PROMPT, OUTPUT = 1850, 925  # tokens, as fitted for V2; a model with a shorter context gets two thirds and one third of that

CODERS = tuple(name for name in PRESETS if name.startswith("coder-v2"))


class TrainOptions(Section):
    """How to train. What is left out is searched."""

    hardware: str = Field(default="h800", description="h800, h200, h100, a100, cpu, or a TOML file of rates")
    gpus: int | None = Field(default=None, gt=0, le=MANY, description="pp * ep * dp; decides dp where pp and ep are given")
    pp: int | None = Field(default=None, gt=0, le=MANY, description="pipeline stages")
    ep: int | None = Field(default=None, gt=0, le=MANY, description="ranks that share the routed experts of a stage")
    dp: int | None = Field(default=None, gt=0, le=MANY, description="copies of each routed expert; other weights have ep * dp")
    schedule: Schedule | None = Field(default=None, description="of the pipeline: 1f1b, interleaved, zb-h1, zb-h2")
    chunks: int | None = Field(default=None, gt=0, le=MANY, description="model chunks per rank of the interleaved schedule")
    zero: int | None = Field(default=None, ge=0, le=3, description="sharded over copies: 1 optimiser, 2 and gradients, 3 and weights")
    recompute: Literal["none", "selective", "full"] | None = Field(default=None, description="what the backward computes again")
    micro_batch: int | None = Field(default=None, gt=0, le=MANY, description="sequences in one forward")
    batch: int = Field(default=1024, gt=0, le=MANY, description="sequences in one step, all ranks together")
    seq_len: int | None = Field(default=None, gt=0, description="tokens of a sequence; left out: 4096, or the model's context if shorter")
    tokens: float | None = Field(default=None, ge=1, le=1e18, description="to train on; left out: 20 per activated parameter")
    kernel_efficiency: float = Field(
        default=EFFICIENCY, ge=1e-4, le=1, description="share of the bf16 peak that kernels reach while they run"
    )
    reserve_gb: float = Field(default=4.0, ge=0, le=1e6, description="GB per GPU left to the CUDA context, NCCL and fragmentation")
    measured_gpu_hours: float | None = Field(
        default=None, ge=1e-6, le=1e15, description="measured GPU-hours per 1e12 tokens, to be turned into MFU"
    )
    yardstick_gpu_hours: float | None = Field(default=None, ge=1e-6, le=1e15, description="the same of DeepSeek 67B, to compare with")


class YardstickOptions(Section):
    """How DeepSeek 67B is served beside the model."""

    weight_bits: float = Field(default=16, ge=1, le=16, description="bits per weight; at 8 products run in fp8 where the GPU has it")
    cache_bits: float = Field(default=16, ge=1, le=16, description="bits per cached number")
    gpus: int | None = Field(
        default=None, gt=0, le=MANY, description="GPUs of one tensor-parallel replica, a divisor of gpus; left out: at most a node"
    )


class ServeOptions(Section):
    """How to serve, and to whom."""

    hardware: str = Field(default="h800", description="h800, h200, h100, a100, cpu, or a TOML file of rates")
    gpus: int = Field(default=8, gt=0, le=MANY, description="that hold the model together")
    attention: Literal["dp", "tp"] = Field(default="dp", description="dp: cache partitioned, experts spread; tp: all matrices cut")
    weight_bits: float = Field(default=16, ge=1, le=16, description="bits per weight; at 8 products run in fp8 where the GPU has it")
    cache_bits: float = Field(default=16, ge=1, le=16, description="bits per cached number, on average")
    compute_bits: Literal[8, 16] | None = Field(
        default=None, description="format of the products; left out: 8 with 8-bit weights where the GPU has fp8, else 16"
    )
    prompt_tokens: float = Field(default=PROMPT, ge=1, le=MANY, description="mean length of a prompt; less if the context is shorter")
    output_tokens: float = Field(default=OUTPUT, ge=1, le=MANY, description="mean length of an answer; less if the context is shorter")
    utilisation: float = Field(default=0.42, ge=1e-4, le=1, description="share of the roofline that is reached, the same for all models")
    overlap: bool = Field(default=True, description="compute, memory and links work at the same time; false: one after the other")
    reserve_gb: float = Field(default=4.0, ge=0, le=1e6, description="GB per GPU for activations and the CUDA context")
    batch: int | None = Field(default=None, gt=0, le=MANY, description="most requests at once; left out: as many as the cache holds")
    fit: bool = Field(default=False, description="fit prompt_tokens, output_tokens and utilisation to the published throughput")
    yardstick: YardstickOptions | None = Field(default=None, description="serve DeepSeek 67B beside it; true or false turns that on or off")

    @field_validator("yardstick", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return value if not isinstance(value, bool) else YardstickOptions() if value else None


def recipe_for(config: ModelConfig, folder: str) -> str:
    """Return the shipped recipe for a model: that of the preset that costs the same to run, else "default".

    Args:
        config: the model.
        folder: below ``recipes/``.

    Returns:
        A name for ``load_recipe``.
    """
    for name in recipe_names(folder):
        if name in PRESETS and same_shape(preset(name), config, positions=False):
            return name
    return "default"


def read_train(config: ModelConfig, overrides: Sequence[str]) -> TrainOptions:
    """Read the options of training.

    Args:
        config: the model, which decides the recipe and ``seq_len``.
        overrides: KEY=VALUE.

    Returns:
        The options, ``seq_len`` set.

    Raises:
        ConfigError: an unknown key (the nearest is named), a wrong value, or sequences longer than the model's context.
    """
    options = load_recipe(recipe_for(config, "plan-train"), TrainOptions, folder="plan-train", overrides=overrides)
    limit = config.max_position_embeddings
    seq_len = options.seq_len or min(4096, limit)
    if seq_len > limit:
        raise ConfigError(
            f"seq_len = {seq_len} exceeds the model's context: max_position_embeddings = {limit}", hint=f"use seq_len={limit} or less"
        )
    return options.model_copy(update={"seq_len": seq_len})


def read_serve(config: ModelConfig, overrides: Sequence[str]) -> ServeOptions:
    """Read the options of serving.

    Args:
        config: the model, which decides the recipe, and the traffic where its context is too short for the recipe's.
        overrides: KEY=VALUE.

    Returns:
        The options; a length that was not stated is at most two thirds (prompt) or one third (answer) of the context, and what is left.

    Raises:
        ConfigError: an unknown key (the nearest is named), a wrong value, or requests longer than the model's context.
    """
    options = load_recipe(recipe_for(config, "plan-serve"), ServeOptions, folder="plan-serve", overrides=overrides)
    limit, typed = config.max_position_embeddings, keys_of(overrides)
    prompt, output = options.prompt_tokens, options.output_tokens
    if "prompt_tokens" not in typed:
        prompt = min(prompt, max(1, 2 * limit // 3))
        if "output_tokens" in typed:
            prompt = min(prompt, max(1, limit - output))
    if "output_tokens" not in typed:
        output = min(output, max(1, limit // 3), max(1, limit - prompt))
    if prompt + output > limit:
        raise ConfigError(
            f"prompt_tokens + output_tokens = {prompt:.12g} + {output:.12g} exceed the model's context: max_position_embeddings = {limit}",
            hint=f"use {limit} tokens or less in all",
        )
    return options.model_copy(update={"prompt_tokens": prompt, "output_tokens": output})


def keys_of(overrides: Sequence[str]) -> set[str]:
    """Return which options were stated.

    Args:
        overrides: KEY=VALUE.

    Returns:
        The first part of each key.
    """
    return {parse_override(override)[0][0] for override in overrides}
