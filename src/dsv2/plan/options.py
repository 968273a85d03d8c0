"""What can be asked of the planner: KEY=VALUE on the command line, defaults in ``recipes/plan-train`` and ``recipes/plan-serve``."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from dsv2.config import Section, load_recipe, parse_override, recipe_names
from dsv2.model.config import ModelConfig
from dsv2.parallel.schedules import Schedule
from dsv2.presets import PRESETS, preset

EFFICIENCY = 0.324  # with it the published layout costs the published 172.8K GPU-hours


class TrainOptions(Section):
    """How to train. What is left out is searched."""

    hardware: str = Field(default="h800", description="h800, h200, h100, a100, cpu, or a TOML file of rates")
    gpus: int | None = Field(default=None, gt=0, description="pp * ep * dp; decides dp where pp and ep are given")
    pp: int | None = Field(default=None, gt=0, description="pipeline stages")
    ep: int | None = Field(default=None, gt=0, description="ranks that share the routed experts of a stage")
    dp: int | None = Field(default=None, gt=0, description="copies of each routed expert; other weights have ep * dp")
    schedule: Schedule | None = Field(default=None, description="of the pipeline: 1f1b, interleaved, zb-h1, zb-h2")
    chunks: int | None = Field(default=None, gt=0, description="model chunks per rank of the interleaved schedule")
    zero: int | None = Field(default=None, ge=0, le=3, description="sharded over copies: 1 optimiser, 2 and gradients, 3 and weights")
    recompute: Literal["none", "selective", "full"] | None = Field(default=None, description="what the backward computes again")
    micro_batch: int | None = Field(default=None, gt=0, description="sequences in one forward")
    batch: int = Field(default=1024, gt=0, description="sequences in one step, all ranks together")
    seq_len: int | None = Field(default=None, gt=0, description="tokens of a sequence; left out: 4096, or the model's context if shorter")
    tokens: float | None = Field(default=None, gt=0, description="to train on; left out: 20 per activated parameter")
    kernel_efficiency: float = Field(default=EFFICIENCY, gt=0, le=1, description="share of the bf16 peak that kernels reach while they run")
    reserve_gb: float = Field(default=4.0, ge=0, description="GB per GPU left to the CUDA context, NCCL and fragmentation")
    measured_gpu_hours: float | None = Field(default=None, gt=0, description="measured GPU-hours per 1e12 tokens, to be turned into MFU")
    yardstick_gpu_hours: float | None = Field(default=None, gt=0, description="the same of DeepSeek 67B, to compare with")


class YardstickOptions(Section):
    """How DeepSeek 67B is served beside the model."""

    weight_bits: float = Field(default=16, gt=0, le=16, description="bits per weight; at 8 products run in fp8")
    cache_bits: float = Field(default=16, gt=0, le=16, description="bits per cached number")
    gpus: int | None = Field(default=None, gt=0, description="GPUs of one tensor-parallel replica; as many replicas as there are GPUs for")


class ServeOptions(Section):
    """How to serve, and to whom."""

    hardware: str = Field(default="h800", description="h800, h200, h100, a100, cpu, or a TOML file of rates")
    gpus: int = Field(default=8, gt=0, description="that hold the model together")
    attention: Literal["dp", "tp"] = Field(default="dp", description="dp: cache partitioned, experts spread; tp: all matrices cut")
    weight_bits: float = Field(default=16, gt=0, le=16, description="bits per weight; at 8 products run in fp8 where the GPU has it")
    cache_bits: float = Field(default=16, gt=0, le=16, description="bits per cached number, on average")
    compute_bits: Literal[8, 16] | None = Field(default=None, description="format of the products; left out: 8 with 8-bit weights, else 16")
    prompt_tokens: float = Field(default=1850, gt=0, description="mean length of a prompt")
    output_tokens: float = Field(default=925, gt=0, description="mean length of an answer")
    utilisation: float = Field(default=0.42, gt=0, le=1, description="share of the roofline that is reached, the same for all models")
    overlap: bool = Field(default=True, description="compute, memory and links work at the same time; false: one after the other")
    reserve_gb: float = Field(default=4.0, ge=0, description="GB per GPU for activations and the CUDA context")
    batch: int | None = Field(default=None, gt=0, description="most requests at once; left out: as many as the cache holds")
    fit: bool = Field(default=False, description="fit prompt_tokens, output_tokens and utilisation to the published throughput")
    yardstick: YardstickOptions | None = Field(default=None, description="serve DeepSeek 67B beside it")


def recipe_for(config: ModelConfig, folder: str) -> str:
    """Return the shipped recipe for a model: that of the preset whose shape it has, else "default".

    Args:
        config: the model.
        folder: below ``recipes/``.

    Returns:
        A name for ``load_recipe``.
    """
    ignored = {"rope_scaling", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}
    shape = config.model_dump(exclude=ignored)
    for name in recipe_names(folder):
        if name in PRESETS and preset(name).model_dump(exclude=ignored) == shape:
            return name
    return "default"


def read_train(config: ModelConfig, overrides: Sequence[str]) -> TrainOptions:
    """Read the options of training.

    Args:
        config: the model, which decides the recipe.
        overrides: KEY=VALUE.

    Returns:
        The options.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a wrong value.
    """
    return load_recipe(recipe_for(config, "plan-train"), TrainOptions, folder="plan-train", overrides=overrides)


def read_serve(config: ModelConfig, overrides: Sequence[str]) -> ServeOptions:
    """Read the options of serving.

    Args:
        config: the model, which decides the recipe.
        overrides: KEY=VALUE.

    Returns:
        The options.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a wrong value.
    """
    return load_recipe(recipe_for(config, "plan-serve"), ServeOptions, folder="plan-serve", overrides=overrides)


def keys_of(overrides: Sequence[str]) -> set[str]:
    """Return which options were stated.

    Args:
        overrides: KEY=VALUE.

    Returns:
        The first part of each key.
    """
    return {parse_override(override)[0][0] for override in overrides}
