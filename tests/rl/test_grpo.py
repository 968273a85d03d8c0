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
from dsv2.model.transformer import Transformer
from dsv2.progress import read_metrics
from dsv2.rl import grpo
from dsv2.rl.evaluate import pass_at
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.objective import PRESETS
from dsv2.rl.prompts import Prompts, open_prompts
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.rollout import _Draft
from dsv2.tokenizer.chat import render
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.sft import open_start

SECTIONS = {
    "run": {"steps": 4, "seq_len": 96, "validate_every": 2, "checkpoint_every": 1, "keep": 9},
    "learning_rate": {"peak": 2e-3, "warmup_steps": 0},
    "reward": [{"name": "length", "most_tokens": 6}],
    "task": {"name": "arithmetic", "held_out": 4, "samples": 2},
    "rollout": {"prompts": 3, "group_size": 4, "max_tokens": 12, "max_batch": 8},
    "update": {"updates": 2, "micro_tokens": 200},
    "reference": {"refresh_every": 2},
}  # fmt: skip


@pytest.fixture
def start(tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> Path:
    save_checkpoint(tmp_path / "start", policy, tokenizer)
    return tmp_path / "start"


def recipe_of(start: Path, **sections: object) -> GrpoRecipe:
    return GrpoRecipe.model_validate(SECTIONS | {"model": {"start": str(start)}} | sections)


def train(recipe: GrpoRecipe, out: Path, **more: object) -> Transformer:
    opened = open_start(recipe.model, recipe.run.seq_len)
    return grpo.train(recipe, opened, open_prompts(recipe, opened.tokenizer, []), out, **more)


def state(out: Path) -> tuple[list[torch.Tensor], list[dict], list[dict]]:
    weights = list(load_model(out / "step-4").state_dict().values())
    timeless = [
        {name: value for name, value in line.items() if not name.endswith(("_s", "step_time"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    return weights, timeless, read_metrics(out / grpo.ROLLOUTS)


def test_a_run_stopped_at_any_step_ends_the_same(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(start)
    train(recipe, tmp_path / "whole")
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
            train(recipe, tmp_path / "stopped")
    monkeypatch.setattr(grpo._Run, "_sample", sample)
    train(recipe, tmp_path / "stopped")
    weights, metrics, rollouts = state(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(weights, expected[0], strict=True))
    assert metrics == expected[1] and rollouts == expected[2] and len(rollouts) == 4 * 12
    line = next(line for line in metrics if line["kind"] == "grpo")
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/length/mean", "completions/mean_length", "kl", "entropy",
            "clip_ratio/region_mean", "sampling/sampling_logp_difference/max", "num_tokens"} <= line.keys()  # fmt: skip
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
    flat = recipe_of(start, objective={"kl_weight": 0.0}, optimizer={"weight_decay": 0.0})
    moved = train(flat, tmp_path / "flat", rewards=Rewards([Part("same", lambda rollouts: [1.0] * len(rollouts))]))
    before = load_model(start).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in moved.state_dict().items())


def test_groups_with_equal_rewards_are_drawn_anew(start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, objective={"drop_equal_groups": True, "kl_weight": 0.0}, run=SECTIONS["run"] | {"steps": 2})
    picky = Rewards([Part("picky", lambda rollouts: [float(r.group == 4 and r.index == 0) for r in rollouts])])
    train(recipe, tmp_path / "run", rewards=picky)
    first = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "grpo")
    assert first["learned_from"] == 4 and first["consumed_prompts"] == 3 + 3 + 2  # three rounds; group 4 of the second one teaches


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
        found = grpo.objective_of(recipe_of(start, preset=name))
        assert found.ratio == objective.ratio and found.kl_weight == objective.kl_weight
    assert grpo.objective_of(recipe_of(start, preset="dr_grpo")).constant_len == 12
    assert grpo.objective_of(recipe_of(start, objective={"normalise": "constant"})).constant_len == 12
    with pytest.raises(ConfigError, match="both set the objective"):
        grpo.objective_of(recipe_of(start, preset="v2", objective={"clip_low": 0.1}))


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
    assert (kept.fingerprint, len(kept.report)) == (prompts.fingerprint, 5)
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


def test_pass_at_k_is_unbiased() -> None:
    assert pass_at(1, 4, 2) == 0.5 and pass_at(4, 4, 1) == 1.0 and pass_at(2, 4, 1) == 0.5 and pass_at(3, 4, 0) == 0.0
