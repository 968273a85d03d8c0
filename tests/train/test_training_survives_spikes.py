"""Spikes are skipped, many in a row roll back, what is not finite stops the run with its batch saved; and all of it resumes bit for bit."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import guarded, stopping_after, without_times

from dsv2.checkpoint.layout import load_guard
from dsv2.checkpoint.steps import checkpoints, latest_checkpoint
from dsv2.data import mixture
from dsv2.data.loader import Loader
from dsv2.data.mixture import Mixture
from dsv2.data.packing import Rows
from dsv2.errors import Dsv2Error
from dsv2.files import sha256_of
from dsv2.metrics import read_metrics
from dsv2.train import step as step_module
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.schedule import steps_of
from dsv2.train.step import TrainingDiverged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def inject(monkeypatch, corpus) -> Callable[..., None]:
    """inject(recipe, {step: factor}): the cross-entropy of these steps' first micro-batch is multiplied, whenever the batch is seen."""
    real = step_module.batch_losses

    def put(recipe: PretrainRecipe, factors: dict[int, float]) -> None:
        steps = list(steps_of(recipe.batch, recipe.run.seq_len, recipe.run.tokens))
        rows = Mixture(corpus.train, recipe.run.seq_len, recipe.mixture, seed=recipe.run.seed) if recipe.mixture else None
        loader = Loader(rows or Rows(corpus.train, recipe.run.seq_len), seed=recipe.run.seed)
        bad = {loader.batch(*steps[step - 1]).split(4)[0].tokens.numpy().tobytes(): factor for step, factor in factors.items()}

        def spiking(model, batch, balance, **rest):
            losses = real(model, batch, balance, **rest)
            return replace(losses, nll=losses.nll * bad.get(batch.tokens.numpy().tobytes(), 1.0))

        monkeypatch.setattr(step_module, "batch_losses", spiking)

    return put


def test_a_new_stage_of_the_curriculum_is_no_spike(corpus, tmp_path, inject, monkeypatch):
    """Its loss may be of another height; the guard learns it anew, and then catches what stands out of it."""
    monkeypatch.setattr(mixture, "BLOCK", 8)
    stages = [{"weights": {"a": 1.0}, "tokens": 12 * 8 * 32}, {"weights": {"b": 1.0}}]
    staged = guarded(mixture={"stages": stages})
    sizes = list(steps_of(staged.batch, staged.run.seq_len, staged.run.tokens))
    switch = next(step for step, (consumed, _) in enumerate(sizes, start=1) if consumed >= 12 * 8)
    assert staged.guard.window // 2 < switch < len(sizes) - staged.guard.window
    inject(staged, dict.fromkeys(range(switch, len(sizes) + 1), 50.0) | {len(sizes): 5000.0})
    pretrain(staged, corpus, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("skipped")] == [len(sizes)]


def weights(folder):
    return sha256_of(folder / "model.safetensors"), sha256_of(folder / "training" / "optimizer.safetensors")


def test_a_spike_is_skipped_and_logged(corpus, tmp_path, inject):
    inject(guarded(), {9: 50.0})
    pretrain(guarded(), corpus, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("skipped")] == [9]
    (spike,) = [line for line in lines if line["kind"] == "spike"]
    train = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert (spike["step"], spike["what"], spike["action"], spike["in_a_row"]) == (9, "loss", "skipped", 1)
    assert spike["value"] == train[9]["loss"] > spike["limit"] > train[8]["loss"]
    assert spike["first_sample"] == train[8]["consumed_samples"]
    assert train[10]["loss"] < spike["limit"] and len(train) == max(train)
    assert {"dropped", "computed_max", "device_load", "sends_per_token"} <= train[9]["router"].keys()
    assert sum(train[step]["router"]["dropped"][0] for step in train) > 0


def test_many_in_a_row_roll_back_and_the_data_go_on(corpus, tmp_path, inject):
    inject(guarded(), {10: 50.0, 11: 60.0, 12: 50.0})
    pretrain(guarded(run=guarded().run.model_dump() | {"keep": 20}), corpus, tmp_path)
    spikes = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "spike"]
    assert [line["action"] for line in spikes] == ["skipped", "skipped", "rolled back to step 8"]
    assert weights(tmp_path / "step-12") == weights(tmp_path / "step-8")
    assert weights(tmp_path / "step-16") != weights(tmp_path / "step-8")
    assert load_guard(tmp_path / "step-12")["losses"] == load_guard(tmp_path / "step-8")["losses"], "old weights, judged by old losses"
    train = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    assert train[-1]["consumed_samples"] >= 6144 // 32


