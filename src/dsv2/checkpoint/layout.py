"""What a checkpoint folder holds, and how it comes to be whole or not at all.

    RUN/step-400/
      config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json     as published models have them
      training/    optimizer.safetensors  state.json                                                    read only to resume our own runs
      adapter/     adapter.safetensors                                                                  with LoRA, beside the merged weights
      manifest.json                                                                                     format, hashes; written last

The folder is filled under a hidden name, synced and renamed, so ``step-400`` either exists completely or does not exist. No file in it is
pickled and nothing in it is executed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2.checkpoint.folder import open_folder, read_json
from dsv2.checkpoint.generation import write_generation_config
from dsv2.checkpoint.huggingface import fill_model, write_model
from dsv2.checkpoint.manifest import write_manifest
from dsv2.checkpoint.source import FolderSource, ModelSource, load_tensors, save_tensors
from dsv2.errors import CheckpointError
from dsv2.files import atomic_folder, atomic_write_json
from dsv2.model.lora import adapter_tensors, is_adapted, merged
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

ADAPTER = Path("adapter/adapter.safetensors")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a run needs beside the weights to go on as if it had never stopped.

    No state of a random generator is among it: initial weights and data order are functions of the recipe's seed, and a step draws nothing.

    Args:
        step: optimiser steps done.
        consumed_samples: rows taken from the loader: its whole state.
        elapsed_s: training seconds so far, over all resumes.
        optimizer: moments by ``parameter name + "." + moment``.
        guard: JSON values of the guard against loss spikes; empty without one.
        num_tokens: of the rollouts so far, where a run draws any.
    """

    step: int
    consumed_samples: int
    elapsed_s: float
    optimizer: Mapping[str, Tensor]
    guard: Mapping[str, Any] = field(default_factory=dict)
    num_tokens: int = 0


def save_checkpoint(folder: Path, model: Transformer, tokenizer: Tokenizer, *, training: TrainingState | None = None) -> None:
    """Write a complete checkpoint folder, or nothing; a model with adapters is written merged, and the adapters beside it.

    Raises:
        DataError: the disk is full or may not be written.
    """
    with atomic_folder(folder) as new:
        with merged(model):
            write_model(new, ModelSource(model))
        if is_adapted(model):
            (new / ADAPTER).parent.mkdir()
            save_tensors(new / ADAPTER, adapter_tensors(model))
        if model.head == "lm_head":
            write_generation_config(new, model.config)
        tokenizer.save(new)
        if training is not None:
            _save_training(new / "training", training)
        write_manifest(new)


def load_weights(folder: Path, model: Transformer) -> None:
    """Fill a model from a checkpoint of its own run: all weights, or the adapters of a model that has them, whose weights stay.

    Raises:
        CheckpointError: the checkpoint is of another model, or of other adapters.
    """
    if not is_adapted(model):
        fill_model(model, FolderSource(open_folder(folder, model.head)))
        return
    saved, own = load_tensors(folder / ADAPTER), adapter_tensors(model)
    for name in saved.keys() | own.keys():
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise CheckpointError(f"{folder / ADAPTER} is of other adapters than this run's: {name}")
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)


def _save_training(folder: Path, training: TrainingState) -> None:
    folder.mkdir()
    save_tensors(folder / "optimizer.safetensors", training.optimizer)
    state = {"step": training.step, "consumed_samples": training.consumed_samples, "elapsed_s": training.elapsed_s}
    state |= {"num_tokens": training.num_tokens} if training.num_tokens else {}
    atomic_write_json(folder / "state.json", state | ({"guard": dict(training.guard)} if training.guard else {}))


def load_training(folder: Path) -> TrainingState:
    """Load what ``save_checkpoint`` stored to resume a run.

    Raises:
        CheckpointError: the folder is not a run's own checkpoint, or is damaged.
    """
    state = _read_state(folder)
    optimizer = load_tensors(folder / "training" / "optimizer.safetensors")
    guard, num_tokens = state.get("guard", {}), state.get("num_tokens", 0)
    return TrainingState(state["step"], state["consumed_samples"], state["elapsed_s"], optimizer, guard, num_tokens)


def load_guard(folder: Path) -> Mapping[str, Any]:
    """Load what the guard against loss spikes knew, without the moments.

    Raises:
        CheckpointError: the folder is not a run's own checkpoint, or is damaged.
    """
    guard: Mapping[str, Any] = _read_state(folder).get("guard", {})
    return guard


def _read_state(folder: Path) -> dict[str, Any]:
    state = read_json(folder / "training" / "state.json")
    for name in ("step", "consumed_samples", "elapsed_s"):
        if isinstance(state.get(name), bool) or not isinstance(state.get(name), int | float):
            raise CheckpointError(f"{folder / 'training' / 'state.json'} is damaged: {name} must be a number")
    if not isinstance(state.get("guard", {}), dict):
        raise CheckpointError(f"{folder / 'training' / 'state.json'} is damaged: guard must be an object")
    return state
