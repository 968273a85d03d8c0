"""From what names a model to what the engine runs, and to how its authors sample from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from dsv2.checkpoint.generation import sampling_defaults
from dsv2.checkpoint.huggingface import fitting_dtype, load_model
from dsv2.checkpoint.manifest import MANIFEST
from dsv2.engine.native import StackWeights
from dsv2.engine.request import SamplingParams
from dsv2.engine.settings import Backend, CacheKind
from dsv2.engine.weights import load_packed, packed_scheme
from dsv2.errors import CheckpointError, ConfigError
from dsv2.model.transformer import Transformer
from dsv2.progress import say

Dtype = Literal["auto", "fp32", "bf16", "int8"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class EngineSettings(TypedDict, total=False):
    """The settings of ``Engine``, for those who hand them on."""

    max_batch: int
    max_len: int | None
    cache: CacheKind
    cache_gb: float | None
    threads: int | None
    backend: Backend
    reuse: bool
    disk_cache: Path | None
    disk_cache_gb: float
    weights_id: str | None
    speculate: bool
    max_step_s: float


def open_weights(folder: Path, dtype: Dtype = "auto", *, verify: bool = False) -> Transformer | StackWeights:
    """Load a model folder for the engine: a packed one as it is, any other in ``dtype``.

    Args:
        folder: of the model.
        dtype: of the weights in memory.
        verify: compare the files' hashes with those of the folder's manifest; a folder that is not packed is compared whenever it has one.

    Raises:
        ConfigError: a dtype is asked of a packed model, or it is unknown.
        CheckpointError: the folder is not a whole model, or there are no hashes to verify.
    """
    if verify and not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} has no {MANIFEST} to verify its files by", hint="dsv2 convert and dsv2 quantize write one")
    if packed_scheme(folder) is not None:
        if dtype != "auto":
            raise ConfigError(f"{folder} is packed; dtype = {dtype} cannot change its weights", hint="pack the model again: dsv2 quantize")
        return load_packed(folder, verify=verify)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not one of: auto, {', '.join(_DTYPES)}")
    chosen = fitting_dtype(folder) if dtype == "auto" else _DTYPES[dtype]
    if dtype == "auto" and chosen == torch.int8:
        say("the model is held in int8, computed by torch: it fits in no wider dtype; dsv2 quantize makes a packed one, which is faster")
    return load_model(folder, dtype=chosen)


def sampling_of(folder: Path, given: Mapping[str, Any]) -> SamplingParams:
    """Take what is given (None: nothing), then what the folder's generation_config.json says, then the defaults; say what the file decided.

    Raises:
        RequestError: a value is out of its range.
        CheckpointError: the file is damaged.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    suggested = {name: value for name, value in sampling_defaults(folder).items() if name not in chosen}
    if suggested:
        say(", ".join(f"{name} {value:g}" for name, value in suggested.items()) + " (generation_config.json)")
    return SamplingParams(**(suggested | chosen))
