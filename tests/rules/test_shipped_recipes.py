"""Every shipped recipe loads against the model of its stage, and every key of that model says what it means."""

from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from dsv2.config import Section, dump_toml, load_recipe

RECIPES = Path(__file__).parents[2] / "src" / "dsv2" / "recipes"

# Folder of recipes/ -> the model that its files are checked against. A new stage adds its line.
SCHEMAS = {
    "dpo": "dsv2.rl.preference_recipe:DpoRecipe",
    "grpo": "dsv2.rl.grpo_recipe:GrpoRecipe",
    "hardware": "dsv2.parallel.hardware:Hardware",
    "plan-serve": "dsv2.plan.options:ServeOptions",
    "plan-train": "dsv2.plan.options:TrainOptions",
    "prepare": "dsv2.data.recipe:PrepareRecipe",
    "pretrain": "dsv2.train.recipe:PretrainRecipe",
    "reward": "dsv2.rl.preference_recipe:RewardRecipe",
    "sft": "dsv2.train.sft_recipe:SftRecipe",
}


def schema(folder: str) -> type[Section]:
    assert folder in SCHEMAS, f"add recipes/{folder} and the model of its recipes to SCHEMAS"
    module, _, name = SCHEMAS[folder].partition(":")
    found = getattr(import_module(module), name)
    assert issubclass(found, Section)
    return found


def models(annotation: object) -> list[type[BaseModel]]:
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return own + [model for argument in get_args(annotation) for model in models(argument)]


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.toml")), ids=lambda file: file.relative_to(RECIPES).as_posix())
def test_recipe_loads_by_name_and_by_path(file: Path) -> None:
    folder = file.parent.relative_to(RECIPES).as_posix()
    recipe = load_recipe(file.stem, schema(folder), folder=folder)
    assert recipe == load_recipe(str(file), schema(folder), folder=folder)
    dump_toml(recipe)  # saved with every run: it must survive


@pytest.mark.parametrize("folder", SCHEMAS)
def test_every_key_is_described(folder: str) -> None:
    waiting, seen = [schema(folder)], set()
    while waiting:
        model = waiting.pop()
        seen.add(model)
        for name, field in model.model_fields.items():
            inner = [found for found in models(field.annotation) if found not in seen]
            waiting += inner
            assert field.description or inner or not issubclass(model, Section), f"{model.__name__}.{name} has no description"


@pytest.mark.parametrize("folder", SCHEMAS)
def test_stage_ships_a_recipe(folder: str) -> None:
    assert list((RECIPES / folder).glob("*.toml"))
