"""What a tour remembers: its plan and the legs that are done, in tour.json; which folders it may take and what it may delete."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dsv2.checkpoint.steps import TOUR
from dsv2.errors import ConfigError
from dsv2.files import atomic_write_json

VERSION = 2
FILES = ("validation.json", "samples.json", "chat.json", "report.html", "rollouts.html")  # that a tour writes beside its state
FOLDERS = ("data", "pretrain", "sft", "grpo")


def begin(out: Path, size: str, seed: int, threads: int | None, fresh: bool) -> dict[str, Any]:
    """Return the state of the tour in ``out``; save the plan if it begins now.

    Raises:
        ConfigError: ``out`` is no place for this tour; nothing in it has been touched.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; a tour needs a folder", hint="choose another --out")
    begun: dict[str, Any] = {"version": VERSION, "size": size, "seed": seed, "threads": threads or torch.get_num_threads(), "legs": {}}
    if not (out / TOUR).exists():
        if out.exists() and any(not path.name.startswith(f".{TOUR}.") for path in out.iterdir()):
            raise ConfigError(f"{out} holds other things and no tour", hint="choose a new or empty folder with --out")
        atomic_write_json(out / TOUR, begun)
        return begun
    state = read_state(out)
    if fresh or state.get("clearing"):
        # marked first: killed in between, the next start goes on deleting instead of resuming what is left
        atomic_write_json(out / TOUR, begun | {"clearing": True})
        _remove(out)
        atomic_write_json(out / TOUR, begun)
        return begun
    wanted = {"version": VERSION, "size": size, "seed": seed, "threads": threads or state["threads"]}
    changed = [f"{name} = {state.get(name)!r}, not {value!r}" for name, value in wanted.items() if state.get(name) != value]
    if changed:
        raise ConfigError(f"{out} holds a tour with {'; '.join(changed)}", hint="choose another --out, or begin again with --no-resume")
    return state


def read_state(out: Path) -> dict[str, Any]:
    """Return the state of the tour in ``out``.

    Raises:
        ConfigError: the file is damaged or something else.
    """
    try:
        state = json.loads((out / TOUR).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{out / TOUR} is damaged: {error}", hint="choose another --out") from error
    if not isinstance(state, dict) or not {"version", "size", "seed", "threads", "legs"} <= state.keys():
        raise ConfigError(f"{out / TOUR} is not the state of a tour", hint="choose another --out")
    return state


def _remove(out: Path) -> None:
    """Delete what a tour writes beside its state, and nothing else."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if (out / name).exists():
            shutil.rmtree(out / name)
