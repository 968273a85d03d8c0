"""Training a reward model on judged answers: point-wise or pair-wise (section 4.2); stage of ``dsv2 reward``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsv2.checkpoint.huggingface import fill_model
from dsv2.data.batch import Batch
from dsv2.data.loader import sequential_batches
from dsv2.data.preference_rows import PreferenceRows
from dsv2.data.preferences import Preference
from dsv2.data.rows import Refused
from dsv2.model.transformer import Transformer
from dsv2.rl.calibration import Calibration, calibrate, calibrate_margins
from dsv2.rl.preference_data import PreferenceData, only_pairs, open_preferences
from dsv2.rl.preference_recipe import RewardLossSection, RewardRecipe
from dsv2.rl.preference_run import Stage, by_figure, run_preferences
from dsv2.rl.reward_losses import bradley_terry, logistic, squared_error
from dsv2.rl.reward_model import RewardModel, ends, reward_source
from dsv2.train.loop import LoopPlan
from dsv2.train.losses import Losses
from dsv2.train.run_folder import load_stage_recipe, require_resume
from dsv2.train.start import Start, open_start

Values = Float[np.ndarray, "values"]  # of held-out answers or pairs

_MARGIN_BINS = 24  # of the histogram in the report


def run(
    target: str,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[Path],
    out: Path,
    validation: Sequence[Path] = (),
    resume: bool = False,
    tensorboard: bool = False,
) -> None:
    """Stage of ``dsv2 reward``: load recipe, model and preferences, print report and plan, train.

    Args:
        target: a recipe's name or file, whose model.start an override may give; or the model, which then has the recipe "default".
        overrides: of the recipe.
        data: files and folders of preferences.
        out: the run's folder.
        validation: held-out preferences.
        resume: go on with the run in ``out``.
        tensorboard: write metrics for TensorBoard as well.

    Raises:
        ConfigError: a wrong recipe, or a run folder that exists and may not be continued.
        CheckpointError: there is no such model.
        DataError: missing or damaged preferences, or none that the loss can use.
    """
    recipe = load_stage_recipe(target, RewardRecipe, "reward", overrides)
    require_resume(out, resume)
    recipe, start = open_start(recipe, None)
    preferences = open_preferences(recipe, start.tokenizer, data, validation=validation, form=form_of(recipe.loss))
    train_reward_model(recipe, start, preferences, out, tensorboard=tensorboard)


def train_reward_model(recipe: RewardRecipe, start: Start, data: PreferenceData, out: Path, *, tensorboard: bool = False) -> RewardModel:
    """Train, or go on training, the run in ``out``; return the model.

    Raises:
        ConfigError: see ``run_preferences``.
    """
    stage = Stage(
        model=lambda start: RewardModel(start.config),
        fill=lambda model, start: fill_model(model, reward_source(start.opened)),
        objective=lambda model, plan, out: (RewardObjective(recipe.loss, data.rows), evaluator(recipe, data, plan)),
        loss=recipe.loss.kind + (f", centring {recipe.loss.centring:g}" if recipe.loss.centring else ""),
    )
    model = run_preferences(recipe, start, data, out, stage, tensorboard=tensorboard)
    assert isinstance(model, RewardModel)
    return model


def form_of(loss: RewardLossSection) -> Callable[[Preference], list[Preference]]:
    """Return what a loss makes of a preference: pairs are two single answers, 1 and 0, to a point-wise one; or it raises Refused."""

    def point(preference: Preference) -> list[Preference]:
        if preference.is_pair:
            return [replace(preference, answers=(answer,), score=s) for answer, s in zip(preference.answers, (1.0, 0.0), strict=True)]
        if loss.kind == "logistic" and not 0 <= (preference.score or 0.0) <= 1:
            raise Refused("its score is beyond 0 to 1, which loss.kind = 'logistic' takes; 'squared' takes any")
        return [preference]

    return only_pairs if loss.kind == "pairwise" else point


class RewardObjective:
    """Minimises a loss of the rewards of packed answers.

    Args:
        loss: which.
        rows: whose answers the batches' document ids number.
    """

    def __init__(self, loss: RewardLossSection, rows: PreferenceRows) -> None:
        self._loss, self._targets = loss, torch.from_numpy(rows.answers.targets).float()

    def count(self, batch: Batch) -> int:
        """Return the pairs of a batch, or its answers where they are judged one by one."""
        num_answers = len(ends(batch.document_ids)[0])
        return num_answers // 2 if self._loss.kind == "pairwise" else num_answers

    def losses(self, model: Transformer, batch: Batch, *, recompute: bool) -> Losses:
        """Return the loss summed over pairs or answers, and with it accuracy, margin and reward."""
        rewards, answers, output = batch_rewards(model, batch, recompute=recompute)
        targets = self._targets.to(rewards.device)[answers]
        if self._loss.kind == "pairwise":
            chosen, rejected = rewards.unflatten(0, (-1, 2)).unbind(-1)  # a pair's answers lie side by side, the better one first
            loss, margin = bradley_terry(chosen, rejected, centring=self._loss.centring), chosen - rejected
            figures = {"accuracy": _right(margin), "margin": margin.sum().item(), "mean_reward": ((chosen + rejected) / 2).sum().item()}
        else:
            loss = logistic(rewards, targets) if self._loss.kind == "logistic" else squared_error(rewards, targets)
            figures = {"mean_reward": rewards.sum().item()}
            if self._loss.kind == "logistic":
                figures["accuracy"] = _right(rewards * (2 * targets - 1))
        return Losses(loss.sum(), rewards.new_zeros(()), output.router_stats, figures)


def batch_rewards(model: Transformer, batch: Batch, *, recompute: bool = False) -> tuple[Tensor, Tensor, Any]:
    """Return the rewards of a batch's answers [n], their numbers [n], and the model's output; in the order of the rows."""
    assert isinstance(model, RewardModel)
    output = model(batch.tokens, batch.positions, batch.document_ids, recompute=recompute)
    places, answers = ends(batch.document_ids)
    return model.rewards(output.hidden.flatten(0, 1)[places]), answers, output


def _right(margins: Tensor) -> float:
    """Count what is above 0; half of a tie counts."""
    return ((margins.sign() + 1) / 2).sum().item()


# Held-out preferences --------------------------------------------------------------------------------------------------------------


def evaluator(recipe: RewardRecipe, data: PreferenceData, plan: LoopPlan) -> Callable[[Transformer], dict[str, Any]] | None:
    """Return a function that scores the held-out preferences; None where there are none."""
    if not data.held_out:
        return None
    return lambda model: by_figure(
        {
            domain: held_out_figures(model, rows, recipe.loss, recipe.batch.micro_sequences, plan.autocast)
            for domain, rows in data.held_out.items()
        }
    )


def held_out_figures(
    model: Transformer, rows: PreferenceRows, loss: RewardLossSection, batch_rows: int, autocast: torch.dtype | None
) -> dict[str, Any]:
    """Return accuracy, margin, loss and calibration of a model on preferences, as the metrics hold them.

    ``calibration`` is (predicted, observed, count) of each bin; ``margins`` the edges and counts of a histogram.
    """
    rewards = np.array(all_rewards(model, rows, batch_rows, autocast))
    if loss.kind == "squared":
        return {"loss": float(((rewards - rows.answers.targets) ** 2).mean())}
    if loss.kind == "logistic":
        right = rows.answers.targets
        losses = np.logaddexp(0.0, rewards) - right * rewards  # cross-entropy of sigma(r) with a label that need not be 0 or 1
        return _figures(rewards * (2 * right - 1), losses, calibrate((1 / (1 + np.exp(-rewards))).tolist(), right.tolist()))
    chosen, rejected = rewards.reshape(-1, 2).T
    margins = chosen - rejected
    return _figures(margins, np.logaddexp(0.0, -margins), calibrate_margins(margins.tolist()))


def _figures(margins: Values, losses: Values, calibration: Calibration) -> dict[str, Any]:
    counts, edges = np.histogram(margins, bins=_MARGIN_BINS)
    return {
        "accuracy": float(((np.sign(margins) + 1) / 2).mean()),
        "margin": float(margins.mean()),
        "loss": float(losses.mean()),
        "calibration_error": calibration.error,
        "calibration": [calibration.predicted, calibration.observed, calibration.counts],
        "margins": [edges.tolist(), counts.tolist()],
    }


@torch.no_grad()
def all_rewards(model: Transformer, rows: PreferenceRows, batch_rows: int, autocast: torch.dtype | None) -> list[float]:
    """Return the reward of every answer by its number."""
    device, was_training = next(model.parameters()).device, model.training
    found = [0.0] * len(rows.answers)
    model.eval()
    for batch in sequential_batches(rows, batch_rows):
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            rewards, answers, _ = batch_rewards(model, batch.to(device))
        for answer, reward in zip(answers.tolist(), rewards.tolist(), strict=True):
            found[answer] = reward
    model.train(was_training)
    return found