@pytest.mark.parametrize(("every", "keep", "step"), [(4, 3, 8), (1, 1, 10)])
def test_a_checkpoint_written_amid_spikes_is_not_what_a_rollback_restores(corpus, tmp_path, inject, every, keep, step):
    changed = guarded(run=guarded().run.model_dump() | {"checkpoint_every": every, "keep": keep})
    inject(changed, {11: 50.0, 12: 60.0, 13: 50.0})
    pretrain(changed, corpus, tmp_path)
    assert f"rolled back to step {step}" in [line.get("action") for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(checkpoints(tmp_path)) == keep


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({5: 50.0, 6: 60.0, 7: 50.0}, "no checkpoint from before"),
        (dict.fromkeys(range(10, 16), 50.0), "a checkpoint was restored already"),
    ],
)
def test_spikes_without_end_stop_the_run(corpus, tmp_path, inject, factors, says):
    changed = guarded(run=guarded().run.model_dump() | {"checkpoint_every": 9})
    inject(changed, factors)
    with pytest.raises(Dsv2Error, match=says):
        pretrain(changed, corpus, tmp_path)


@pytest.mark.parametrize(("precision", "stop_at"), [("fp32", 10), ("fp32", 13), ("bf16", 11)])
def test_stopped_amid_spikes_and_resumed_is_undisturbed(corpus, tmp_path, monkeypatch, inject, precision, stop_at):
    """Dropping, recompute, guard and rollback at work; every stop lies in or beside the series of spikes."""
    recipe = guarded(run=guarded().run.model_dump() | {"precision": precision})
    inject(recipe, {10: 50.0, 11: 60.0, 12: 50.0, 15: 50.0})
    pretrain(recipe, corpus, tmp_path / "peace")
    with stopping_after(stop_at, monkeypatch):
        pretrain(recipe, corpus, tmp_path / "stopped")
    pretrain(recipe, corpus, tmp_path / "stopped")
    last = latest_checkpoint(tmp_path / "peace")
    assert weights(last) == weights(tmp_path / "stopped" / last.name)
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "peace")
    assert len([line for line in without_times(tmp_path / "peace") if line["kind"] == "spike"]) == 4


def test_what_is_not_finite_stops_the_run_and_leaves_its_batch(corpus, tmp_path, monkeypatch, inject):
    recipe = guarded()
    pretrain(recipe, corpus, tmp_path / "peace")
    real = step_module.batch_losses
    inject(recipe, {7: float("nan")})
    with pytest.raises(TrainingDiverged) as caught:
        pretrain(recipe, corpus, tmp_path / "stopped")
    steps = list(steps_of(recipe.batch, 32, 6144))
    consumed, size = steps[6]
    saved = tmp_path / "stopped" / "diverged-step-7.npz"
    for part in ("micro-batch 0", "step 7", f"samples {consumed} to {consumed + size - 1}", str(saved), "\nhint: "):
        assert part in str(caught.value)
    expected = Loader(Rows(corpus.train, 32), seed=0).batch(consumed, size)
    with np.load(saved) as found:
        for name in ("tokens", "labels", "positions", "document_ids"):
            assert torch.equal(torch.from_numpy(found[name]), getattr(expected, name)), name
        assert found["sample_ids"].tolist() == list(range(consumed, consumed + size))
        assert int(found["step"]) == 7 and "nan" in str(found["error"])
    monkeypatch.setattr(step_module, "batch_losses", real)  # the cause is gone: the run goes on as if nothing had been
    pretrain(recipe, corpus, tmp_path / "stopped")
    last = latest_checkpoint(tmp_path / "peace")
    assert weights(last) == weights(tmp_path / "stopped" / last.name)


def test_validation_never_drops(corpus, tmp_path, monkeypatch):
    """The last checkpoint's held-out loss is that of a plain forward pass."""
    import dsv2.model.moe as moe

    pretrain(guarded(), corpus, tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "validation"]

    def refuse(*_args):
        raise AssertionError("dropped outside of training")

    from dsv2.checkpoint.huggingface import load_model
    from dsv2.train.validation import validate

    monkeypatch.setattr(moe, "drop_assignments", refuse)
    domains = validate(load_model(latest_checkpoint(tmp_path)), corpus.validation, 32, batch_rows=4, autocast=None)
    assert {name: domain.loss for name, domain in domains.items()} == lines[-1]["loss"]
