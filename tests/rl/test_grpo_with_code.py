"""GRPO as the recipe has it, with programs that run in the sandbox beside answers, a tool and importance weights; stopped and resumed."""

import json
import re
from pathlib import Path

import pytest
import torch

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.layout import save_checkpoint
from dsv2.metrics import read_metrics
from dsv2.model.transformer import Transformer
from dsv2.rl import grpo
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.grpo_shown import ROLLOUTS
from dsv2.rl.prompts import open_prompts
from dsv2.tasks import code
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.start import open_start

SAYS = {"1": 0.0, "<<": -0.8, "=": -0.8}  # logits of all that the policy says; its end is the fourth


@pytest.fixture
def start(tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> Path:
    """A policy that writes programs like 1 and 11, and calls like <<1=, whatever it is asked."""
    logits = {tokenizer.encode(text, add_bos=False)[0]: logit for text, logit in SAYS.items()} | {tokenizer.eos_id: -1.1}
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 50.0  # so that the head sees the same, whatever was read
        policy.lm_head.weight.mul_(0.1)[:, 0] = -3.0
        for token, logit in logits.items():
            policy.lm_head.weight[token, 0] = logit / policy.config.hidden_size**0.5
    save_checkpoint(tmp_path / "start", policy, tokenizer)
    return tmp_path / "start"


def train(start: Path, out: Path, steps: int = 2, **objective: object) -> None:
    rows = [{"prompt": f"Write nothing, {n} times.", "tests": {"inputs": [""], "outputs": [""]}} for n in range(4)]
    rows += [{"prompt": f"What is 1 times 1, {n} times over?", "answer": 1} for n in range(4)]
    (start.parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = GrpoRecipe.model_validate({
        "model": {"start": str(start)}, "run": {"steps": steps, "seq_len": 96, "checkpoint_every": 1, "keep": 9}, "task": {"held_out": 0},
        "learning_rate": {"peak": 2e-3, "warmup_steps": 0}, "reward": [{"name": "answer"}, {"name": "code", "memory_mib": 128}],
        "rollout": {"prompts": 4, "group_size": 8, "max_tokens": 12, "tool": "calculator"}, "objective": {"kl_weight": 0.0, **objective},
    })  # fmt: skip
    recipe, opened = open_start(recipe)
    grpo.train(recipe, opened, open_prompts(recipe, opened.tokenizer, [start.parent / "prompts.jsonl"]), out)


def steps_of(run: Path) -> list[dict]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.endswith(("_s", "step_time"))} for line in lines]


def test_programs_answers_a_tool_and_importance_weights_survive_a_stop(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighted = {"correction": "truncate", "correction_cap": 0.5}
    train(start, tmp_path / "whole", **weighted)
    graded, calls = code.grade_all, []

    def stopped(*given: object, **options: object) -> list:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return graded(*given, **options)

    monkeypatch.setattr(code, "grade_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "stopped", **weighted)
    assert [path.name for path in (tmp_path / "stopped").glob("step-*")] == ["step-1"]
    train(start, tmp_path / "stopped", **weighted)
    whole, resumed = (load_model(tmp_path / name / "step-2").state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    rollouts = read_metrics(tmp_path / "whole" / ROLLOUTS)
    assert read_metrics(tmp_path / "stopped" / ROLLOUTS) == rollouts
    lines = steps_of(tmp_path / "whole")
    assert steps_of(tmp_path / "stopped") == lines

    earned = [row["rewards"] for row in rollouts]
    assert {(name, value) for one in earned for name, value in one.items()} == {(n, v) for n in ("code", "answer") for v in (0.0, 1.0)}
    assert all(len(one) == 1 for one in earned), "each prompt is judged by what it has"
    assert all(line["unscored"] == 0 and line["rewards/code/not_asked"] + line["rewards/answer/not_asked"] == 32 for line in lines)
    assert any(re.search(r"<<1+=1+>>", row["text"]) for row in rollouts), "the tool was called"
    train(start, tmp_path / "unweighted", steps=1)
    unweighted = steps_of(tmp_path / "unweighted")[0]["grad_norm"]
    assert 0 < lines[0]["grad_norm"] == pytest.approx(unweighted / 2, rel=1e-3), "weights of 1, cut at 0.5"
