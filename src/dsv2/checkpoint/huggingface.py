"""Names on disk and names in memory: published files hold experts one by one, the model holds them stacked (spec 1.3)."""

import re

import torch
from torch import Tensor

from dsv2.errors import CheckpointError
from dsv2.model.config import ModelConfig

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj")


def to_huggingface(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a model's state with the names of a published checkpoint: views of the same memory, nothing is copied."""
    published: dict[str, Tensor] = {}
    for name, value in state.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            if not (config.tie_word_embeddings and name == "lm_head.weight"):
                published[name] = value
            continue
        prefix, kind = stacked.groups()
        for expert, weight in enumerate(value.unbind(0)):
            if kind == "down":
                published[f"{prefix}.{expert}.down_proj.weight"] = weight
            else:
                gate, up = weight.chunk(2, dim=0)
                published[f"{prefix}.{expert}.gate_proj.weight"] = gate
                published[f"{prefix}.{expert}.up_proj.weight"] = up
    return published


def copy_published(name: str, value: Tensor, state: dict[str, Tensor]) -> str:
    """Copy one published tensor to its place in a model's state.

    Args:
        name: as on disk.
        value: its content, any floating dtype.
        state: the model's own tensors, written in place.

    Returns:
        The name as on disk, if it was expected.

    Raises:
        CheckpointError: the model has no such tensor, or another shape.
    """
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        target = state.get(name)
    else:
        prefix, index, kind = expert.group(1), int(expert.group(2)), expert.group(3)
        stacked = state.get(f"{prefix}.down_proj" if kind == "down" else f"{prefix}.gate_up_proj")
        target = None if stacked is None or index >= len(stacked) else stacked[index]
        if target is not None and kind != "down":
            target = target.chunk(2, dim=0)[kind == "up"]
    if target is None:
        raise CheckpointError(f"tensor {name!r} has no place in this model", hint="config.json and the weights belong to different models")
    if target.shape != value.shape:
        raise CheckpointError(f"tensor {name!r} has shape {list(value.shape)}; the config asks for {list(target.shape)}")
    with torch.no_grad():
        target.copy_(value)
    return name
