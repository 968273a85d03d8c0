"""A run's folder: what it began with, and whether what is asked now is the same run.

RUN/recipe.toml    the recipe, resolved      RUN/plan.json      threads, torch, device, fingerprint of the data, derived sections
RUN/metrics.jsonl  one line per event        RUN/step-N/        checkpoints
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dsv2.checkpoint.folder import read_json
from dsv2.checkpoint.hub import is_model_id
from dsv2.checkpoint.steps import checkpoints
from dsv2.config import Section, dump_toml, load_recipe, recipe_names
from dsv2.errors import CheckpointError, ConfigError
from dsv2.files import atomic_write, atomic_write_json, clear_leftovers
from dsv2.progress import console
from dsv2.train.loop import MAY_CHANGE
from dsv2.train.precision import resolve_precision
from dsv2.train.recipe import Sampled, StageRecipe

R = TypeVar("R", bound=StageRecipe)

RECIPE, PLAN, METRICS = "recipe.toml", "plan.json", "metrics.jsonl"
_WRITTEN = r"recipe\.toml|plan\.json|step-\d+|diverged-step-\d+\.npz"  # what a killed run may have been writing
_PLAN_FIELDS = {"threads": int, "torch": str, "device": str, "data": str}


@dataclass(frozen=True, slots=True)
class Grounds:
    """What a run stands on beside its recipe; it goes on only upon the same, but for the device.

    Args:
        data: fingerprint of them.
        device: where it trains.
        start: hash of the weights that it begins from, where they are looked at.
        judges: hashes of what judges its answers, reward models and files with functions, by path.
        given: what a program decides for the run beside its recipe, by name.
    """

    data: str
    device: torch.device
    start: str | None
    judges: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Section] = field(default_factory=dict)


def require_resume(out: Path, resume: bool) -> None:
    """Let a run be continued only when that was asked for, and only where there is one.

    Raises:
        ConfigError: there is a run and it is not to be resumed, or the other way round.
    """
    exists = (out / RECIPE).exists()
    if exists and not resume:
        raise ConfigError(f"{out} already holds a run", hint="continue it with --resume, or choose another --out")
    if resume and not exists:
        raise ConfigError(f"{out} holds no run to resume: it has no {RECIPE}", hint="leave --resume out to begin one there")


def load_stage_recipe(target: str, schema: type[R], folder: str, overrides: Sequence[str]) -> R:
    """Load the recipe that a command's first argument means: a recipe, or the model, which then has the recipe "default".

    Args:
        target: a recipe's name or file, whose model.start an override may give; or a checkpoint, run or model id.
        schema: of the stage's recipes.
        folder: of those that are shipped.
        overrides: ``key=value``.

    Raises:
        ConfigError: a wrong recipe.
    """
    is_recipe = target.endswith(".toml") or target in recipe_names(folder) or not (is_model_id(target) or Path(target).exists())
    given = overrides if is_recipe else [f"model.start={json.dumps(target)}", *overrides]
    return load_recipe(target if is_recipe else "default", schema, folder=folder, overrides=given)


def settled_recipe(recipe: R, out: Path, grounds: Grounds) -> R:
    """Resolve what depends on the machine; a run that goes on keeps what it began with, and its thread count.

    Args:
        recipe: as asked for now.
        out: the run's folder.
        grounds: what the run would stand on now.

    Raises:
        ConfigError: the run in ``out`` began with another recipe, other data, models or judges, or there are checkpoints without a recipe.
    """
    settled = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"precision": resolve_precision(recipe.run.precision, grounds.device)})}
    )
    if not (out / RECIPE).exists():
        if checkpoints(out):
            raise ConfigError(f"{out} holds checkpoints but no {RECIPE}: they belong to an unknown run", hint="choose another --out")
        return settled
    began = load_recipe(str(out / RECIPE), type(recipe), folder="pretrain")
    plan = _read_plan(out / PLAN)
    wanted = settled if recipe.run.precision != "auto" else _same(settled, began, "precision")
    changed = _differences(_choices(began, plan.get("derived")), _choices(_same(wanted, began, *MAY_CHANGE), given=grounds.given))
    if changed:
        hint = "resume with the same recipe, or choose another --out"
        raise ConfigError(f"{out} began with another recipe; different: {', '.join(changed)}", hint=hint)
    if plan["data"] != grounds.data:
        raise ConfigError(
            f"{out} began with other data: {plan['data'][:16]}, now {grounds.data[:16]}", hint="give the --data it began with"
        )
    if grounds.start is not None and plan.get("start") != grounds.start:
        raise ConfigError(f"{out} began from other weights than model.start holds now", hint="choose another --out")
    for path, hashed in grounds.judges.items():
        if plan.get("judges", {}).get(path) != hashed:
            raise ConfigError(f"{out} began with another reward than {path} holds now", hint="put it back, or choose another --out")
    for name, now in (("torch", torch.__version__), ("device", str(grounds.device))):
        if plan[name] != now:
            console().print(f"the run began with {name} {plan[name]}, now {now}: sums may differ in their last digits", markup=False)
    if plan["threads"] != torch.get_num_threads():
        console().print(f"going on with {plan['threads']} threads, as the run began: sums depend on their number", markup=False)
        torch.set_num_threads(plan["threads"])
    samples: dict[str, Any] = {"samples": settled.samples} if isinstance(settled, Sampled) else {}
    return _same(began.model_copy(update=samples), settled, *MAY_CHANGE)


def _read_plan(file: Path) -> dict[str, Any]:
    plan = read_json(file)
    for name, kind in _PLAN_FIELDS.items():
        if not isinstance(plan.get(name), kind):
            raise CheckpointError(f"{file} is damaged: {name} = {plan.get(name)!r}", hint="choose another --out")
    return plan


def begin_run(recipe: StageRecipe, out: Path, grounds: Grounds) -> None:
    """Clear what a killed run left half written, and save recipe and plan of a run that begins now.

    To be called last of all preparations, so that a failed start leaves nothing behind. Arguments as of ``settled_recipe``.
    """
    clear_leftovers(out, _WRITTEN)  # first: the space that they take may be what the run lacks
    if not (out / RECIPE).exists():
        plan: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(grounds.device)}
        plan |= {"data": grounds.data} | ({"start": grounds.start} if grounds.start else {})
        plan |= {"judges": dict(grounds.judges)} if grounds.judges else {}
        plan |= {"derived": derived} if (derived := _derived(recipe, grounds.given)) else {}
        atomic_write_json(out / PLAN, plan)
        atomic_write(out / RECIPE, _as_text(recipe, grounds.given))


def _as_text(recipe: StageRecipe, given: Mapping[str, Section]) -> str:
    """Return a recipe as TOML, and below it, as comments, what its choices come to, which it would no longer follow if they were stated.

    Likewise what was given beside it.
    """
    texts = [dump_toml(recipe)]
    for name, section in recipe.derived().items():
        texts.append(_commented(f"[{name}] as it is used, what is stated above and what is not:", section))
    for name, section in given.items():
        texts.append(_commented(f"[{name}] as the program gave it that began the run:", section))
    return "\n".join(texts)


def _commented(heading: str, section: Section) -> str:
    return "".join(f"# {line}\n" for line in f"{heading}\n{dump_toml(section)}".splitlines())


def _derived(recipe: StageRecipe, given: Mapping[str, Section] | None = None) -> dict[str, Any]:
    sections = {**recipe.derived(), **(given or {})}
    return {name: section.model_dump(mode="json", exclude_none=True) for name, section in sections.items()}


def _choices(recipe: StageRecipe, derived: dict[str, Any] | None = None, given: Mapping[str, Section] | None = None) -> dict[str, Any]:
    """Return what decides about a run's weights; ``derived`` as the run wrote it, None: as it would be derived now."""
    return recipe.model_dump(exclude={"samples"}) | (_derived(recipe, given) if derived is None else derived)


def _same(recipe: R, other: R, *names: str) -> R:
    """Return the recipe with these fields of another's ``run``."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={name: getattr(other.run, name) for name in names})})


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key} ({a!r} then, {b!r} now)")
    return changed
