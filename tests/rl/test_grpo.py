"""GRPO as a run: killed between any two steps it ends with the same weights and the same rollouts; what it writes; what it refuses."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.layout import save_checkpoint
from dsv2.cli import main
from dsv2.config import load_recipe
from dsv2.errors import ConfigError, DataError
from dsv2.metrics import read_metrics
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.report.record import load_settings
from dsv2.rl import grpo
from dsv2.rl import rollout as rollout_file
from dsv2.rl.grpo_recipe import GrpoRecipe, objective_of
from dsv2.rl.grpo_shown import ROLLOUTS
from dsv2.rl.objective import PRESETS, Objective
from dsv2.rl.prompts import Prompts, open_prompts
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.reward_model import RewardModel
from dsv2.rl.rollout import Rollout, _Draft
from dsv2.tokenizer.chat import render
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.start import open_start
from reference import grpo as reference

SECTIONS = {
    "run": {"steps": 4, "seq_len": 96, "validate_every": 2, "checkpoint_every": 1, "keep": 9},
    "learning_rate": {"peak": 2e-3, "warmup_steps": 0},
    "reward": [{"name": "length", "most_tokens": 6}],
    "task": {"name": "arithmetic", "held_out": 4, "samples": 2},
    "rollout": {"prompts": 3, "group_size": 4, "max_tokens": 12, "max_batch": 8},
    "update": {"updates": 2, "micro_tokens": 200},
    "reference": {"refresh_every": 2},
}  # fmt: skip


def thirds(rollouts: list[Rollout]) -> list[list[tuple[int, float]]]:
    """Every third token ends a step, whose score is the share of even tokens in it; the last step ends with the answer."""
    found = []
    for rollout in rollouts:
        ends = sorted({*range(2, len(rollout.tokens), 3), len(rollout.tokens) - 1})
        begins = [0, *(end + 1 for end in ends[:-1])]
        found.append(
            [(end, sum(t % 2 == 0 for t in rollout.tokens[begin : end + 1]) / 3) for begin, end in zip(begins, ends, strict=True)]
        )  # fmt: skip
    return found


BY_STEPS = Rewards([Part("thirds", thirds, of_steps=True)])


@pytest.fixture
def start(tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> Path:
    save_checkpoint(tmp_path / "start", policy, tokenizer)
    return tmp_path / "start"


def recipe_of(start: Path, **sections: object) -> GrpoRecipe:
    return GrpoRecipe.model_validate(SECTIONS | {"model": {"start": str(start)}} | sections)


def train(recipe: GrpoRecipe, out: Path, **more: object) -> Transformer:
    recipe, opened = open_start(recipe.model_copy(update={"reward": ()}) if more.get("rewards") else recipe)
    return grpo.train(recipe, opened, open_prompts(recipe, opened.tokenizer, []), out, **more)


def state(out: Path) -> tuple[list[torch.Tensor], list[dict], list[dict]]:
    weights = list(load_model(out / "step-4").state_dict().values())
    timeless = [
        {name: value for name, value in line.items() if not name.endswith(("_s", "step_time"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    return weights, timeless, read_metrics(out / ROLLOUTS)


@pytest.mark.parametrize(("supervision", "rewards"), [("outcome", None), ("process", BY_STEPS)])
def test_a_run_stopped_at_any_step_ends_the_same(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supervision: str, rewards: Rewards | None
) -> None:
    recipe = recipe_of(start, supervision=supervision)
    train(recipe, tmp_path / "whole", rewards=rewards)
    expected = state(tmp_path / "whole")
    sample = grpo._Run._sample

    class Killed(Exception):
        pass

    for number in range(4):

        def killed(run: grpo._Run, number: int = number) -> object:
            if run.step == number:
                raise Killed
            return sample(run)

        monkeypatch.setattr(grpo._Run, "_sample", killed)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "stopped", rewards=rewards)
    monkeypatch.setattr(grpo._Run, "_sample", sample)
    train(recipe, tmp_path / "stopped", rewards=rewards)
    weights, metrics, rollouts = state(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(weights, expected[0], strict=True))
    assert metrics == expected[1] and rollouts == expected[2] and len(rollouts) == 4 * 12
    line = next(line for line in metrics if line["kind"] == "grpo")
    assert {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "kl", "entropy",
            "clip_ratio/region_mean", "clip_ratio/low_min", "clip_ratio/high_max", "sampling/sampling_logp_difference/max",
            "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/max"} <= line.keys()  # fmt: skip
    assert ("rewards/length/mean" in line, "steps/reward" in line) == (rewards is None, rewards is not None)
    totals = [line["num_tokens"] for line in metrics if line["kind"] == "grpo"]
    drawn = [sum(row["num_tokens"] for row in rollouts if row["step"] <= step) for step in range(1, 5)]
    assert all(total - own > 12 for total, own in zip(totals, drawn, strict=True)) and totals == sorted({*totals})
    assert max(line["sampling/sampling_logp_difference/max"] for line in metrics if line["kind"] == "grpo") <= 1e-5
    assert sorted(path.name for path in (tmp_path / "whole").glob("reference-*")) == ["reference-0.safetensors", "reference-2.safetensors"]


def test_a_reference_that_no_checkpoint_needs_is_removed(start: Path, tmp_path: Path) -> None:
    train(recipe_of(start, run=SECTIONS["run"] | {"keep": 1}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-4"]
    assert not list((tmp_path / "run").glob("reference-[02].safetensors"))


def test_rewards_shape_the_policy_and_equal_ones_do_not(start: Path, tmp_path: Path) -> None:
    even = Rewards([Part("even", lambda rollouts: [sum(token % 2 == 0 for token in r.tokens) / len(r.tokens) for r in rollouts])])
    run, pace = SECTIONS["run"] | {"steps": 20, "checkpoint_every": 99}, {"peak": 1e-2, "warmup_steps": 0}
    train(recipe_of(start, run=run, learning_rate=pace, preset="dr_grpo", update={"updates": 1}), tmp_path / "even", rewards=even)
    earned = [line["reward"] for line in read_metrics(tmp_path / "even" / "metrics.jsonl") if line["kind"] == "grpo"]
    assert sum(earned[-3:]) > sum(earned[:3]) + 0.3
    assert next(line for line in read_metrics(tmp_path / "even" / "metrics.jsonl") if line["kind"] == "grpo")["kl"] is None
    flat = recipe_of(start, objective={"kl_weight": 0.0}, optimizer={"weight_decay": 0.0})
    moved = train(flat, tmp_path / "flat", rewards=Rewards([Part("same", lambda rollouts: [1.0] * len(rollouts))]))
    before = load_model(start).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in moved.state_dict().items())


def test_under_process_supervision_the_loss_has_the_advantages_of_the_loop(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, update = [], grpo.update

    def watched(model: Transformer, optimizer: object, pieces: list, advantages: torch.Tensor, *more: object, **options: object) -> object:
        learned.append(advantages)
        return update(model, optimizer, pieces, advantages, *more, **options)

    monkeypatch.setattr(grpo, "update", watched)
    recipe = recipe_of(start, supervision="process", run=SECTIONS["run"] | {"steps": 2}, update={"updates": 1})
    train(recipe, tmp_path / "run", rewards=BY_STEPS)
    rollouts = read_metrics(tmp_path / "run" / ROLLOUTS)
    assert [advantages.shape for advantages in learned] == [(12, 12)] * 2 and len(rollouts) == 24
    seen = torch.cat(learned)
    for group in range(0, 24, 4):
        rows = rollouts[group : group + 4]
        rewards, ends = ([[step[name] for step in row["steps"]] for row in rows] for name in ("reward", "end"))
        expected = reference.step_advantages(rewards, ends, [row["num_tokens"] for row in rows])
        for row, own, wanted in zip(rows, seen[group : group + 4].tolist(), expected, strict=True):
            assert own == pytest.approx([*wanted, *[0.0] * (12 - len(wanted))], abs=1e-6)
            assert [step["advantage"] for step in row["steps"]] == pytest.approx([wanted[step["end"]] for step in row["steps"]], abs=1e-5)
            assert row["advantage"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
    assert len({*map(tuple, seen.tolist())}) > 12, "they differ"


def test_process_supervision_shapes_the_policy(start: Path, tmp_path: Path) -> None:
    run, pace = SECTIONS["run"] | {"steps": 20, "checkpoint_every": 99}, {"peak": 1e-2, "warmup_steps": 0}
    recipe = recipe_of(start, run=run, learning_rate=pace, preset="dr_grpo", supervision="process", update={"updates": 1})
    train(recipe, tmp_path / "even", rewards=BY_STEPS)
    earned = [line["steps/reward"] for line in read_metrics(tmp_path / "even" / "metrics.jsonl") if line["kind"] == "grpo"]
    assert sum(earned[-3:]) > sum(earned[:3]) + 0.3


def test_a_recipe_scores_steps_with_process_supervision_alone(start: Path, tmp_path: Path) -> None:
    steps = [{"name": "steps"}, {"name": "answer", "weight": 0.0}]
    run = SECTIONS["run"] | {"steps": 1}
    penalty = {"overlong": "penalty", "overlong_buffer": 6}
    train(recipe_of(start, supervision="process", reward=steps, run=run, objective=penalty), tmp_path / "a")
    assert all(row["steps"][-1]["end"] == row["num_tokens"] - 1 for row in read_metrics(tmp_path / "a" / ROLLOUTS))
    for sections in ({"supervision": "process"}, {"reward": steps}, {"supervision": "process", "reward": steps, "preset": "v2"}):
        with pytest.raises(ConfigError, match="supervision = "):
            train(recipe_of(start, **sections), tmp_path / "b")
    assert not (tmp_path / "b").exists(), "nothing has begun"


@pytest.mark.parametrize("advantage", ["zscore", "none"])
def test_groups_with_equal_rewards_are_drawn_anew(start: Path, tmp_path: Path, advantage: str) -> None:
    objective = {"drop_equal_groups": True, "kl_weight": 0.0, "advantage": advantage}
    recipe = recipe_of(start, objective=objective, run=SECTIONS["run"] | {"steps": 2})
    picky = Rewards([Part("picky", lambda rollouts: [1.0 + (r.group == 4 and r.index == 0) for r in rollouts])])
    train(recipe, tmp_path / "run", rewards=picky)
    first = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "grpo")
    assert first["learned_from"] == 4 and first["consumed_prompts"] == 3 + 3 + 2  # three rounds; group 4 of the second one teaches


@pytest.fixture
def some_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of all tokens ends an answer."""
    monkeypatch.setattr(rollout_file, "stop_ids", lambda tokenizer: (tokenizer.eos_id, *range(0, tokenizer.num_tokens, 8)))


