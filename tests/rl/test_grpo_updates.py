"""Updates of a run of GRPO: several on one batch, and in bf16."""

import json
from pathlib import Path

import pytest
import torch
from test_grpo import SECTIONS, recipe_of, train

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.metrics import read_metrics
from dsv2.model.transformer import Transformer
from dsv2.rl import grpo
from dsv2.rl import update as update_file
from dsv2.rl.update import LogProbsDiffer
from dsv2.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def start(tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> Path:
    save_checkpoint(tmp_path / "start", policy, tokenizer)
    return tmp_path / "start"


def test_updates_of_a_batch_share_its_old_log_probabilities_and_no_pass_is_made_for_them(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, results, update, log_probs = [], [], grpo.update, update_file.log_probs

    def counted(model: Transformer, piece: update_file.Padded, **options: object) -> object:
        passes.append(piece)
        return log_probs(model, piece, **options)

    def watched(*given: object, old: list[torch.Tensor] | None, **options: object) -> object:
        result, seen, agreed = update(*given, old=old, **options)
        results.append((result, old, seen, agreed))
        return result, seen, agreed

    monkeypatch.setattr(update_file, "log_probs", counted)
    monkeypatch.setattr(grpo, "update", watched)
    objective = {"kl_weight": 0.0}  # no passes of a reference
    train(recipe_of(start, objective=objective, update={"updates": 3}, run=SECTIONS["run"] | {"steps": 1}), tmp_path / "run")
    (first, none, seen, agreed), *others = results
    assert len(others) == 2 and len(passes) == 3 * len(seen)
    assert none is None and agreed is not None and all(old is seen and found is None for _, old, _, found in others)
    line = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "grpo")
    norms, losses = ([getattr(result, name) for result, *_ in results] for name in ("grad_norm", "loss"))
    assert len({*norms}) == len({*losses}) == 3 and line["grad_norm"] == max(norms) and line["loss"] == pytest.approx(sum(losses) / 3)
    assert first.ratio_max == 1 < line["ratio_max"] == max(result.ratio_max for result, *_ in results)


def test_in_bf16_engine_and_trainer_are_near_enough(start: Path, tmp_path: Path) -> None:
    """The engine multiplies fp32 weights in fp32, the trainer in bf16: further apart than rounding in fp32, and below the alarm."""
    run = SECTIONS["run"] | {"steps": 2, "precision": "bf16"}
    train(recipe_of(start, run=run, objective={"correction": "truncate"}), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "grpo"]
    mean, largest = (max(line[f"sampling/sampling_logp_difference/{what}"] for line in lines) for what in ("mean", "max"))
    low, high = (
        extreme(line[f"sampling/importance_sampling_ratio/{what}"] for line in lines) for extreme, what in ((min, "min"), (max, "max"))
    )
    print(f"bf16: {mean:.2g} nats apart in the mean, single tokens up to {largest:.2g}; weights {low:.3f} to {high:.3f}")
    assert 1e-4 < mean < grpo._ALARM["bf16"] / 2 and largest < 0.5 and len(lines) == 2
    assert low < 1 < high <= 2


def test_rollouts_that_ring_the_alarm_are_kept_with_both_log_probabilities(start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, rollout=SECTIONS["rollout"] | {"alarm": 1e-12})
    with pytest.raises(LogProbsDiffer, match=r"(?s)step 1: .*alarm\.jsonl has the rollouts"):
        train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "alarm.jsonl").read_text().splitlines()]
    assert [(line["group"], line["index"]) for line in lines] == sorted((line["group"], line["index"]) for line in lines)
    assert len(lines) == recipe.rollout.prompts * recipe.rollout.group_size
    for line in lines:
        assert (
            len(line["tokens"]) == len(line["mask"]) == len(line["engine_logprobs"]) == len(line["trainer_logprobs"]) == line["num_tokens"]
        )
        assert line["trainer_logprobs"] == pytest.approx(line["engine_logprobs"], abs=1e-4)
