"""The verb: finds the model, reads the options, hands over to training or serving."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dsv2.errors import ConfigError
from dsv2.info.target import find_target
from dsv2.plan.serve import plan_serve
from dsv2.plan.sheet import Answer, show
from dsv2.plan.train import plan_train


def run(
    what: Literal["train", "serve"],
    target: str,
    overrides: Sequence[str] = [],
    search: bool = False,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Plan training or serving, and print memory, times, cost and what they assume.

    Args:
        what: which of both.
        target: a preset, a config.json, a model folder, a run or a tour.
        overrides: KEY=VALUE of ``TrainOptions`` or ``ServeOptions``.
        search: try every layout and explain the best.
        out: a .png to draw, or a folder that gets plan.png and plan.json.
        as_json: print one JSON object.

    Raises:
        ConfigError: an unknown key or machine, an ``out`` that cannot be written, a layout that does not divide, or one that does not
            fit, after it was printed.
    """
    if out is not None:
        _check(out)
    found = find_target(target)
    answer = (plan_train if what == "train" else plan_serve)(found.config, found.preset or _short(target), overrides, search)
    if as_json:
        print(json.dumps(answer.to_json(), indent=1))
    else:
        show(answer)
    if answer.problem is not None:
        raise answer.problem
    if out is not None:
        _write(answer, out)


def _check(out: Path) -> None:
    """Refuse, before anything is computed, a path that could not be written."""
    from dsv2.files import existing_parent

    if out == Path():  # an empty --out is the current folder to pathlib, and nobody's wish
        raise ConfigError("--out = '' or . names no file", hint="say --out plan.png, or a folder such as --out plan")
    if out.suffix and out.suffix != ".png" and not out.is_dir():
        raise ConfigError(f"--out = {out} must be a .png file or a folder")
    if out.is_dir() and out.suffix == ".png":
        raise ConfigError(f"--out = {out} is a folder, and a picture is to be written there", hint="choose another name")
    above = existing_parent(out)
    if not above.is_dir() and not (above == out.absolute() and out.suffix == ".png"):
        raise ConfigError(f"--out = {out}: {above} is a file, no folder", hint="choose another folder, or a name ending in .png")


def _short(target: str) -> str:
    """Name a path by its folder, since the name is part of titles."""
    path = Path(target).resolve()
    return (path.parent if path.suffix == ".json" else path).name or target


def _write(answer: Answer, out: Path) -> None:
    from dsv2.files import atomic_write
    from dsv2.progress import console

    picture = out if out.suffix == ".png" else out / "plan.png"
    atomic_write(picture, answer.draw())
    if picture != out:
        atomic_write(out / "plan.json", json.dumps(answer.to_json(), indent=1).encode())
    console().print(f"wrote {picture}", markup=False, soft_wrap=True)