@pytest.mark.usefixtures("some_end_early")
def test_dapo_asks_for_right_answers_beside_wrong_ones_and_pays_less_for_long_ones(start: Path, tmp_path: Path) -> None:
    """Rewards differ in the second group alone; lengths differ in others, too."""
    recipe = recipe_of(start, preset="dapo", objective={"overlong_buffer": 11}, run=SECTIONS["run"] | {"steps": 1})
    right = Rewards([Part("right", lambda rollouts: [float(r.group == 1 and r.index < 2) for r in rollouts])])
    train(recipe, tmp_path / "run", rewards=right)
    rows = read_metrics(tmp_path / "run" / ROLLOUTS)
    assert {row["group"] for row in rows if row["learned"]} == {1} and {row["group"] for row in rows} > {0, 1, 2}
    assert any(len({row["num_tokens"] for row in rows if row["group"] == group}) > 1 for group in (0, 2))
    for row in rows:
        assert row["rewards"]["overlong"] == pytest.approx(-max(0, row["num_tokens"] - 1) / 11)
        assert row["reward"] == pytest.approx(row["rewards"]["right"] + row["rewards"]["overlong"])
    again = load_recipe(str(tmp_path / "run" / "recipe.toml"), GrpoRecipe, folder="grpo")
    assert objective_of(again) == objective_of(recipe) and again.objective.model_fields_set == {"overlong_buffer"}


