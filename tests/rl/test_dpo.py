"""DPO: its loss by a loop and finite differences, packed log-probabilities and unpacked ones, a reference that stays, exact resume."""

import math
import shutil

import numpy as np
import pytest
import torch
from preference_runs import dpo_recipe, make_pairs, make_start, make_tokenizer, with_threads

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.layout import ADAPTER
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.cli import main
from dsv2.data.loader import sequential_batches
from dsv2.errors import CheckpointError, ConfigError, DataError
from dsv2.metrics import read_metrics
from dsv2.rl.dpo import DpoObjective, answer_log_probs, dpo_loss, reference_log_probs, train_dpo
from dsv2.rl.preference_data import only_pairs, open_preferences
from dsv2.rl.preference_recipe import DpoLossSection
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.start import open_start
from train.training_runs import require_equal, stopping_after


@pytest.fixture(autouse=True)
def two_threads():
    yield from with_threads(2)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def rows(start, pairs):
    recipe, opened = open_start(dpo_recipe(start))
    return open_preferences(recipe, opened.tokenizer, [pairs], form=only_pairs).rows


def trained(start, pairs, out, **sections):
    recipe, opened = open_start(dpo_recipe(start, **sections))
    return train_dpo(recipe, opened, open_preferences(recipe, opened.tokenizer, [pairs], form=only_pairs), out)


def test_the_loss_is_eq_7():
    torch.manual_seed(0)
    logps, reference = torch.randn(2, 5, 2, dtype=torch.float64)
    beta = 0.3
    expected = []
    for (won, lost), (ref_won, ref_lost) in zip(logps.tolist(), reference.tolist(), strict=True):
        sigma = 1 / (1 + math.exp(-beta * ((won - ref_won) - (lost - ref_lost))))
        expected.append((-math.log(sigma), -0.9 * math.log(sigma) - 0.1 * math.log(1 - sigma)))
    rewards = beta * (logps - reference)
    for smoothing, column in ((0.0, 0), (0.1, 1)):
        found = dpo_loss(rewards[:, 0], rewards[:, 1], label_smoothing=smoothing)
        assert found.tolist() == pytest.approx([e[column] for e in expected], abs=1e-12)
        assert torch.autograd.gradcheck(
            lambda x, s=smoothing: dpo_loss(x[:, 0], x[:, 1], label_smoothing=s), rewards.clone().requires_grad_()
        )


def test_packed_answers_have_the_log_probabilities_that_they_have_alone(start, rows):
    model = load_model(start)
    alone = []
    for tokens, learn in zip(rows.answers.tokens, rows.answers.learn, strict=True):
        ids = torch.from_numpy(tokens).long()
        log_probs = model.logits(model(ids[None]).hidden)[0].log_softmax(-1)
        assert 1 < learn.sum() < len(ids) - 2, "the answer and its end, not the prompt"
        alone.append(sum(log_probs[n - 1, ids[n]].item() for n in range(1, len(ids)) if learn[n]))
    found = [0.0] * len(alone)
    for batch in sequential_batches(rows, 3):
        log_probs, answers, _ = answer_log_probs(model, batch)
        for answer, value in zip(answers.tolist(), log_probs.tolist(), strict=True):
            found[answer] = value
    per_token = [value / learn.sum() for value, learn in zip(found, rows.answers.learn, strict=True)]
    assert per_token == pytest.approx([value / learn.sum() for value, learn in zip(alone, rows.answers.learn, strict=True)], abs=1e-5)


def test_at_the_reference_the_loss_is_ln_2_and_its_gradient_is_beta_over_2_of_the_log_ratio(start, rows, tmp_path):
    model = load_model(start)
    reference = reference_log_probs(tmp_path / "reference.npy", model, rows, 2, None)
    batch = next(sequential_batches(rows, 2))
    losses = DpoObjective(DpoLossSection(beta_dpo=0.2), reference).losses(model, batch, recompute=False)
    count = len(answer_log_probs(model, batch)[0]) // 2
    assert losses.nll.item() / count == pytest.approx(math.log(2), abs=1e-5)
    assert losses.figures["rewards/margins"] == pytest.approx(0, abs=1e-4)
    weight = model.model.norm.weight
    (found,) = torch.autograd.grad(losses.nll, weight)
    log_probs = answer_log_probs(model, batch)[0].unflatten(0, (-1, 2))
    (expected,) = torch.autograd.grad(-0.2 / 2 * (log_probs[:, 0] - log_probs[:, 1]).sum(), weight)
    assert torch.allclose(found, expected, atol=1e-4)


