"""Small good folders to convert, damage and compare."""

from pathlib import Path
from typing import Any

import torch

from dsv2.checkpoint.huggingface import write_model
from dsv2.checkpoint.manifest import write_manifest
from dsv2.checkpoint.source import Converted, ModelSource, Source
from dsv2.model.transformer import Transformer
from reference.subject import our_model
from reference.tiny import CONFIGS, random_state


def tiny_model(name: str = "v2", seed: int = 0) -> Transformer:
    config = CONFIGS[name]
    return our_model(random_state(config, seed), config, torch.float32)


def tiny_source(name: str = "v2", dtype: torch.dtype = torch.float32, seed: int = 0) -> Source:
    return Converted(ModelSource(tiny_model(name, seed)), dtype)


def write_tiny(folder: Path, name: str = "v2", dtype: torch.dtype = torch.float32, *, manifest: bool = False, **options: Any) -> Path:
    folder.mkdir(parents=True)
    write_model(folder, tiny_source(name, dtype), **options)
    if manifest:
        write_manifest(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
