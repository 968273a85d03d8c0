"""What GRPO maximises, as pure functions (V2 section 4.2, eq 32-34; spec 6.2), with the variants that came after it.

Sources: V2 = DeepSeek-V2; DSM = DeepSeekMath (arXiv 2402.03300); DR = Dr. GRPO (arXiv 2503.20783); DAPO (arXiv 2503.14476).

A row is one sampled output o_i, right-padded; ``mask`` is True at the tokens that the policy itself chose, its end token among them. What
stands at other places never matters, NaN included. Losses are to be minimised: the papers' objectives with the sign turned.

V2 prints one ratio and one KL for a whole output, DeepSeekMath one for every token; ``ratio`` is that choice. Where pi_theta = pi_old, the
gradient of the first is A times that of an output's whole log-probability, that of the second the same divided by its length.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from dsv2.config import Section
from dsv2.errors import ConfigError

Level = Literal["token", "output"]
Normalise = Literal["output", "tokens", "constant"]
Rows = Float[Tensor, "rows tokens"]
Mask = Bool[Tensor, "rows tokens"]

EQUAL = 1e-6  # rewards nearer to each other than this, relative to the largest, are equal: what is between them is rounding
MOST_LOG_RATIO = 60.0  # exp of more leaves fp32; a ratio that far away has no gradient here


class Objective(Section):
    """A choice of every part; ``PRESETS`` has those of the papers."""

    advantage: Literal["zscore", "mean", "none"] = Field(
        default="zscore", description="of rewards in their group: less the mean, over the deviation; less the mean; as they are"
    )
    ratio: Level = Field(default="token", description="what ratio and KL are of: each token, or the whole output as V2 prints it")
    normalise: Normalise = Field(
        default="output",
        description="mean over an output's tokens, then outputs; over all tokens; sum by constant_len, then mean over outputs",
    )
    constant_len: int | None = Field(default=None, gt=0, description="tokens; for normalise = 'constant': the longest answer allowed")
    clip_low: float = Field(default=0.2, ge=0, le=1, description="epsilon below: a ratio under 1 - clip_low earns nothing more")
    clip_high: float = Field(default=0.2, ge=0, description="epsilon above: a ratio over 1 + clip_high earns nothing more")
    kl: Literal["k1", "k2", "k3"] = Field(default="k3", description="estimator of the KL to the reference")
    kl_weight: float = Field(default=0.04, ge=0, description="beta of the KL in the loss; 0 needs no reference")
    correction: Literal["none", "truncate", "mask"] = Field(
        default="none", description="where sampler and trainer disagree: importance weights cut at the cap, or dropped above it"
    )
    correction_cap: float = Field(default=2.0, gt=0, description="largest importance weight")
    overlong: Literal["keep", "penalty", "mask"] = Field(
        default="keep", description="answers cut at the limit: scored as they are; a soft penalty before it; left out of the loss"
    )
    overlong_buffer: int = Field(
        default=0, ge=0, description="tokens before the limit over which the penalty grows from 0 to 1; absent: a fifth of the limit"
    )
    drop_equal_groups: bool = Field(default=False, description="sample on in place of groups whose rewards are all equal")

    def __str__(self) -> str:
        """Return every choice in a line, as a plan shows it."""
        parts = [
            f"{self.ratio} ratio",
            f"{self.advantage} advantage",
            f"mean by {self.normalise}" + (f" ({self.constant_len:,} tokens)" if self.constant_len else ""),
            f"clip {self.clip_low:g}/{self.clip_high:g}",
            f"{self.kl} KL x {self.kl_weight:g}" if self.kl_weight else "no KL",
            f"correction: {self.correction}" + (f" at {self.correction_cap:g}" if self.correction != "none" else ""),
            f"overlong: {self.overlong}" + (f" over {self.overlong_buffer:,} tokens" if self.overlong == "penalty" else ""),
            "equal groups drawn anew" if self.drop_equal_groups else "equal groups kept",
        ]
        return ", ".join(parts)


PRESETS: dict[str, Objective] = {
    # V2 gives neither epsilon nor beta: PPO's 0.2 and DeepSeekMath's 0.04 stand in.
    "v2": Objective(ratio="output"),
    "deepseekmath": Objective(),
    "dr_grpo": Objective(advantage="mean", normalise="constant", kl_weight=0.0),
    # The paper's buffer is a fifth of its longest answer (4096 of 20480 tokens); a run takes a fifth of its own (grpo_recipe.py).
    "dapo": Objective(normalise="tokens", clip_high=0.28, kl_weight=0.0, overlong="penalty", overlong_buffer=4096, drop_equal_groups=True),
}


@dataclass(frozen=True, slots=True)
class LossParts:
    """The loss of one update, and what to watch; all but ``loss`` are without graph.

    Args:
        loss: the clipped part + kl_weight * kl_loss, to be minimised.
        kl: estimate of the KL to the reference whatever the loss has: k3 of each token, in the mean over tokens, nats; None without one.
        kl_loss: the part of the loss, unweighted: its own estimator, level and mean; None without a reference.
        clipped_low: share of ratios below the lower clip whose advantage is negative, hence without gradient.
        clipped_high: share above the upper clip whose advantage is positive. Of tokens, or of outputs where ratios are of those.
        clipped_low_min: of the outputs' own shares below the lower clip the least.
        clipped_high_max: of their shares above the upper clip the greatest.
        ratio_max: the largest pi_theta / pi_old.
        weight_min: the least importance weight; None without weights.
        weight_mean: of them, likewise of tokens or outputs; None without weights.
        weight_max: the greatest of them; None without weights.
        weight_capped: share of them that was cut at the cap, or dropped above it.
    """

    loss: Float[Tensor, ""]
    kl: Float[Tensor, ""] | None
    kl_loss: Float[Tensor, ""] | None
    clipped_low: Float[Tensor, ""]
    clipped_high: Float[Tensor, ""]
    clipped_low_min: Float[Tensor, ""]
    clipped_high_max: Float[Tensor, ""]
    ratio_max: Float[Tensor, ""]
    weight_min: Float[Tensor, ""] | None
    weight_mean: Float[Tensor, ""] | None
    weight_max: Float[Tensor, ""] | None
    weight_capped: Float[Tensor, ""] | None


def grpo_loss(
    objective: Objective,
    logp: Rows,
    old_logp: Rows,
    ref_logp: Rows | None,
    advantages: Float[Tensor, "rows"] | Rows,
    mask: Mask,
    weights: Rows | None = None,
    *,
    denominator: int | None = None,
) -> LossParts:
    """Return the loss of a batch of outputs, or a micro-batch's share of it (V2 eq 32; DSM eq 3; DAPO eq 8).

    Args:
        objective: which of them.
        logp: ln pi_theta of each token, with graph.
        old_logp: ln pi_old, of the policy that the outputs were sampled from; with one update a batch ``logp.detach()``.
        ref_logp: ln pi_ref; None without KL.
        advantages: of each output, or of each token under process supervision.
        mask: the policy's own tokens.
        weights: of ``importance_weights``; they scale the policy's part and not the KL.
        denominator: outputs of the whole batch (tokens where ``normalise`` is "tokens") if this is a micro-batch: the losses of the
            micro-batches then add up to that of the batch. Absent: those of these rows.

    Raises:
        ConfigError: a KL without reference, or a constant length that is not set.
    """
    if ref_logp is None and objective.kl_weight > 0:
        raise ConfigError(
            f"kl_weight = {objective.kl_weight} needs the reference's log-probabilities", hint="pass ref_logp, or kl_weight = 0"
        )
    rho = ratios(logp, old_logp, mask, objective.ratio)
    advantages = torch.where(mask, advantages.unsqueeze(1) if advantages.ndim == 1 else advantages, 0.0)
    surrogate = _surrogate(rho, advantages, objective.clip_low, objective.clip_high)
    if weights is not None:
        surrogate = surrogate * torch.where(mask, weights, 0.0)
    shape = objective.normalise, objective.constant_len, denominator
    loss = _mean(-surrogate, mask, *shape)
    divergence, in_loss = None, None
    if ref_logp is not None:
        divergence = _mean(kl(logp.detach(), ref_logp), mask, "tokens")
        in_loss = _mean(kl(*_at_level(logp, ref_logp, mask, objective.ratio), objective.kl), mask, *shape)
        loss = loss + objective.kl_weight * in_loss if objective.kl_weight else loss

    def share(values: Tensor) -> Tensor:
        return _mean(values.detach().to(logp.dtype), mask, "output" if objective.ratio == "output" else "tokens")

    low, high = (rho < 1 - objective.clip_low) & (advantages < 0), (rho > 1 + objective.clip_high) & (advantages > 0)
    return LossParts(
        loss=loss,
        kl=divergence,
        kl_loss=None if in_loss is None else in_loss.detach(),
        clipped_low=share(low),
        clipped_high=share(high),
        clipped_low_min=_shares(low, mask, 1.0).amin(),
        clipped_high_max=_shares(high, mask, 0.0).amax(),
        ratio_max=torch.where(mask, rho, 0.0).amax().detach(),
        weight_min=None if weights is None else torch.where(mask, weights, torch.inf).amin(),
        weight_mean=None if weights is None else share(weights),
        weight_max=None if weights is None else torch.where(mask, weights, 0.0).amax(),
        weight_capped=None if weights is None else share((weights == 0) | (weights >= objective.correction_cap)),
    )


def ratios(logp: Rows, old_logp: Rows, mask: Mask, level: Level) -> Rows:
    """Return pi_theta / pi_old: of each token, or at every token of an output that of the whole output (V2 eq 32); 1 at other places."""
    now, old = _at_level(logp, old_logp, mask, level)
    return (now - old).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()


def kl(logp: Rows, ref_logp: Rows, kind: Literal["k1", "k2", "k3"] = "k3") -> Rows:
    """Estimate KL(pi_theta || pi_ref) from samples of pi_theta: k1, k2 or k3.

    With d = ln pi_ref - ln pi_theta: k1 = -d; k2 = d^2 / 2; k3 = exp(d) - d - 1 (V2 eq 33, DSM eq 4), unbiased as k1 is and never negative.
    In a loss their gradients differ: k1's has expectation 0 on policy, k2's is that of the KL, k3's vanishes at the reference.
    """
    difference = ref_logp - logp
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    bounded = difference.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    return torch.expm1(bounded) - bounded


def advantages(rewards: Float[Tensor, "groups size"], kind: Literal["zscore", "mean", "none"] = "zscore") -> Float[Tensor, "groups size"]:
    """Return A_i of rewards in their group: (r_i - mean) / std (V2 eq 34), without the division (DR section 3.2), or r_i itself.

    std is the group's own, of all its G outputs (divided by G, not by G - 1), without an epsilon. Equal rewards give exactly 0. A NaN is an
    output without a score: it counts in neither mean nor std and has advantage 0.
    """
    scored = ~rewards.isnan()
    values = torch.where(scored, rewards, 0.0)
    if kind == "none":
        return values
    wide = values.double()
    num = scored.sum(dim=-1, keepdim=True).clamp_min(1)
    centred = torch.where(scored, wide - wide.sum(dim=-1, keepdim=True) / num, 0.0)
    differ = rewards_differ(rewards).unsqueeze(-1)
    if kind == "zscore":
        deviation = (centred.square().sum(dim=-1, keepdim=True) / num).sqrt()
        centred = centred / torch.where(differ, deviation, 1.0)
    return torch.where(differ, centred, 0.0).to(rewards.dtype)


def rewards_differ(rewards: Float[Tensor, "groups size"]) -> Bool[Tensor, " groups"]:
    """Tell in which groups rewards differ by more than rounding (``EQUAL``); NaN is an output without a score, and no difference."""
    scored, wide = ~rewards.isnan(), rewards.double()
    highest = torch.where(scored, wide, -torch.inf).amax(dim=-1)
    lowest = torch.where(scored, wide, torch.inf).amin(dim=-1)
    return highest - lowest > EQUAL * torch.where(scored, wide.abs(), 0.0).amax(dim=-1)


def process_advantages(
    step_rewards: Float[Tensor, "groups size steps"],
    step_ends: Int[Tensor, "groups size steps"],
    lengths: Int[Tensor, "groups size"],
    kind: Literal["zscore", "mean", "none"] = "zscore",
) -> Float[Tensor, "groups size tokens"]:
    """Return A_{i,t} under process supervision (DSM section 4.1.3): the sum of the normalised rewards of the steps that end at t or later.

    Args:
        step_rewards: of each step, normalised over all steps of a group; NaN where an output has no such step, or no score for it.
        step_ends: index of each step's last token in its output, from 0; whatever where there is no step.
        lengths: tokens of each output; tokens after them get 0.
        kind: how they are normalised, z-scores in the paper; see ``advantages``.
    """
    normalised = advantages(step_rewards.flatten(1), kind).view_as(step_rewards)
    place = torch.arange(int(lengths.max()), device=lengths.device)
    to_come = (step_ends.unsqueeze(-1) >= place) & ~step_rewards.isnan().unsqueeze(-1)
    summed = (normalised.unsqueeze(-1) * to_come).sum(dim=-2)
    return summed * (place < lengths.unsqueeze(-1))


def importance_weights(
    behaviour_logp: Rows,
    old_logp: Rows,
    mask: Mask,
    kind: Literal["none", "truncate", "mask"],
    cap: float,
    level: Level = "token",
) -> Rows:
    """Return pi_old / pi_behaviour, constants that correct for a sampler whose probabilities are not the trainer's.

    Args:
        behaviour_logp: what the sampler said of its tokens.
        old_logp: what the trainer says of them, before the update.
        mask: the policy's own tokens.
        kind: 1 everywhere; cut at the cap; or 0 where it is above the cap.
        cap: the largest weight.
        level: of each token, or one for the whole output; take that of the objective's ratio.
    """
    weight = ratios(old_logp.detach(), behaviour_logp.detach(), mask, level)
    if kind == "none":
        return torch.ones_like(weight)
    return weight.clamp(max=cap) if kind == "truncate" else torch.where(weight > cap, 0.0, weight)


def overlong_penalty(length: int, max_len: int, buffer: int) -> float:
    """Return what an answer's length adds to its reward (DAPO eq 13): 0, then falling to -1 over the last ``buffer`` tokens.

    Args:
        length: tokens of the answer.
        max_len: tokens that an answer may have.
        buffer: tokens.

    Raises:
        ConfigError: a buffer longer than the answer may be, or of no tokens.
    """
    if not 0 < buffer <= max_len:
        raise ConfigError(f"overlong_buffer = {buffer} tokens; allowed are 1 to {max_len}, the longest answer")
    return -min(1.0, max(0.0, (length - (max_len - buffer)) / buffer))


def _at_level(logp: Tensor, other: Tensor, mask: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Return both log-probabilities with 0 outside the mask; of whole outputs, their sums at every place."""
    masked = torch.where(mask, logp, 0.0), torch.where(mask, other, 0.0)
    if level == "token":
        return masked
    now, then = (part.sum(dim=1, keepdim=True).expand_as(logp) for part in masked)
    return now, then


def _shares(flags: Tensor, mask: Tensor, empty: float) -> Tensor:
    """Return of each row the share of its tokens that are flagged; ``empty`` where it has none."""
    counts = mask.sum(dim=1)
    return torch.where(counts > 0, (flags & mask).sum(dim=1) / counts.clamp_min(1), empty)


def _surrogate(rho: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _mean(
    values: Tensor, mask: Tensor, normalise: Normalise, constant_len: int | None = None, denominator: int | None = None
) -> Float[Tensor, ""]:
    """Return the mean over the mask that ``normalise`` says; an output without a token in the mask is not counted."""
    kept = torch.where(mask, values, 0.0)
    if normalise == "tokens":
        return kept.sum() / (denominator or mask.sum().clamp_min(1))
    if normalise == "output":
        kept = kept / mask.sum(dim=1, keepdim=True).clamp_min(1)
    elif constant_len is None:
        raise ConfigError("normalise = 'constant' and no constant_len", hint="set constant_len to the longest answer allowed, in tokens")
    else:
        kept = kept / constant_len
    return kept.sum() / (denominator or mask.any(dim=1).sum().clamp_min(1))
