"""Where the rewards of a run of GRPO come from, what the run says of them, and that it goes on with no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.cli import main
from dsv2.errors import ConfigError
from dsv2.metrics import read_metrics
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.report.record import load_settings
from dsv2.rl import grpo
from dsv2.rl.grpo_shown import ROLLOUTS
from dsv2.rl.prompts import Prompts
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.reward_model import RewardModel
from dsv2.rl.rollout import Rollout
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.start import open_start
from reference import grpo as reference
from rl.test_grpo import SECTIONS, recipe_of, train


@pytest.fixture
def start(tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> Path:
    save_checkpoint(tmp_path / "start", policy, tokenizer)
    return tmp_path / "start"


def test_a_run_states_the_rewards_of_a_program_and_goes_on_with_no_others(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(rollouts: list[Rollout]) -> list[float]:
        return [float(len(rollout.tokens) % 2) for rollout in rollouts]

    recipe, out = recipe_of(start, run=SECTIONS["run"] | {"steps": 1}), tmp_path / "run"
    short = Part("short", lambda rollouts: [1.0 / len(rollout.tokens) for rollout in rollouts], 0.5, scale="batch")
    train(recipe, out, rewards=Rewards([short, Part("odd", odd)]))
    assert "short x 0.5 in deviations of the batch, odd x 1" in " ".join(capsys.readouterr().err.split())
    settings = load_settings(out)
    assert (settings["rewards.short.weight"], settings["rewards.short.scale"], settings["rewards.odd.weight"]) == (0.5, "batch", 1.0)
    assert "# [rewards.odd] as the program gave it" in (out / "recipe.toml").read_text()
    rows, line = read_metrics(out / ROLLOUTS), next(line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "grpo")
    shown = [0.5 / row["num_tokens"] + row["num_tokens"] % 2 for row in rows]
    assert [row["reward"] for row in rows] == pytest.approx(shown) and line["reward"] == pytest.approx(sum(shown) / len(shown))
    train(recipe, out, rewards=Rewards([short, Part("odd", odd)]))
    for others, says in (
        ([replace(short, weight=0.4), Part("odd", odd)], r"rewards.short.weight \(0.5 then, 0.4 now\)"),
        ([replace(short, scale="group"), Part("odd", odd)], r"rewards.short.scale \('batch' then, 'group' now\)"),
        ([short, Part("even", odd)], r"rewards.even \(None then, .*rewards.odd \("),
        (None, r"different: reward \("),
    ):
        with pytest.raises(ConfigError, match=says):
            train(recipe, out, rewards=others and Rewards(others))


def test_rewards_come_from_the_recipe_or_from_a_program(start: Path, tmp_path: Path) -> None:
    prompts = Prompts([{"messages": [{"role": "user", "content": "Hm?"}]}], [], 0)
    for sections, given, says in (
        ([{"name": "answer"}], Rewards([Part("mine", lambda rollouts: [])]), r"names rewards \(answer\), and others are given: mine"),
        ([], None, "no reward has a weight"),
    ):
        recipe, opened = open_start(recipe_of(start, reward=sections))
        with pytest.raises(ConfigError, match=says):
            grpo.train(recipe, opened, prompts, tmp_path / "run", rewards=given)
    assert not (tmp_path / "run").exists(), "nothing has begun"


def test_stage_two_weighs_its_reward_models_like_with_like(start: Path, tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> None:
    """One model is a thousand times as loud: by raw scores, the advantages would be those of that model alone."""
    for name, factor in (("loud", 1000.0), ("quiet", 1.0)):
        model = RewardModel(policy.config)
        initialise(model, len(name))
        model.score_head.weight.data *= factor
        save_checkpoint(tmp_path / name, model, tokenizer)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(3)))
    small = ["run.steps=1", "run.seq_len=96", "rollout.prompts=3", "rollout.group_size=4", "rollout.max_tokens=12", "task.held_out=0"]
    own = [f"reward.0.folder={tmp_path / 'loud'}", f"reward.1.folder={tmp_path / 'quiet'}", "reward.1.weight=2.0"]
    own += ["reward.2.most_tokens=11"]
    given = ["grpo", "v2-preference", f"model.start={start}", *small, *own, "--data", str(tmp_path / "a.jsonl")]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    rows = read_metrics(tmp_path / "run" / ROLLOUTS)
    groups = [rows[i : i + 4] for i in range(0, 12, 4)]
    rests = {
        name: [[row["rewards"][name] - sum(r["rewards"][name] for r in group) / 4 for row in group] for group in groups]
        for name in ("helpful", "safety")
    }  # fmt: skip
    units = {name: (sum(rest**2 for own in found for rest in own) / 12) ** 0.5 for name, found in rests.items()}
    assert units["helpful"] > 100 * units["safety"] > 0
    for place, group in enumerate(groups):
        weighed = [
            rests["helpful"][place][i] / units["helpful"] + 2 * rests["safety"][place][i] / units["safety"] + 0.5 * row["rewards"]["rule"]
            for i, row in enumerate(group)
        ]  # fmt: skip
        assert [row["advantage"] for row in group] == pytest.approx(reference.z_scores(weighed), abs=1e-4)
        raw = [row["rewards"]["helpful"] + 2 * row["rewards"]["safety"] + 0.5 * row["rewards"]["rule"] for row in group]
        assert [row["reward"] for row in group] == pytest.approx(raw)


def test_a_run_goes_on_with_the_file_that_it_began_with(start: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def reward(rollouts):\n    return [float(len(rollout.tokens) % 2) for rollout in rollouts]\n")
    recipe = recipe_of(start, reward=[{"name": "python", "file": str(mine), "label": "odd"}], run=SECTIONS["run"] | {"steps": 1})
    for _ in range(2):
        train(recipe, tmp_path / "run")
    assert all(row["rewards"] == {"odd": row["num_tokens"] % 2} for row in read_metrics(tmp_path / "run" / ROLLOUTS))
    mine.write_text(mine.read_text().replace("% 2", "% 3"))
    with pytest.raises(ConfigError, match="began with another reward than .*mine.py holds now"):
        train(recipe, tmp_path / "run")
