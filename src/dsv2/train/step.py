"""One optimiser step: accumulate, clip, judge, update. No files, no printing."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dsv2.data.batch import Batch
from dsv2.errors import Dsv2Error
from dsv2.model.dropping import Dropping
from dsv2.model.transformer import Transformer
from dsv2.train.losses import BalanceSection, Objective, batch_losses
from dsv2.train.router_load import RouterLoad, router_load


class TrainingDiverged(Dsv2Error):
    """Loss or gradient is not finite. The model is left as it was before the step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Args:
        loss: nats per label, over the whole batch.
        balance_loss: weighted, averaged over sequences.
        grad_norm: global, before clipping.
        load: where the routers sent the batch; None without MoE layers.
        skipped: the update was judged and not made.
        figures: of the objective, means over the batch.
    """

    loss: float
    balance_loss: float
    grad_norm: float
    load: RouterLoad | None
    skipped: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    clip_norm: float,
    balance: BalanceSection,
    autocast: torch.dtype | None,
    dropping: Dropping | None = None,
    recompute: bool = False,
    accept: Callable[[float, float], bool] | None = None,
    objective: Objective | None = None,
) -> StepResult:
    """Take one step on a batch given as equal micro-batches.

    The cross-entropy is a mean over all labels of the batch, so how it is cut changes nothing but rounding. Dropping looks at one
    micro-batch at a time, as an expert-parallel group does.

    Args:
        model: in training.
        optimizer: of its parameters.
        micro_batches: the batch.
        lr: learning rate of this step.
        clip_norm: largest global gradient norm.
        balance: weights of the balance losses.
        autocast: dtype of matrix products; weights, gradients and moments stay fp32. None: fp32 products.
        dropping: of the whole batch's sequences; None: nothing is dropped.
        recompute: compute blocks again in the backward pass instead of keeping what they computed.
        accept: told loss and gradient norm (before clipping); False: the update is not made, weights and moments stay.
        objective: what is minimised; None: the cross-entropy of the labels and the balance losses.

    Raises:
        TrainingDiverged: loss or gradient is not finite; the model is left as it was before the step.
    """
    counts = (batch.num_labels if objective is None else objective.count(batch) for batch in micro_batches)
    num_terms = max(1, sum(counts))  # a batch of padding alone has no loss
    figures: defaultdict[str, float] = defaultdict(float)
    nll, balance_sum, row, load = 0.0, 0.0, 0, None
    for number, batch in enumerate(micro_batches):
        own_dropping = None if dropping is None else dropping.rows(row, row + len(batch.tokens))
        row += len(batch.tokens)
        with torch.autocast(batch.tokens.device.type, dtype=autocast, enabled=autocast is not None):
            losses = (
                batch_losses(model, batch, balance, dropping=own_dropping, recompute=recompute)
                if objective is None
                else objective.losses(model, batch, recompute=recompute)
            )
        for name, value in losses.figures.items():
            figures[name] += value
        nll += losses.nll.item()
        balance_sum += losses.balance.item()
        if not math.isfinite(nll + balance_sum):
            optimizer.zero_grad(set_to_none=True)
            raise _diverged(f"loss {losses.nll.item()}, balance loss {losses.balance.item()} in micro-batch {number}")
        (losses.nll / num_terms + losses.balance / len(micro_batches)).backward()
        counted = router_load(losses.router_stats, model.config.n_group)
        load = counted if load is None or counted is None else load + counted
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    grad_norm = total_norm.item()
    if not math.isfinite(grad_norm):
        error = _diverged(f"loss {nll / num_terms}, gradient norm {grad_norm}, first at {_first_bad_gradient(model)}")
        optimizer.zero_grad(set_to_none=True)
        raise error
    accepted = accept is None or accept(nll / num_terms, grad_norm)
    if accepted:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, total_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: value / num_terms for name, value in figures.items()}
    return StepResult(nll / num_terms, balance_sum / len(micro_batches), grad_norm, load, not accepted, means)


def _diverged(what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"training diverged: {what}", hint="lower learning_rate.peak in a new run; checkpoints, where there are any, are untouched"
    )


def _first_bad_gradient(model: Transformer) -> str:
    """Name the first parameter, in the model's order, whose gradient is not finite."""
    bad = (name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
    return next(bad, "no single parameter: the norm itself overflowed")
