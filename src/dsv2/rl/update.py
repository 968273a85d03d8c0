"""Updates of the policy on a batch of rollouts: log-probabilities of the trainer, the check against the engine's, the loss, the step.

Rollouts of like length make a micro-batch, right-padded. The policy that sampled is the one that the first update on a batch begins with,
so the old log-probabilities are those of that update's own forward pass, for it and for those that follow (spec 6.2).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.errors import Dsv2Error
from dsv2.kernels import linear_log_probs
from dsv2.model.config import ModelConfig
from dsv2.model.router import RouterStats
from dsv2.model.transformer import Transformer
from dsv2.rl.objective import LossParts, Objective, grpo_loss, importance_weights
from dsv2.rl.rollout import Rollout
from dsv2.train.losses import BalanceSection, balance_loss
from dsv2.train.step import TrainingDiverged

SINGLE = 100  # times the mean allowed, for one token: in fp32 the mean is 1e-6, single tokens are up to 5e-5 apart (docs/decisions.md)


class LogProbsDiffer(Dsv2Error):
    """The engine sampled from another distribution than the trainer computes."""


@dataclass(frozen=True, slots=True)
class Padded:
    """Rollouts of a micro-batch as tensors, right-padded.

    Args:
        rows: places of its rollouts in the batch.
        lengths: [B] tokens of each that the model reads: prompt and answer but its last.
        read: [B, S] these tokens.
        at: [B, T] where in a row the hidden state stands that predicts an answer's token.
        tokens: [B, T] the answers.
        mask: [B, T] True at tokens that the policy chose.
        behaviour: [B, T] log-probabilities at which they were drawn.
        experts: [L, B, S, K] to replay; None: the routers choose again.
    """

    rows: Int[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]
    read: Int[Tensor, "batch read"]
    at: Int[Tensor, "batch answer"]
    tokens: Int[Tensor, "batch answer"]
    mask: Bool[Tensor, "batch answer"]
    behaviour: Float[Tensor, "batch answer"]
    experts: Int[Tensor, "layers batch read chosen"] | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the engine's log-probabilities are from the trainer's, over all tokens that the policy chose.

    Args:
        largest: of the differences, nats.
        mean: of them.
        ratio_min: of pi_trainer / pi_engine, of a token.
        ratio_mean: of the same.
        ratio_max: of the same.
    """

    largest: float
    mean: float
    ratio_min: float
    ratio_mean: float
    ratio_max: float


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did: ``LossParts`` of the whole batch as numbers, and the norm of its gradient before clipping."""

    loss: float
    kl: float | None
    kl_loss: float | None
    entropy: float
    clipped_low: float
    clipped_high: float
    clipped_low_min: float
    clipped_high_max: float
    ratio_max: float
    weight_min: float | None
    weight_mean: float | None
    weight_max: float | None
    weight_capped: float | None
    grad_norm: float


def teaching(advantages: Tensor, objective: Objective, balance: BalanceSection) -> list[bool]:
    """Tell which rollouts have a part in the gradient: with a KL or balance losses all, else those with an advantage.

    Where that would be none, all: the optimiser's step then has a gradient of 0, as it has for any other rollouts without one.

    Args:
        advantages: [N] or [N, tokens].
        objective: of the loss.
        balance: weights of the balance losses.
    """
    own = (advantages != 0).view(len(advantages), -1).any(dim=1)
    if objective.kl_weight or _is_on(balance) or not own.any():
        return [True] * len(advantages)
    found: list[bool] = own.tolist()
    return found


def pad(rollouts: Sequence[Rollout], *, micro_tokens: int, replay: bool, teaching: Sequence[bool] | None = None) -> list[Padded]:
    """Cut a batch into micro-batches of at most ``micro_tokens`` places each, padding included; a longer rollout is one by itself.

    Rollouts that have a part in the gradient (``teaching``) and others do not share one: the others need no backward pass.
    """
    lengths = [len(rollout.prompt_tokens) + len(rollout.tokens) - 1 for rollout in rollouts]
    kinds = [True] * len(rollouts) if teaching is None else list(teaching)
    pieces: list[list[int]] = []
    for row in sorted(range(len(rollouts)), key=lambda row: (kinds[row], lengths[row], row)):  # ascending: the newest is the longest
        if pieces and kinds[pieces[-1][0]] == kinds[row] and (len(pieces[-1]) + 1) * lengths[row] <= micro_tokens:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    return [_padded(rollouts, rows, replay) for rows in pieces]


def _padded(rollouts: Sequence[Rollout], rows: Sequence[int], replay: bool) -> Padded:
    chosen = [rollouts[row] for row in rows]
    lengths = [len(r.prompt_tokens) + len(r.tokens) - 1 for r in chosen]
    width = max(lengths)
    longest = max(len(r.tokens) for r in chosen)
    read, tokens, at = (np.zeros((len(rows), size), dtype=np.int64) for size in (width, longest, longest))
    mask, behaviour = np.zeros((len(rows), longest), dtype=bool), np.zeros((len(rows), longest), dtype=np.float32)
    for i, r in enumerate(chosen):
        whole, num = (*r.prompt_tokens, *r.tokens[:-1]), len(r.tokens)
        read[i, : len(whole)], tokens[i, :num], mask[i, :num], behaviour[i, :num] = whole, r.tokens, r.mask, r.logprobs
        at[i, :num] = np.arange(num) + len(r.prompt_tokens) - 1
    experts = None
    if replay:
        recorded = [r.experts for r in chosen]
        layers, top = next(e.shape[1:] for e in recorded if e is not None)
        padded = np.broadcast_to(
            np.arange(top), (len(rows), width, layers, top)
        ).copy()  # padding goes to any experts: its results are not read
        for i, e in enumerate(recorded):
            assert e is not None and len(e) == lengths[i]
            padded[i, : len(e)] = e
        experts = torch.from_numpy(padded.transpose(2, 0, 1, 3).astype(np.int64))
    read_t, at_t, tokens_t, mask_t, behaviour_t = (torch.from_numpy(array) for array in (read, at, tokens, mask, behaviour))
    return Padded(torch.tensor(rows), torch.tensor(lengths), read_t, at_t, tokens_t, mask_t, behaviour_t, experts)


def log_probs(
    model: Transformer, piece: Padded, *, recompute: bool = False
) -> tuple[Float[Tensor, "batch answer"], Float[Tensor, "batch answer"], tuple[RouterStats, ...]]:
    """Return each answer token's log-probability (with graph) and entropy, 0 where the policy chose none, and the routers' statistics."""
    output = model(piece.read, recompute=recompute, experts=piece.experts)
    where = piece.mask.nonzero(as_tuple=True)
    flat = where[0] * piece.read.shape[1] + piece.at[where]
    found = linear_log_probs(output.hidden.flatten(0, 1).index_select(0, flat), model.lm_head.weight, piece.tokens[where])
    place = where[0] * piece.mask.shape[1] + where[1]
    logp, entropy = (part.new_zeros(piece.mask.numel()).index_add(0, place, part).view(piece.mask.shape) for part in found)
    return logp, entropy, output.router_stats


def without_graph(
    model: Transformer, pieces: Sequence[Padded], autocast: AbstractContextManager[object]
) -> list[Float[Tensor, "batch answer"]]:
    """Return the log-probabilities of all micro-batches under a model that is not trained on them."""
    with torch.no_grad(), autocast:
        return [log_probs(model, piece)[0].float() for piece in pieces]


def agreement(
    rollouts: Sequence[Rollout], pieces: Sequence[Padded], trainer: Sequence[Tensor], *, alarm: float | None, step: int
) -> Agreement:
    """Compare the engine's log-probabilities with the trainer's of the same weights.

    Args:
        rollouts: the batch.
        pieces: of it.
        trainer: log-probabilities of each piece.
        alarm: mean difference allowed, nats; a single token's may be ``SINGLE`` times that; None: any.
        step: for the message.

    Raises:
        LogProbsDiffer: they differ by more: the rollouts are of other weights, or a kernel is wrong.
    """
    largest, total, count, worst = 0.0, 0.0, 0, None
    ratio_sum, ratio_min, ratio_max = 0.0, math.inf, 0.0
    for piece, logp in zip(pieces, trainer, strict=True):
        apart = torch.where(piece.mask, logp.detach().double() - piece.behaviour.double(), 0.0)
        count += int(piece.mask.sum())
        total += apart.abs().sum().item()
        ratio = apart[piece.mask].exp()
        ratio_sum += ratio.sum().item()
        ratio_min, ratio_max = min(ratio_min, ratio.min().item()), max(ratio_max, ratio.max().item())
        if (here := apart.abs().max().item()) > largest or worst is None:
            row, token = divmod(int(apart.abs().argmax()), apart.shape[1])
            largest, worst = here, (int(piece.rows[row]), token, piece.behaviour[row, token].item(), logp[row, token].item())
    assert worst is not None
    mean = total / count
    if alarm is not None and not (mean <= alarm and largest <= SINGLE * alarm):
        r = rollouts[worst[0]]
        raise LogProbsDiffer(
            f"step {step}: the engine drew token {worst[1]} of rollout {r.index} of group {r.group} (id {r.tokens[worst[1]]}) at a "
            f"log-probability of {worst[2]:.7f}, the trainer says {worst[3]:.7f}; they differ by {mean:.2g} in the mean, "
            f"{largest:.2g} here; allowed are {alarm:g} and {SINGLE * alarm:g}",
            hint="the rollouts are of other weights than are trained, or a kernel is wrong; rollout.alarm sets the limit",
        )
    return Agreement(largest, mean, ratio_min, ratio_sum / count, ratio_max)


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    pieces: Sequence[Padded],
    advantages: Float[Tensor, " rollouts"] | Float[Tensor, "rollouts tokens"],
    objective: Objective,
    *,
    lr: float,
    clip_norm: float,
    balance: BalanceSection,
    autocast: AbstractContextManager[object],
    old: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
    recompute: bool = False,
    check: Callable[[list[Tensor]], Agreement] | None = None,
) -> tuple[UpdateResult, list[Tensor], Agreement | None]:
    """Take one optimiser step on a batch.

    Args:
        model: the policy.
        optimizer: of its parameters.
        pieces: the batch as micro-batches.
        advantages: of each rollout of the batch, or of each of its tokens.
        objective: what is minimised.
        lr: learning rate.
        clip_norm: largest global gradient norm.
        balance: weights of the balance losses.
        autocast: a context for the forward passes.
        old: log-probabilities of the policy that sampled, by piece; None: those of this pass, the first on the batch.
        reference: of the reference, by piece; None: no KL.
        recompute: compute blocks again in the backward pass.
        check: given the trainer's log-probabilities before the step is taken; what it raises, prevents the step.

    Returns:
        What the step did; the log-probabilities before it, by piece, which are ``old`` of the next one on this batch; what ``check`` found.

    Raises:
        TrainingDiverged: loss or gradient is not finite; the weights stay as they were.
    """
    if objective.normalise == "tokens":
        denominator = sum(int(piece.mask.sum()) for piece in pieces)
    else:
        denominator = sum(int(piece.mask.any(dim=1).sum()) for piece in pieces)
    parts, seen, entropies = [], [], 0.0
    teaches = torch.tensor(teaching(advantages, objective, balance))
    for number, piece in enumerate(pieces):
        learns = bool(teaches[piece.rows].any())
        with autocast, torch.set_grad_enabled(learns):
            logp, entropy, stats = log_probs(model, piece, recompute=recompute)
            extra = _balance(stats, piece.lengths, balance, model.config) / len(advantages)
        before = logp.detach() if old is None else old[number]
        correction = None
        if objective.correction != "none":
            correction = importance_weights(
                piece.behaviour, before, piece.mask, objective.correction, objective.correction_cap, objective.ratio
            )
        own = advantages[piece.rows]
        part = grpo_loss(
            objective, logp, before, None if reference is None else reference[number],
            own if own.ndim == 1 else own[:, : piece.mask.shape[1]], piece.mask, correction, denominator=denominator,
        )  # fmt: skip
        if learns:
            (part.loss + extra).backward()
        parts.append(part)
        seen.append(logp.detach())
        entropies += entropy.sum().item()
    try:
        found = None if check is None else check(seen)
    except LogProbsDiffer:
        optimizer.zero_grad(set_to_none=True)
        raise
    norm = _step(model, optimizer, lr, clip_norm)
    return _figures(parts, pieces, objective, entropies, norm), seen, found


def over_updates(results: Sequence[UpdateResult]) -> UpdateResult:
    """Return the means of the updates on a batch; of ``ratio_max`` and ``grad_norm`` the largest, so that one that explodes is seen."""
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(UpdateResult)):
        values = [value for result in results if (value := getattr(result, name)) is not None]
        if name in ("ratio_max", "grad_norm"):
            found[name] = max(values)
        else:
            found[name] = sum(values) / len(values) if values else None
    return UpdateResult(**found)


def _figures(parts: Sequence[LossParts], pieces: Sequence[Padded], objective: Objective, entropies: float, norm: float) -> UpdateResult:
    """Return what a step did, over all micro-batches."""
    tokens = [float(piece.mask.sum()) for piece in pieces]
    # shares of a micro-batch are of its tokens, or of its outputs where ratios are of those
    counted = [float(piece.mask.any(dim=1).sum()) for piece in pieces] if objective.ratio == "output" else tokens
    weighed, compared = objective.correction != "none", parts[0].kl is not None
    return UpdateResult(
        loss=sum(part.loss.item() for part in parts),
        kl=_mean(parts, tokens, "kl") if compared else None,
        kl_loss=sum(part.kl_loss.item() for part in parts if part.kl_loss is not None) if compared else None,
        entropy=entropies / max(1.0, sum(tokens)),
        clipped_low=_mean(parts, counted, "clipped_low"),
        clipped_high=_mean(parts, counted, "clipped_high"),
        clipped_low_min=min(part.clipped_low_min.item() for part in parts),
        clipped_high_max=max(part.clipped_high_max.item() for part in parts),
        ratio_max=max(part.ratio_max.item() for part in parts),
        weight_min=min(part.weight_min.item() for part in parts if part.weight_min is not None) if weighed else None,
        weight_mean=_mean(parts, counted, "weight_mean") if weighed else None,
        weight_max=max(part.weight_max.item() for part in parts if part.weight_max is not None) if weighed else None,
        weight_capped=_mean(parts, counted, "weight_capped") if weighed else None,
        grad_norm=norm,
    )


def _is_on(balance: BalanceSection) -> bool:
    return bool(balance.expert or balance.device or balance.communication)


def _balance(
    stats: Sequence[RouterStats], lengths: Int[Tensor, " batch"], balance: BalanceSection, config: ModelConfig
) -> Float[Tensor, ""]:
    """Return the balance losses summed over a micro-batch's rollouts; padding is no part of any load."""
    if not _is_on(balance):
        return torch.zeros(())
    if balance.scope == "micro-batch":
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        pooled = [replace(layer, affinity=layer.affinity[real][None], experts=layer.experts[real][None]) for layer in stats]
        return balance_loss(pooled, balance, config) * len(lengths)
    found = []
    for row, length in enumerate(lengths.tolist()):
        own = [replace(layer, affinity=layer.affinity[[row], :length], experts=layer.experts[[row], :length]) for layer in stats]
        found.append(balance_loss(own, balance, config))
    return torch.stack(found).sum()


def _step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, clip_norm: float) -> float:
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not bool(norm.isfinite()):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingDiverged(
            f"training diverged: gradient norm {norm.item()}",
            hint="lower learning_rate.peak; checkpoints, where there are any, are untouched",
        )
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def _mean(parts: Sequence[LossParts], weights: Sequence[float], name: str) -> float:
    return float(sum(getattr(part, name).item() * weight for part, weight in zip(parts, weights, strict=True)) / max(1.0, sum(weights)))
