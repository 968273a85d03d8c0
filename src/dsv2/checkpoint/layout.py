"""What a checkpoint folder holds, and how it comes to be whole or not at all.

    RUN/step-400/
      config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json     as published models have them
      training/    optimizer.safetensors  state.json                                                    read only to resume our own runs
      manifest.json                                                                                     format, hashes; written last

The folder is filled under a hidden name, synced and renamed, so ``step-400`` either exists completely or does not exist. No file in it is
pickled and nothing in it is executed.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv2.checkpoint.huggingface import copy_published, to_huggingface
from dsv2.errors import CheckpointError
from dsv2.files import atomic_folder, atomic_write_json, sha256_of
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

FORMAT, VERSION = "dsv2-checkpoint", 1
_STEP = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a run needs beside the weights to go on as if it had never stopped.

    Args:
        step: optimiser steps done.
        consumed_samples: rows taken from the loader: its whole state.
        elapsed_s: training seconds so far, over all resumes.
        optimizer: moments by ``parameter name + "." + moment``.
    """

    step: int
    consumed_samples: int
    elapsed_s: float
    optimizer: Mapping[str, Tensor]


def save_checkpoint(folder: Path, model: Transformer, tokenizer: Tokenizer, *, training: TrainingState | None = None) -> None:
    """Write a complete checkpoint folder, or nothing.

    Raises:
        DataError: the disk is full or may not be written.
    """
    with atomic_folder(folder) as new:
        config = model.config
        atomic_write_json(new / "config.json", config.to_dict())
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": True}
        atomic_write_json(new / "generation_config.json", generation | {"temperature": 0.3, "top_p": 0.95})
        published = to_huggingface(dict(model.state_dict()), config)
        save_file({name: value.contiguous() for name, value in published.items()}, new / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(new)
        if training is not None:
            _save_training(new / "training", training)
        hashes = {str(file.relative_to(new)): sha256_of(file) for file in sorted(new.rglob("*")) if file.is_file()}
        atomic_write_json(new / _MANIFEST, {"format": FORMAT, "version": VERSION, "files": hashes})


def _save_training(folder: Path, training: TrainingState) -> None:
    folder.mkdir()
    save_file(dict(training.optimizer), folder / "optimizer.safetensors")
    state = {"step": training.step, "consumed_samples": training.consumed_samples, "elapsed_s": training.elapsed_s}
    atomic_write_json(folder / "state.json", state)


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """Load a checkpoint folder's model, weights streamed tensor by tensor.

    Args:
        folder: holds config.json and one or more .safetensors files.
        dtype: of the weights in memory; None: fp32.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape.
    """
    folder = Path(folder)
    config = ModelConfig.from_dict(_read_json(folder / "config.json"), source=str(folder / "config.json"))
    model = Transformer(config).to(dtype or torch.float32)
    state = dict(model.state_dict())
    missing = set(to_huggingface(state, config))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    for file in files:
        for name, value in _tensors(file):
            missing.discard(copy_published(name, value, state))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of its config, the first is {min(missing)!r}")
    return model.eval()


def _tensors(file: Path) -> Any:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}", hint="use an earlier step folder, or copy the file again") from error


def load_training(folder: Path) -> TrainingState:
    """Load what ``save_checkpoint`` stored to resume a run.

    Raises:
        CheckpointError: the folder is not a run's own checkpoint, or is damaged.
    """
    state = _read_json(folder / "training" / "state.json")
    optimizer = dict(_tensors(folder / "training" / "optimizer.safetensors"))
    return TrainingState(state["step"], state["consumed_samples"], state["elapsed_s"], optimizer)


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest's hashes.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    manifest = _read_json(folder / _MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{folder / _MANIFEST}: format {manifest.get('format')!r} version {manifest.get('version')!r} is not {FORMAT!r} {VERSION}"
        )
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: it lists no files")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        found = sha256_of(file)
        if found != expected:
            raise CheckpointError(
                f"{file} is damaged: its hash is {found[:12]}, the manifest says {expected[:12]}",
                hint="delete this step folder; an earlier one resumes",
            )


def checkpoints(run: Path) -> list[Path]:
    """Return a run's complete step folders, oldest first."""
    found = [
        (int(match.group(1)), path) for path in run.glob("step-*") if (match := _STEP.fullmatch(path.name)) and (path / _MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that ``path`` means: itself, a run's newest step, or the newest step of a tour.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    for run in (path, path / "pretrain"):
        steps = checkpoints(run)
        if steps:
            return steps[-1]
    raise CheckpointError(
        f"{path} holds no checkpoint: neither config.json nor a complete step-N folder",
        hint="make one with `dsv2 tour --out DIR` or `dsv2 pretrain`",
    )


def remove_old(run: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete step folders, and what a killed process left half deleted; nothing else."""
    for path in checkpoints(run)[:-keep]:
        path.rename(run / f".{path.name}.old")  # first, so that a half-deleted folder never counts as complete
    for path in run.glob(".step-*.old"):
        shutil.rmtree(path)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: a JSON object was expected, found {type(value).__name__}")
    return value
