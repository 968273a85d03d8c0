"""Runs that continue a checkpoint's weights, and what a recipe prescribes and a run cannot do is refused."""

import json

import numpy as np
import pytest
import torch
from training_runs import RECIPE, recipe

from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import CheckpointError, ConfigError
from dsv2.files import sha256_of
from dsv2.metrics import read_metrics
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.corpus import Corpus
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


def continued(start, **sections):
    return PretrainRecipe.model_validate(RECIPE | {"model": RECIPE["model"] | {"start": str(start)}} | sections)


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def test_weights_and_nothing_else_come_from_the_checkpoint(corpus, tmp_path):
    pretrain(recipe(), corpus, tmp_path / "base")
    last = latest_checkpoint(tmp_path / "base")
    cosine = {"peak": 1e-3, "warmup_steps": 2, "decay": "cosine"}
    pretrain(continued(tmp_path / "base", learning_rate=cosine), corpus, tmp_path / "more")
    rates = [line["lr"] for line in read_metrics(tmp_path / "more" / "metrics.jsonl") if line["kind"] == "train"]
    assert losses(tmp_path / "more")[0] < losses(tmp_path / "base")[0] - 0.2
    assert rates[0] == pytest.approx(5e-4) and min(rates[2:]) == rates[-1] and rates[-1] < 2e-4
    plan = json.loads((tmp_path / "more" / "plan.json").read_text())
    assert plan["start"] == sha256_of(last / "manifest.json")
    # moments begin at zero: the checkpoint without its training/ folder starts the same run
    import shutil

    shutil.copytree(last, tmp_path / "exported")
    shutil.rmtree(tmp_path / "exported" / "training")
    (tmp_path / "exported" / "manifest.json").unlink()
    pretrain(continued(tmp_path / "exported", learning_rate=cosine), corpus, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "more")
    # a run that has its own checkpoints no longer needs the one that it began from
    shutil.rmtree(tmp_path / "exported")
    pretrain(continued(tmp_path / "exported", learning_rate=cosine), corpus, tmp_path / "again")


def test_a_start_that_does_not_fit_is_refused(corpus, tmp_path):
    pretrain(recipe(), corpus, tmp_path / "base")
    with pytest.raises(ConfigError, match=r"model\.start is empty"):
        pretrain(continued(""), corpus, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        pretrain(continued(tmp_path / "nowhere"), corpus, tmp_path / "run")
    wide = RECIPE["model"]["overrides"] | {"intermediate_size": 96}
    other = continued("x").model_copy(update={"model": continued(tmp_path / "base").model.model_copy(update={"overrides": wide})})
    with pytest.raises(ConfigError, match="different: intermediate_size"):
        pretrain(other, corpus, tmp_path / "run")
    letters = np.random.default_rng(1).choice(list("abcdefghijklmnopqrstuvwxyz"), size=(80, 7))
    text = " ".join("".join(word) for word in letters)
    tokenizer = train_tokenizer([text] * 3, vocab_size=corpus.tokenizer.vocab_size)
    assert tokenizer.vocab_size == corpus.tokenizer.vocab_size
    with pytest.raises(ConfigError, match="another tokenizer"):
        pretrain(continued(tmp_path / "base"), Corpus(corpus.train, corpus.validation, tokenizer), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a failed start leaves nothing behind"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"mixture": {"stages": [{"weights": {"c": 1}}]}}, "no domain 'c'"),
        ({"model": {**RECIPE["model"], "overrides": RECIPE["model"]["overrides"] | {"n_group": 1, "topk_method": "greedy"}},
          "balance": {"expert": 0.01}, "dropping": {"capacity_factor": 1.0}}, "n_group > 1"),
    ],
)  # fmt: skip
def test_what_a_run_would_have_to_ignore_is_refused(corpus: Corpus, tmp_path, sections, says):
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        pretrain(PretrainRecipe.model_validate(RECIPE | sections), corpus, tmp_path / "run")


def test_a_profiled_run_leaves_a_trace_and_the_same_weights(corpus, tmp_path, capsys):
    pretrain(recipe(), corpus, tmp_path / "plain")
    pretrain(recipe(profile_steps=2), corpus, tmp_path / "profiled")
    events = json.loads((tmp_path / "profiled" / "trace.json").read_text())["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)
    assert "aten::" in capsys.readouterr().err
    last = latest_checkpoint(tmp_path / "plain")
    assert sha256_of(last / "model.safetensors") == sha256_of(tmp_path / "profiled" / last.name / "model.safetensors")
    pretrain(recipe(), corpus, tmp_path / "profiled")  # how a run is looked at is no part of what it is


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_enforced_or_waived(corpus, tmp_path, wanted):
    pretrain(recipe(deterministic=wanted, tokens=256), corpus, tmp_path)
    assert torch.are_deterministic_algorithms_enabled() is wanted


def test_a_run_too_short_to_profile_says_so(corpus, tmp_path, capsys):
    pretrain(recipe(profile_steps=2, tokens=32), corpus, tmp_path)
    assert "nothing was profiled" in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()


def test_initial_values_scaled_by_width():
    """sigma = 0.006 sqrt(5120 / d): the published deviation at the published width, and the same spread of a layer's outputs at others."""
    for hidden, expected in ((5120, 0.006), (1280, 0.012), (32, 0.006 * 160**0.5)):
        overrides = RECIPE["model"]["overrides"] | {"hidden_size": hidden}
        scaled = PretrainRecipe.model_validate(RECIPE | {"model": {"preset": "tour", "overrides": overrides, "init": "width"}})
        assert scaled.model_config_for(None).initializer_range == pytest.approx(expected)
    plain = PretrainRecipe.model_validate(RECIPE)
    assert plain.model_config_for(None).initializer_range == 0.02
    twice = PretrainRecipe.model_validate(RECIPE | {"model": {"preset": "tour", "overrides": {"initializer_range": 0.05}, "init": "width"}})
    with pytest.raises(ConfigError, match="initializer_range"):
        twice.model_config_for(None)
