"""Rewards out of a file: the function that a recipe names, what is wrong with files, and that a changed file is another reward."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv2.config import load_recipe
from dsv2.errors import CheckpointError, ConfigError
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.reward_kinds import RewardSection, open_rewards
from dsv2.rl.reward_needs import judges_of

ROLLOUTS = [SimpleNamespace(tokens=(1, 2, 3)[:n], text="x" * n, group=0, example={}) for n in (1, 2, 3)]

MINE = """
from __future__ import annotations

from dataclasses import dataclass

runs = []


@dataclass
class Limit:
    most: int | None = 2


def reward(rollouts):
    runs.append(len(rollouts))
    return [None if len(rollout.text) > Limit().most else len(rollout.text) / 2 for rollout in rollouts]


def steps(rollouts):
    return [[(len(rollout.tokens) - 1, float(len(runs)))] for rollout in rollouts]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_functions_of_a_file_are_rewards(mine: Path) -> None:
    sections = [
        RewardSection(name="python", file=str(mine)),
        RewardSection(name="python", file=str(mine), function="steps", steps=True, label="by step", weight=0.5),
    ]
    rewards = open_rewards(sections)
    scores = rewards.score(ROLLOUTS)
    assert scores.parts == {"python": [0.5, 1.0, None], "by step": [1.0] * 3}, "both are of one module: its list has grown"
    assert scores.total == [1.0, 1.5, None] and rewards.step_labels == ("by step",)
    assert scores.steps == [[(0, 1.0)], [(1, 1.5)], None]


def test_a_command_line_can_name_one(mine: Path) -> None:
    given = f"reward=[{{name='python', file='{mine}', scale='group'}}]"
    recipe = load_recipe("v2-preference", GrpoRecipe, folder="grpo", overrides=[given])
    assert [str(part) for part in open_rewards(recipe.reward).parts] == ["python x 1 in deviations of the group"]


def test_a_file_that_has_changed_is_another_reward(mine: Path) -> None:
    sections = [RewardSection(name="python", file=str(mine))]
    before, first = judges_of(sections), open_rewards(sections).score(ROLLOUTS)
    mine.write_text(MINE.replace("/ 2", "/ 4"))  # as long, and within the second that compiled copies of Python go by
    after, second = judges_of(sections), open_rewards(sections).score(ROLLOUTS)
    assert before.keys() == after.keys() == {str(mine)} and before != after
    assert first.total == [0.5, 1.0, None] and second.total == [0.25, 0.5, None]


@pytest.mark.parametrize(
    ("text", "function", "says"),
    [
        (None, "reward", "cannot read the reward's file .*mine.py: No such file"),
        ("def reward(:\n", "reward", "mine.py cannot be run: SyntaxError"),
        ("x = 1\nimport no_such_module\n", "reward", "mine.py:2 cannot be run: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "reward", "mine.py:1 cannot be run: SystemExit: 3"),
        (MINE, "step", "has nothing under the name 'step'; its functions: Limit, reward, steps\nhint: did you mean 'steps'"),
        (MINE, "runs", r"has \[\], which cannot be called, under the name 'runs'"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_before_anything_is_scored(mine: Path, text: str | None, function: str, says: str) -> None:
    if text is None:
        mine.unlink()
    else:
        mine.write_text(text)
    for _ in range(2):  # what was half run has left nothing behind
        with pytest.raises(ConfigError, match=says):
            open_rewards([RewardSection(name="python", file=str(mine), function=function)])


def test_what_judges_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the reward's file"):
        judges_of([RewardSection(name="python", file=str(tmp_path / "gone.py"))])
    with pytest.raises(CheckpointError):
        judges_of([RewardSection(name="model", folder=str(tmp_path / "gone"))])
    assert judges_of([RewardSection(name="answer")]) == {}
