"""Direct preference optimisation: a policy out of pairs, without a reward model and without sampling; stage of ``dsv2 dpo``.

V2 does not use it; section 4.4 says that online learning beats offline, and this is the offline side of that comparison.
Source: R. Rafailov et al., 2023 (arXiv 2305.18290), eq 7; label smoothing: eq 3 of E. Mitchell's note on conservative DPO, 2023.

The reference is the policy before its first step. Its log-probabilities are numbers of the data, computed once and kept in a mapped file.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor

from dsv2.checkpoint.huggingface import fill_model
from dsv2.checkpoint.source import FolderSource
from dsv2.data.batch import IGNORE, Batch
from dsv2.data.loader import sequential_batches
from dsv2.data.preference_rows import PreferenceRows
from dsv2.errors import CheckpointError
from dsv2.files import atomic_file
from dsv2.kernels import linear_log_probs
from dsv2.model.router import RouterStats
from dsv2.model.transformer import Transformer
from dsv2.progress import bar
from dsv2.rl.preference_data import PreferenceData, only_pairs, open_preferences
from dsv2.rl.preference_recipe import DpoLossSection, DpoRecipe
from dsv2.rl.preference_run import Stage, by_figure, run_preferences
from dsv2.rl.reward_model import ends
from dsv2.train.loop import LoopPlan
from dsv2.train.losses import Losses
from dsv2.train.run_folder import load_stage_recipe, require_resume
from dsv2.train.start import Start, open_start

REFERENCE = "reference-logps{}.npy"  # in the run's folder: of the training answers, and of each held-out domain
Pairs = Float[Tensor, " pairs"]


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
    """Stage of ``dsv2 dpo``: load recipe, model and pairs, print report and plan, train.

    Args:
        target: a recipe's name or file, whose model.start an override may give; or the model, which then has the recipe "default".
        overrides: of the recipe.
        data: files and folders of pairs.
        out: the run's folder.
        validation: held-out pairs.
        resume: go on with the run in ``out``.
        tensorboard: write metrics for TensorBoard as well.

    Raises:
        ConfigError: a wrong recipe, or a run folder that exists and may not be continued.
        CheckpointError: there is no such model.
        DataError: missing or damaged preferences, or none that are pairs.
    """
    recipe = load_stage_recipe(target, DpoRecipe, "dpo", overrides)
    require_resume(out, resume)
    recipe, start = open_start(recipe)
    pairs = open_preferences(recipe, start.tokenizer, data, validation=validation, form=only_pairs)
    train_dpo(recipe, start, pairs, out, tensorboard=tensorboard)


def train_dpo(recipe: DpoRecipe, start: Start, data: PreferenceData, out: Path, *, tensorboard: bool = False) -> Transformer:
    """Train, or go on training, the run in ``out``; return the policy.

    Raises:
        ConfigError: see ``run_preferences``.
    """

    def objective(model: Transformer, plan: LoopPlan, out: Path) -> tuple[DpoObjective, Callable[[Transformer], Mapping[str, Any]] | None]:
        rows = recipe.batch.micro_sequences
        reference = reference_log_probs(out / REFERENCE.format(""), model, data.rows, rows, plan.autocast)
        held_out = {
            domain: DpoObjective(
                recipe.loss, reference_log_probs(out / REFERENCE.format(f"-held-out-{number}"), model, held, rows, plan.autocast)
            )
            for number, (domain, held) in enumerate(data.held_out.items())
        }

        def evaluate(model: Transformer) -> dict[str, Any]:
            return by_figure(
                {domain: held_out_figures(model, held_out[domain], held, rows, plan.autocast) for domain, held in data.held_out.items()}
            )

        return DpoObjective(recipe.loss, reference), evaluate if held_out else None

    smoothing = f", label smoothing {recipe.loss.label_smoothing:g}" if recipe.loss.label_smoothing else ""
    stage = Stage(
        model=lambda start: Transformer(start.config),
        fill=lambda model, start: fill_model(model, FolderSource(start.opened)),
        objective=objective,
        loss=f"DPO, beta {recipe.loss.beta_dpo:g}{smoothing}",
    )
    return run_preferences(recipe, start, data, out, stage, tensorboard=tensorboard)


# The loss --------------------------------------------------------------------------------------------------------------------------


def dpo_loss(chosen: Pairs, rejected: Pairs, *, label_smoothing: float = 0.0) -> Pairs:
    """Return -(1 - e) ln sigma(m) - e ln sigma(-m) of each pair, m the difference of its implicit rewards: eq 7 where e is 0.

    Args:
        chosen: beta (ln pi(y_w|x) - ln pi_ref(y_w|x)), the implicit reward of the chosen answer.
        rejected: the same of the rejected one.
        label_smoothing: e, how probable it is that a pair is the wrong way round.
    """
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    return loss - label_smoothing * F.logsigmoid(-margin) if label_smoothing else loss


def answer_log_probs(
    model: Transformer, batch: Batch, *, recompute: bool = False
) -> tuple[Float[Tensor, " answers"], Int[Tensor, " answers"], tuple[RouterStats, ...]]:
    """Return ln pi(y|x) of each packed answer, summed over its own tokens; its number; what the routers did. In the order of the rows."""
    output = model(batch.tokens, batch.positions, batch.document_ids, recompute=recompute)
    answers = ends(batch.document_ids)[1]
    labels = batch.labels.flatten()
    chosen = (labels != IGNORE).nonzero().squeeze(-1)
    hidden = output.hidden.flatten(0, 1).index_select(0, chosen)
    log_probs, _ = linear_log_probs(hidden, model.lm_head.weight, labels[chosen])
    place = torch.zeros(int(answers.max()) + 1, dtype=torch.long, device=answers.device)
    place[answers] = torch.arange(len(answers), device=answers.device)
    owner = place[batch.document_ids.flatten()[chosen]]
    return log_probs.new_zeros(len(answers)).index_add(0, owner, log_probs), answers, output.router_stats


class DpoObjective:
    """Minimises DPO's loss on packed pairs.

    Args:
        loss: beta and label smoothing.
        reference: ln pi_ref(y|x) by answer number.
    """

    def __init__(self, loss: DpoLossSection, reference: Float32[np.ndarray, "answers"]) -> None:
        self._loss, self._reference = loss, reference

    def count(self, batch: Batch) -> int:
        """Return the pairs of a batch."""
        return len(ends(batch.document_ids)[0]) // 2

    def losses(self, model: Transformer, batch: Batch, *, recompute: bool) -> Losses:
        """Return the loss summed over pairs, and TRL's figures of them."""
        log_probs, answers, stats = answer_log_probs(model, batch, recompute=recompute)
        reference = torch.from_numpy(self._reference[answers.cpu().numpy()]).to(log_probs.device)
        rewards = (self._loss.beta_dpo * (log_probs - reference)).unflatten(0, (-1, 2))  # the chosen answer first
        loss = dpo_loss(rewards[:, 0], rewards[:, 1], label_smoothing=self._loss.label_smoothing).sum()
        chosen, rejected = rewards.detach().unbind(-1)
        logps = log_probs.detach().unflatten(0, (-1, 2)).sum(0).tolist()
        figures = {
            "rewards/chosen": chosen.sum().item(),
            "rewards/rejected": rejected.sum().item(),
            "rewards/margins": (chosen - rejected).sum().item(),
            "rewards/accuracies": (chosen > rejected).sum().item(),
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
        return Losses(loss, loss.new_zeros(()), stats, figures)


@torch.no_grad()
def held_out_figures(
    model: Transformer, objective: DpoObjective, rows: PreferenceRows, batch_rows: int, autocast: torch.dtype | None
) -> dict[str, float]:
    """Return loss and figures of held-out pairs, means over them."""
    device, was_training = next(model.parameters()).device, model.training
    totals: dict[str, float] = {}
    model.eval()
    for batch in sequential_batches(rows, batch_rows):
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            losses = objective.losses(model, batch.to(device), recompute=False)
        for name, value in {"loss": losses.nll.item(), **losses.figures}.items():
            totals[name] = totals.get(name, 0.0) + value
    model.train(was_training)
    return {name: value / len(rows.answers.groups) for name, value in totals.items()}


# The reference ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_log_probs(
    file: Path, model: Transformer, rows: PreferenceRows, batch_rows: int, autocast: torch.dtype | None
) -> Float32[np.ndarray, "answers"]:
    """Return ln pi_ref(y|x) of every answer by its number, mapped from ``file``; where it is not there yet, ``model`` computes it.

    Raises:
        CheckpointError: the file is damaged, or of other answers.
    """
    if not file.exists():
        device, found = next(model.parameters()).device, np.zeros(len(rows.answers), dtype=np.float32)
        model.eval()
        with bar(len(rows), "reference", unit="rows") as progress:
            for batch in sequential_batches(rows, batch_rows):
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    log_probs, answers, _ = answer_log_probs(model, batch.to(device))
                found[answers.cpu().numpy()] = log_probs.cpu().numpy()
                progress.advance(len(batch.tokens))
        with atomic_file(file) as new, new.open("wb") as opened:
            np.save(opened, found)
    try:
        mapped: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}", hint="choose another --out") from error
    if mapped.shape != (len(rows.answers),) or mapped.dtype != np.float32:
        raise CheckpointError(f"{file} holds {mapped.dtype} {list(mapped.shape)}; the data has {len(rows.answers)} answers")
    return mapped
