"""One optimiser step: accumulate, clip, update. No files, no printing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2.data.batch import Batch
from dsv2.errors import Dsv2Error
from dsv2.model.transformer import Transformer
from dsv2.train.losses import BalanceSection, batch_losses


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Args:
        loss: nats per label, over the whole batch.
        balance_loss: weighted, averaged over sequences.
        grad_norm: global, before clipping.
        load: [layers, experts] share of assignments per expert; rows sum to 1. Empty without MoE layers.
    """

    loss: float
    balance_loss: float
    grad_norm: float
    load: Float[Tensor, "layers experts"]


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    clip_norm: float,
    balance: BalanceSection,
    autocast: torch.dtype | None,
) -> StepResult:
    """Take one step on a batch given as equal micro-batches.

    The cross-entropy is a mean over all labels of the batch, so how it is cut changes nothing but rounding.

    Raises:
        Dsv2Error: loss or gradient is not finite; the model is left as it was before the step.
    """
    num_labels = max(1, sum(batch.num_labels for batch in micro_batches))  # a batch of padding alone has no loss
    nll, balance_sum, loads = 0.0, 0.0, []
    for batch in micro_batches:
        with torch.autocast(batch.tokens.device.type, dtype=autocast, enabled=autocast is not None):
            losses = batch_losses(model, batch, balance)
        (losses.nll / num_labels + losses.balance / len(micro_batches)).backward()
        nll += losses.nll.item()
        balance_sum += losses.balance.item()
        loads.append([layer.load for layer in losses.router_stats])
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
    if not (math.isfinite(nll) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise Dsv2Error(
            f"training diverged: loss {nll / num_labels}, gradient norm {grad_norm}",
            hint="lower learning_rate.peak in a new run; the last checkpoint is untouched",
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean_load = torch.stack([torch.stack(layer) for layer in loads]).mean(0) if loads[0] else torch.empty(0, 0)
    return StepResult(nll / num_labels, balance_sum / len(micro_batches), grad_norm, mean_load)