def test_it_learns_to_prefer_the_chosen_answers(start, pairs, tmp_path):
    trained(start, pairs, tmp_path, run={"epochs": 4}, loss={"beta_dpo": 0.5}, data={"template": "v2", "validation_share": 0.2})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    held = [line for line in lines if line["kind"] == "evaluation"][-1]
    assert held["rewards/accuracies"]["pairs"] == 1.0
    assert held["rewards/margins"]["pairs"] > 0.5
    first, last = ([line for line in lines if line["kind"] == "train"][n] for n in (0, -1))
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)
    assert last["loss"] < 0.4 < first["loss"]
    load_model(latest_checkpoint(tmp_path))  # a language model still
    assert Tokenizer.load(latest_checkpoint(tmp_path)).template == "v2", "what it was trained with is what is read later"


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_stopped_and_resumed_is_undisturbed_and_keeps_its_reference(start, pairs, tmp_path, monkeypatch, lora):
    trained(start, pairs, tmp_path / "peace", lora=lora)
    with stopping_after(5, monkeypatch):
        trained(start, pairs, tmp_path / "stopped", lora=lora)
    before = np.load(tmp_path / "stopped" / "reference-logps.npy")
    trained(start, pairs, tmp_path / "stopped", lora=lora)
    assert (latest_checkpoint(tmp_path / "peace") / ADAPTER).exists() == (lora is not None)
    require_equal(tmp_path / "stopped", tmp_path / "peace")
    assert (np.load(tmp_path / "stopped" / "reference-logps.npy") == before).all()


def test_adapters_are_held_by_the_model_that_they_began_with_and_merged_where_they_are_kept(start, pairs, tmp_path):
    run = {"epochs": 4, "checkpoint_every": 100, "keep": 1}
    model = trained(start, pairs, tmp_path / "run", lora={"rank": 4, "alpha": 8}, run=run, learning_rate={"peak": 1e-2, "warmup_steps": 2})
    trained(start, pairs, tmp_path / "whole", run={"epochs": 0.5})
    assert np.array_equal(*(np.load(tmp_path / name / "reference-logps.npy") for name in ("run", "whole"))), "the base, bit for bit"
    base, kept = load_model(start), load_model(latest_checkpoint(tmp_path / "run"))
    assert torch.equal(model.lm_head.weight, base.lm_head.weight) and torch.equal(kept.lm_head.weight, base.lm_head.weight)
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(kept(tokens).hidden, model(tokens).hidden, rtol=0, atol=1e-5)
    assert (kept(tokens).hidden - base(tokens).hidden).abs().max() > 1e-2
    held = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "evaluation"][-1]
    assert held["rewards/accuracies"]["pairs"] > 0.9
    with pytest.raises(ConfigError, match="moves hidden matrices"):
        trained(start, pairs, tmp_path / "muon", lora={"rank": 4, "alpha": 8}, optimizer={"kind": "muon"})
    assert not (tmp_path / "muon" / "recipe.toml").exists()


def test_a_damaged_start_is_refused_before_anything_is_written(start, pairs, tmp_path):
    damaged = shutil.copytree(start, tmp_path / "damaged")
    file = next(damaged.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its hash"):
        trained(damaged, pairs, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_what_is_no_pair_or_no_reference_is_refused(start, rows, tmp_path, capsys):
    (tmp_path / "point.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    with pytest.raises(DataError, match="one answer with a score"):
        trained(start, tmp_path / "point.jsonl", tmp_path / "run")
    np.save(tmp_path / "reference.npy", np.zeros(3, dtype=np.float32))
    with pytest.raises(CheckpointError, match="the data has"):
        reference_log_probs(tmp_path / "reference.npy", load_model(start), rows, 2, None)
    assert main(["dpo", "tour", "--data", str(tmp_path / "point.jsonl"), "--out", str(tmp_path / "run")]) == 2
    assert "model.start is empty" in capsys.readouterr().err