@pytest.mark.usefixtures("some_end_early")
def test_cut_answers_can_be_left_out(start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, objective={"overlong": "mask"}, run=SECTIONS["run"] | {"steps": 1, "seed": 1})
    odd = Rewards([Part("odd", lambda rollouts: [None if r.index == 0 else len(r.tokens) % 2 for r in rollouts])])
    train(recipe, tmp_path / "run", rewards=odd)
    rows = read_metrics(tmp_path / "run" / ROLLOUTS)
    assert [row["learned"] for row in rows] == [row["finish_reason"] == "stop" for row in rows]
    assert {row["learned"] for row in rows} == {True, False}
    assert [row["index"] for row in rows if "example" in row] == [0, 0, 0]
    line = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "grpo")
    assert line["unscored"] == line["rewards/odd/unscored"] == 3 and line["rewards/odd/failed"] == 0
    ended = [row["num_tokens"] for row in rows if row["finish_reason"] == "stop"]
    assert [line[f"completions/{what}_terminated_length"] for what in ("min", "max")] == [min(ended), max(ended)]


def test_the_reference_is_refreshed_and_routes_itself(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a refresh the reference is the policy: there, and only there, the KL is 0."""
    replayed, without_graph = [], grpo.without_graph

    def watched(model: Transformer, pieces: list, autocast: object) -> object:
        replayed.append((any(p.requires_grad for p in model.parameters()), all(piece.experts is not None for piece in pieces)))
        return without_graph(model, pieces, autocast)

    monkeypatch.setattr(grpo, "without_graph", watched)
    train(recipe_of(start), tmp_path / "two")
    assert set(replayed) == {(False, False)}
    train(recipe_of(start, update={"updates": 1}), tmp_path / "one")
    kls = [line["kl"] for line in read_metrics(tmp_path / "one" / "metrics.jsonl") if line["kind"] == "grpo"]
    assert max(kls[0], kls[2]) < 1e-9 < 1e-6 < min(kls[1], kls[3])


def test_lengths_that_a_recipe_leaves_open_follow_the_model(start: Path, tmp_path: Path) -> None:
    rollout = {"prompts": 2, "group_size": 2}
    train(recipe_of(start, run={"steps": 1}, rollout=rollout, task=SECTIONS["task"] | {"held_out": 0}), tmp_path / "run")
    resolved = load_recipe(str(tmp_path / "run" / "recipe.toml"), GrpoRecipe, folder="grpo")
    assert (resolved.run.seq_len, resolved.rollout.max_tokens) == (128, 64)  # the context and half of it


def test_a_step_without_a_score_ends_the_run(start: Path, tmp_path: Path) -> None:
    def broken(rollouts: list[Rollout]) -> list[float]:
        raise KeyError("tests")

    for reward, reason in ((lambda rollouts: [None] * len(rollouts), "it could not tell"), (broken, "KeyError: 'tests'")):
        with pytest.raises(DataError, match=f"step 1: none of its 12 rollouts has a score: reward 'shy': {reason}"):
            train(recipe_of(start), tmp_path / "run", rewards=Rewards([Part("shy", reward)]))


def test_a_run_goes_on_with_the_reward_model_that_it_began_with(
    start: Path, tmp_path: Path, policy: Transformer, tokenizer: Tokenizer
) -> None:
    for seed in (0, 1):
        model = RewardModel(policy.config)
        initialise(model, seed)
        save_checkpoint(tmp_path / f"rm-{seed}", model, tokenizer)
    (tmp_path / "rm").symlink_to("rm-0")
    recipe = recipe_of(start, reward=[{"name": "model", "folder": str(tmp_path / "rm")}], run=SECTIONS["run"] | {"steps": 1})
    for _ in range(2):
        train(recipe, tmp_path / "run")
    (tmp_path / "rm").unlink()
    (tmp_path / "rm").symlink_to("rm-1")
    with pytest.raises(ConfigError, match="began with another reward than .*rm holds now"):
        train(recipe, tmp_path / "run")


def test_a_run_that_has_not_learned_yet_goes_on(start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, objective={"drop_equal_groups": True}, run=SECTIONS["run"] | {"steps": 2})
    same = Rewards([Part("same", lambda rollouts: [1.0] * len(rollouts))])
    train(recipe, tmp_path / "run", rewards=same)
    shutil.rmtree(tmp_path / "run" / "step-2")
    train(recipe, tmp_path / "run", rewards=same)  # from a checkpoint before the first optimiser step
    before = load_model(start).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in load_model(tmp_path / "run" / "step-2").state_dict().items())


def test_a_model_alone_is_enough(start: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": n}) + "\n" for n in range(4)))
    few = ["run.steps=1", "rollout.prompts=2", "rollout.group_size=2", "task.held_out=1", "task.samples=1"]
    command = ["grpo", str(start), *few, "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    resolved = load_recipe(str(tmp_path / "run" / "recipe.toml"), GrpoRecipe, folder="grpo")
    assert (resolved.run.seq_len, resolved.rollout.max_tokens) == (128, 64)  # the model's context and half of it
    assert main([*command, "--resume"]) == 0


def test_presets_are_the_papers_and_fit_the_run(start: Path) -> None:
    for name, objective in PRESETS.items():
        found = objective_of(recipe_of(start, preset=name))
        assert found.ratio == objective.ratio and found.kl_weight == objective.kl_weight
    assert objective_of(recipe_of(start, preset="dr_grpo")).constant_len == 12
    assert objective_of(recipe_of(start, objective={"normalise": "constant"})).constant_len == 12
    assert len({str(objective) for objective in PRESETS.values()}) == len(PRESETS), "a plan tells them apart"
    longer = recipe_of(start, preset="dapo", rollout=SECTIONS["rollout"] | {"max_tokens": 4096})
    assert objective_of(longer).overlong_buffer == 819 and objective_of(recipe_of(start, preset="dapo")).overlong_buffer == 2


def test_what_is_stated_goes_before_the_preset(start: Path) -> None:
    assert objective_of(recipe_of(start, preset="v2", objective={"ratio": "token"})) == PRESETS["deepseekmath"]
    found = objective_of(recipe_of(start, preset="dapo", objective={"clip_high": 0.2, "overlong_buffer": 7}))
    assert found == PRESETS["dapo"].model_copy(update={"clip_high": 0.2, "overlong_buffer": 7})
    assert objective_of(recipe_of(start, objective={"overlong": "penalty"})).overlong_buffer == 2
    with pytest.raises(ConfigError, match="overlong_buffer = 13 tokens; allowed are 1 to 12"):
        objective_of(recipe_of(start, objective={"overlong": "penalty", "overlong_buffer": 13}))


def test_a_runs_own_recipe_can_be_used_again_with_another_preset(start: Path, tmp_path: Path) -> None:
    train(recipe_of(start, preset="dapo", objective={"clip_low": 0.1}, run=SECTIONS["run"] | {"steps": 1}), tmp_path / "run")
    file = tmp_path / "run" / "recipe.toml"
    shown = {line.removeprefix("# ") for line in file.read_text().splitlines()}
    assert {"clip_low = 0.1", "clip_high = 0.28", "overlong_buffer = 2", 'normalise = "tokens"', 'ratio = "token"'} <= shown

    def again(*overrides: str) -> Objective:
        return objective_of(load_recipe(str(file), GrpoRecipe, folder="grpo", overrides=overrides))

    assert again("preset=v2") == PRESETS["v2"].model_copy(update={"clip_low": 0.1})
    assert again("preset=dr_grpo", "rollout.max_tokens=32").constant_len == 32 and again("rollout.max_tokens=40").overlong_buffer == 8
    assert again("objective.clip_high=0.3").clip_high == 0.3
    settings = load_settings(tmp_path / "run")
    assert settings["objective.clip_high"] == 0.28 and settings["objective.clip_low"] == 0.1, "the report shows what was used"


def test_a_run_goes_on_with_the_objective_that_it_began_with(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SECTIONS["run"] | {"steps": 1}
    train(recipe_of(start, preset="dapo", run=one), tmp_path / "run")
    train(recipe_of(start, preset="dapo", objective={"clip_high": 0.28, "overlong_buffer": 2}, run=one), tmp_path / "run")  # the same
    with pytest.raises(ConfigError, match=r"different: objective\.clip_high \(0\.28 then, 0\.2 now\)\n"):
        train(recipe_of(start, preset="dapo", objective={"clip_high": 0.2}, run=one), tmp_path / "run")
    monkeypatch.setitem(PRESETS, "dapo", PRESETS["dapo"].model_copy(update={"clip_high": 0.4}))  # by a later version of the package
    with pytest.raises(ConfigError, match=r"different: objective\.clip_high \(0\.28 then, 0\.4 now\)\n"):
        train(recipe_of(start, preset="dapo", run=one), tmp_path / "run")


def test_prompts_of_files_are_read_held_out_and_refused(tmp_path: Path, start: Path, tokenizer: Tokenizer) -> None:
    def opened(rows: list[dict], **task: object) -> Prompts:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return open_prompts(recipe_of(start, task=task), tokenizer, [tmp_path / "a.jsonl"])

    rows = [{"prompt": f"What is {n}?", "answer": n} for n in range(10)]
    prompts = opened(rows, held_out=3)
    taken = [example["answer"] for example in prompts.take(0, 7)]
    assert len(set(taken)) == 7 and not set(taken) & {example["answer"] for example in prompts.held_out}
    assert [example["answer"] for example in prompts.take(7, 7)] != taken
    answered = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    useless = [
        {"question": "?"}, {"messages": answered}, {"messages": [{"role": "user", "content": 5}]}, {"prompt": "12 + 34 " * 60},
    ]  # fmt: skip
    with pytest.raises(DataError, match="4 of 14 prompt rows are refused, more than task.max_refused = 0.05") as error:
        opened(rows + useless, held_out=3)
    for reason in (
        r'a row needs "messages" or "prompt"; here are question \(first: .*a.jsonl:11\)', r"nothing to answer \(first: .*:12\)",
        r"content is of type int, not text \(first: .*:13\)", r"longer than 84 tokens, which run.seq_len = 96 leaves .*:14\)",
    ):  # fmt: skip
        assert re.search(reason, str(error.value)), reason
    kept = opened(rows + useless, held_out=3, max_refused=1)
    assert (kept.fingerprint, len(kept.report)) == (prompts.fingerprint, 6)
    with pytest.raises(DataError, match=r"a.jsonl:14 takes \d+ tokens; with rollout.max_tokens = 12 that is beyond run.seq_len = 96"):
        opened(rows + useless, max_refused=1, too_long="error")
    with pytest.raises(ConfigError, match="files or from a task"):
        open_prompts(recipe_of(start, task={}), tokenizer, [])


def test_a_question_that_is_there_twice_is_on_one_side(tmp_path: Path, start: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"What is {n}?", "source": source} for source in "abc" for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for held_out in range(1, 12):
        prompts = open_prompts(recipe_of(start, task={"held_out": held_out}), tokenizer, [tmp_path / "a.jsonl"])
        asked = [{example["messages"][0]["content"] for example in side} for side in (prompts.held_out, prompts.take(0, len(prompts)))]
        assert not asked[0] & asked[1]
        assert held_out <= len(prompts.held_out) <= held_out + 2


def test_an_answer_is_the_content_that_the_template_holds(tokenizer: Tokenizer) -> None:
    v2 = tokenizer.with_template("v2")
    messages = [{"role": "user", "content": "What is 12 + 34?"}, {"role": "assistant", "content": "The answer is 46."}]
    prompt, whole = render(v2, messages[:1], add_generation_prompt=True).tokens, render(v2, messages).tokens
    draft = _Draft(tuple(prompt), {"messages": messages[:1]}, 0, 0)
    draft.tokens, draft.finish_reason = whole[len(prompt) :], "stop"
    assert draft.finished(SimpleNamespace(tokenizer=v2)).text == "The answer is 46."
