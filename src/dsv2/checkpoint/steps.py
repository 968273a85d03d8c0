"""Step folders of a run: which are whole, which is the newest, which may go. Without torch."""

import re
import shutil
from pathlib import Path

from dsv2.checkpoint.hub import fetch_model, is_model_id
from dsv2.checkpoint.manifest import MANIFEST
from dsv2.errors import CheckpointError

TOUR = "tour.json"  # a folder that holds it is a tour, with a folder for the run of each stage
_STEP = re.compile(r"step-(\d+)")


def checkpoints(run: Path) -> list[Path]:
    """Return a run's complete step folders, oldest first."""
    found = [
        (int(match.group(1)), path) for path in run.glob("step-*") if (match := _STEP.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that ``path`` means: itself, a run's newest step, that of a tour's last run, or a model id's copy.

    Raises:
        CheckpointError: there is none.
    """
    if is_model_id(path):
        return fetch_model(str(path))
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    stages = ("grpo", "sft", "pretrain") if (path / TOUR).is_file() else ()
    for run in (path, *(path / stage for stage in stages)):
        steps = checkpoints(run)
        if steps:
            return steps[-1]
    raise CheckpointError(
        f"{path} holds no checkpoint: neither config.json nor a complete step-N folder",
        hint="make one with `dsv2 tour --out DIR` or `dsv2 pretrain`",
    )


def remove_old(run: Path, keep: int, spared: Path | None = None) -> None:
    """Delete complete step folders but the newest ``keep`` and ``spared``, and what a killed process left half deleted; nothing else."""
    for path in checkpoints(run)[:-keep]:
        if path == spared:
            continue
        path.rename(run / f".{path.name}.old")  # first, so that a half-deleted folder never counts as complete
    for path in run.glob(".step-*.old"):
        shutil.rmtree(path)
