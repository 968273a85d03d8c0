"""Reward models: losses against loops, scores that no neighbour changes, folders that transformers reads, runs that resume bit for bit."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_runs import SHAPE, make_pairs, make_start, make_tokenizer, reward_recipe, with_threads

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.layout import save_checkpoint
from dsv2.cli import main
from dsv2.config import load_recipe
from dsv2.data.loader import sequential_batches
from dsv2.errors import CheckpointError, ConfigError, DataError, RequestError
from dsv2.metrics import read_metrics
from dsv2.model.init import initialise
from dsv2.presets import preset
from dsv2.rl.calibration import calibrate, calibrate_margins
from dsv2.rl.preference_data import open_preferences
from dsv2.rl.preference_recipe import RewardLossSection, RewardRecipe
from dsv2.rl.reward_losses import bradley_terry, logistic
from dsv2.rl.reward_model import OffloadedRewardModel, RewardModel
from dsv2.rl.reward_training import RewardObjective, form_of, held_out_figures, train_reward_model
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.muon import hidden_matrices
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


@pytest.fixture
def model(start) -> RewardModel:
    """With a head that is not 0."""
    source = load_model(start)
    model = RewardModel(source.config)
    model.model.load_state_dict(source.model.state_dict())
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score_head.weight)
    return model.eval()


def trained(start, pairs, out, **sections):
    recipe, opened = open_start(reward_recipe(start, **sections), None)
    data = open_preferences(recipe, opened.tokenizer, [pairs], form=form_of(recipe.loss))
    return train_reward_model(recipe, opened, data, out), data


def test_muon_has_the_matrices_that_it_has_in_a_language_model(start, pairs, tmp_path):
    model, _ = trained(start, pairs, tmp_path, optimizer={"kind": "muon"})
    assert hidden_matrices(model).keys() == hidden_matrices(load_model(start)).keys()
    assert any(model.score_head.weight.flatten().tolist())


def test_losses_are_their_formulas():
    torch.manual_seed(0)
    good, bad = torch.randn(2, 7, dtype=torch.float64, requires_grad=True).unbind()
    expected = [-math.log(1 / (1 + math.exp(b - g))) + 0.1 * (g + b) ** 2 for g, b in zip(good.tolist(), bad.tolist(), strict=True)]
    assert bradley_terry(good, bad, centring=0.1).tolist() == pytest.approx(expected, abs=1e-12)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0.5], dtype=torch.float64)
    p = [1 / (1 + math.exp(-g)) for g in good.tolist()]
    expected = [-y * math.log(q) - (1 - y) * math.log(1 - q) for q, y in zip(p, labels.tolist(), strict=True)]
    assert logistic(good, labels).tolist() == pytest.approx(expected, abs=1e-12)
    both = torch.stack([good, bad]).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bradley_terry(x[0], x[1], centring=0.1), both)


def test_a_score_is_the_same_alone_and_among_others(model):
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 300, size=n).tolist() for n in (5, 60, 1, 33, 5, 17)]
    alone = [model.rewards(model(torch.tensor([ids])).hidden[:, -1]).item() for ids in answers]
    for tokens_at_once in (1, 40, 10_000):
        assert model.score(answers, tokens_at_once=tokens_at_once) == pytest.approx(alone, abs=1e-5)
    assert model.score(list(reversed(answers))) == pytest.approx(alone[::-1], abs=1e-5)
    assert len({round(score, 3) for score in alone}) == len(alone)
    with pytest.raises(RequestError, match="answer 1 has 65 tokens"):
        model.score([[1], [1] * 65])


def test_the_reward_of_a_step_is_that_of_the_answer_up_to_its_end(model):
    rng = np.random.default_rng(1)
    answers = [rng.integers(0, 300, size=n).tolist() for n in (5, 60, 1, 33)]
    ends = [[0, 2, 4], [10, 59], [0], [31]]
    alone = [model.score([ids[: end + 1] for end in own]) for ids, own in zip(answers, ends, strict=True)]
    for tokens_at_once in (1, 10_000):
        found = model.score_steps(answers, ends, tokens_at_once=tokens_at_once)
        for own, expected in zip(found, alone, strict=True):
            assert own == pytest.approx(expected, abs=1e-5)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what lies in memory")
def test_an_idle_reward_model_takes_no_memory(tmp_path, monkeypatch):
    model = RewardModel(preset("tour", vocab_size=2**17, **SHAPE | {"hidden_size": 128}))
    initialise(model, 0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    save_checkpoint(tmp_path / "rm", model, make_tokenizer())
    expected = model.score([[1, 2, 3]])
    del model
    seen, scored = [], RewardModel.score_steps

    def watched(model, *arguments, **options):
        seen.append(resident())
        return scored(model, *arguments, **options)

    monkeypatch.setattr(RewardModel, "score_steps", watched)
    before = resident()
    offloaded = OffloadedRewardModel(tmp_path / "rm")
    idle = resident()
    for _ in range(2):
        assert offloaded.score([[1, 2, 3]]) == expected
    (first, second), after = seen, resident()
    print(f"weights {weights / 1e6:.1f} MB; idle {(idle - before) / 1e6:+.1f}, scoring {(first - before) / 1e6:+.1f}, {after - before:+,}")
    assert min(first, second) - before > 0.9 * weights, "then it is there"
    assert max(idle, after) - before < 0.1 * weights


def test_a_reward_model_that_does_not_fit_is_refused_at_once(model, start, tmp_path):
    save_checkpoint(tmp_path / "rm", model, make_tokenizer())
    OffloadedRewardModel(tmp_path / "rm", make_tokenizer())
    with pytest.raises(ConfigError, match="has another tokenizer than the policy"):
        OffloadedRewardModel(tmp_path / "rm", train_tokenizer(["other words"], vocab_size=384))
    with pytest.raises(ConfigError, match=r"reads 64 tokens; prompts and answers may have run.seq_len = 65"):
        OffloadedRewardModel(tmp_path / "rm", make_tokenizer(), 65)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        OffloadedRewardModel(tmp_path / "none")
    with pytest.raises(CheckpointError):
        OffloadedRewardModel(start)


def test_a_packed_batch_has_the_loss_of_its_pairs_alone(start, pairs, model):
    recipe, opened = open_start(reward_recipe(start), None)
    rows = open_preferences(recipe, opened.tokenizer, [pairs], form=form_of(recipe.loss)).rows
    scores = model.score([tokens.tolist() for tokens in rows.answers.tokens])
    expected = sum(math.log1p(math.exp(bad - good)) for good, bad in zip(scores[::2], scores[1::2], strict=True))
    objective = RewardObjective(RewardLossSection(), rows)
    batches = list(sequential_batches(rows, 3))
    assert sum(objective.losses(model, batch, recompute=False).nll.item() for batch in batches) == pytest.approx(expected, abs=1e-3)
    assert sum(objective.count(batch) for batch in batches) == len(scores) // 2
    assert len(rows) < len(scores) // 2, "several pairs in a row"


def test_held_out_loss_of_soft_labels_is_the_cross_entropy(start, model, tmp_path):
    labels = [0.1 * n for n in range(11)]
    rows = ({"prompt": f"{n} river", "completion": "stone", "score": label} for n, label in enumerate(labels))
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = reward_recipe(start, loss={"kind": "logistic"}, data={"validation_share": 0})
    packed = open_preferences(recipe, make_tokenizer(), [tmp_path / "soft.jsonl"], form=form_of(recipe.loss)).rows
    rewards = torch.tensor(model.score([tokens.tolist() for tokens in packed.answers.tokens]), dtype=torch.float64)
    expected = logistic(rewards, torch.tensor(packed.answers.scores, dtype=torch.float64)).mean().item()
    assert held_out_figures(model, packed, recipe.loss, 2, None)["loss"] == pytest.approx(expected, abs=1e-5)


def test_transformers_reads_the_folder_and_gives_the_same_scores(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_checkpoint(tmp_path / "rm", model, make_tokenizer())
    ids = torch.arange(3, 40)[None]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        assert theirs(ids).logits.item() == pytest.approx(model.score(ids.tolist())[0], abs=1e-4)
    again = RewardModel.load(tmp_path / "rm")
    assert again.score(ids.tolist()) == model.score(ids.tolist())
    with pytest.raises(CheckpointError, match="holds a reward model; a language model is needed"):
        load_model(tmp_path / "rm")


@pytest.mark.parametrize("kind", ["pairwise", "logistic", "squared"])
def test_it_learns_the_rule(start, pairs, tmp_path, kind):
    loss = {"kind": kind} | ({"centring": 0.01} if kind == "pairwise" else {})
    model, data = trained(start, pairs, tmp_path, run={"epochs": 12, "validate_every": 100}, loss=loss)
    (held,) = data.held_out.values()
    scores = np.array(model.score([tokens.tolist() for tokens in held.answers.tokens]))
    assert (scores[::2] > scores[1::2]).mean() > 0.95, "held-out pairs are decided as the rule says"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    if kind != "squared":
        assert lines[-1]["accuracy"]["pairs"] > 0.95
        assert sum(lines[-1]["margins"]["pairs"][1]) == len(scores) // (2 if kind == "pairwise" else 1)
    first = next(line for line in lines if line["kind"] == "train")
    assert first["loss"] == pytest.approx({"pairwise": math.log(2), "logistic": math.log(2), "squared": 0.5}[kind], abs=1e-6)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_stopped_and_resumed_is_undisturbed(start, pairs, tmp_path, monkeypatch, lora):
    model, data = trained(start, pairs, tmp_path / "peace", lora=lora)
    with stopping_after(5, monkeypatch):
        trained(start, pairs, tmp_path / "stopped", lora=lora)
    trained(start, pairs, tmp_path / "stopped", lora=lora)
    require_equal(tmp_path / "stopped", tmp_path / "peace")
    answers = [tokens.tolist() for tokens in data.rows.answers.tokens[:8]]
    assert model.score_head.weight.any(), "trained itself, with adapters too"
    assert RewardModel.load(tmp_path / "stopped").score(answers) == pytest.approx(model.score(answers), abs=1e-5)


def test_the_command_trains_and_the_run_goes_on_from_a_reward_model(start, pairs, tmp_path, capsys):
    small = ["batch.sequences=4", "batch.micro_sequences=2", "run.precision=fp32"]
    assert main(["reward", str(start), *small, "--data", str(pairs), "--out", str(tmp_path / "run")]) == 0
    assert "150 of them preferences: 150 as pair" in capsys.readouterr().err
    resolved = load_recipe(str(tmp_path / "run" / "recipe.toml"), RewardRecipe, folder="reward")
    assert resolved.run.seq_len == 128, "the contexts of two answers"
    again = ["reward", str(tmp_path / "run"), *small, "--data", str(pairs), "--out", str(tmp_path / "more")]
    assert main(again) == 0
    assert main(again) == 2
    assert "--resume" in capsys.readouterr().err
    scored = tmp_path / "scored.jsonl"
    scored.write_text(json.dumps({"prompt": "a", "completion": "b", "score": 3}) + "\n")
    with pytest.raises(DataError, match="beyond 0 to 1"):
        open_preferences(reward_recipe(start), make_tokenizer(), [scored], form=form_of(RewardLossSection(kind="logistic")))


def test_calibration_of_known_probabilities():
    perfect = calibrate([0.25] * 4 + [0.75] * 4, [1, 0, 0, 0, 1, 1, 1, 0])
    assert (perfect.predicted, perfect.observed, perfect.counts) == ((0.25, 0.75), (0.25, 0.75), (4, 4))
    assert perfect.error == 0
    sure = calibrate_margins([100.0, 100.0, -100.0, -100.0])  # certain, and wrong half the time
    assert sure.error == pytest.approx(0.5)
    assert calibrate_margins([0.0, 0.0]).observed == (0.5,), "a tie says nothing"
