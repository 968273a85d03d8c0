"""Pre-training stopped at any step and resumed is the undisturbed run, bit for bit, with two threads."""

import pytest
import torch
from training_runs import RECIPE, recipe, require_equal, stopping_after

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.steps import checkpoints, latest_checkpoint
from dsv2.errors import CheckpointError, ConfigError, DataError, Dsv2Error
from dsv2.files import sole_use
from dsv2.metrics import read_metrics
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.corpus import Corpus
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_stopped_and_resumed_is_undisturbed(corpus, tmp_path, monkeypatch, precision, stop_at):
    pretrain(recipe(precision=precision), corpus, tmp_path / "peace")

    with stopping_after(stop_at, monkeypatch):
        pretrain(recipe(precision=precision), corpus, tmp_path / "stopped")
    pretrain(recipe(precision=precision), corpus, tmp_path / "stopped")

    require_equal(tmp_path / "stopped", tmp_path / "peace")
    assert len(checkpoints(tmp_path / "peace")) == 2


def test_metrics_hold_what_the_report_reads(corpus, tmp_path):
    pretrain(recipe(), corpus, tmp_path, sample=lambda model: [("a prompt", "a text")])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    assert train[-1]["tokens"] >= 3072
    assert train[-1]["loss"] < train[0]["loss"]
    assert len(train[0]["load"]) == 1
    assert sum(train[0]["load"][0]) == pytest.approx(1, abs=1e-3)
    sizes = [b["consumed_samples"] - a["consumed_samples"] for a, b in zip(train, train[1:], strict=False)]
    assert sizes[0] == 4
    assert sizes[-1] == 8
    validation = [line for line in lines if line["kind"] == "validation"]
    assert set(validation[-1]["bits_per_byte"]) == {"a", "b"}
    assert any(line["kind"] == "sample" for line in lines)


def test_a_damaged_checkpoint_is_refused(corpus, tmp_path):
    pretrain(recipe(), corpus, tmp_path)
    weights = latest_checkpoint(tmp_path) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its hash"):
        pretrain(recipe(), corpus, tmp_path)
    weights.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(weights.parent)


def test_samples_may_change_when_a_run_goes_on(corpus, tmp_path):
    pretrain(recipe(tokens=512), corpus, tmp_path)
    changed = recipe(tokens=512)
    pretrain(changed.model_copy(update={"samples": changed.samples.model_copy(update={"max_tokens": 3})}), corpus, tmp_path)
    with pytest.raises(ConfigError, match="batch"):
        pretrain(changed.model_copy(update={"batch": changed.batch.model_copy(update={"micro_sequences": 2})}), corpus, tmp_path)


def test_a_run_belongs_to_one_process_at_a_time(corpus, tmp_path):
    pretrain(recipe(tokens=512), corpus, tmp_path)
    with sole_use(tmp_path), pytest.raises(ConfigError, match="another process works in"):
        pretrain(recipe(tokens=512), corpus, tmp_path)
    pretrain(recipe(tokens=512), corpus, tmp_path)


def test_divergence_stops_with_a_clear_error(corpus, tmp_path):
    diverging = RECIPE | {"learning_rate": {"peak": 1e30, "warmup_steps": 0}}
    with pytest.raises(Dsv2Error, match="training diverged"):
        pretrain(PretrainRecipe.model_validate(diverging), corpus, tmp_path)


def test_shards_of_another_tokenizer_are_refused(corpus, tmp_path):
    folder = tmp_path / "data"
    train_tokenizer(["another text altogether, with other words"], vocab_size=384).save(folder / "tokenizer")
    (folder / "train").symlink_to(corpus.train.folder)
    with pytest.raises(DataError, match="was written with the tokenizer"):
        Corpus.open(folder)


def test_a_mixture_is_read_and_too_many_epochs_are_refused(corpus, tmp_path, capsys):
    only = {"mixture": {"stages": [{"weights": {"a": 1}}]}}
    trained = [
        pretrain(PretrainRecipe.model_validate(RECIPE | extra), corpus, tmp_path / name)
        for name, extra in (("plain", {}), ("only", only), ("same", only))
    ]
    plain, one, same = (model.lm_head.weight for model in trained)
    assert "epochs by domain: a " in capsys.readouterr().err
    assert torch.equal(one, same)
    assert not torch.equal(one, plain)
    long = {"mixture": {"stages": [{"epochs": {"a": 10_000}}, {"weights": {"b": 1}}]}, "run": RECIPE["run"] | {"tokens": 256}}
    pretrain(PretrainRecipe.model_validate(RECIPE | long), corpus, tmp_path / "long")
    assert "ends in stage 1 of 2" in " ".join(capsys.readouterr().err.split())
    refused = {"mixture": {"stages": [{"weights": {"a": 1}}], "max_epochs": {"a": 0.5}}}
    with pytest.raises(ConfigError, match="a would be read .* times; at most 0.5"):
        pretrain(PretrainRecipe.model_validate(RECIPE | refused), corpus, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
