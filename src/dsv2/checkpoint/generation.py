"""generation_config.json: how a model's authors sample from it. Without torch."""

import reprlib
from pathlib import Path
from typing import Any

from dsv2.checkpoint.folder import read_json
from dsv2.errors import CheckpointError
from dsv2.files import atomic_write_json
from dsv2.model.config import ModelConfig

_FILE = "generation_config.json"
_LARGEST = 1e9  # no temperature, share or count of tokens is near it
_V2 = {"do_sample": True, "temperature": 0.3, "top_p": 0.95}  # spec 1.1


def write_generation_config(folder: Path, config: ModelConfig) -> None:
    """Write the file as V2 has it."""
    atomic_write_json(folder / _FILE, {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id} | _V2)


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return the temperature, top_k and top_p that a folder asks for, as far as it does; ``do_sample`` false means temperature 0.

    Raises:
        CheckpointError: the file is damaged, or a value is no number.
    """
    if not (folder / _FILE).exists():
        return {}
    settings = read_json(folder / _FILE)
    found = {name: settings[name] for name in ("temperature", "top_k", "top_p") if settings.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            raise CheckpointError(f"{folder / _FILE}: {name} = {reprlib.repr(value)} must be a number")
    return found if settings.get("do_sample", True) else {"temperature": 0}
