"""GRPO and its kin in plain loops over float64 numbers, equation by equation (P eq 32-34; DeepSeekMath eq 3, 4; DAPO eq 8, 13).

An output is a list of log-probabilities, one a token, without padding; a batch is a list of outputs.
"""

import math


def z_scores(rewards: list[float | None]) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r) over one group (P eq 34); None is left out and gets 0."""
    scored = [reward for reward in rewards if reward is not None]
    mean = sum(scored) / len(scored) if scored else 0.0
    std = math.sqrt(sum((reward - mean) ** 2 for reward in scored) / len(scored)) if scored else 0.0
    return [0.0 if reward is None or std == 0 else (reward - mean) / std for reward in rewards]


def step_advantages(step_rewards: list[list[float]], step_ends: list[list[int]], lengths: list[int]) -> list[list[float]]:
    """Process supervision of one group: z-scores over all steps, summed over the steps that end at or after a token."""
    flat = iter(z_scores([reward for rewards in step_rewards for reward in rewards]))
    normalised = [[next(flat) for _ in rewards] for rewards in step_rewards]
    return [
        [sum(reward for reward, end in zip(rewards, ends, strict=True) if end >= t) for t in range(length)]
        for rewards, ends, length in zip(normalised, step_ends, lengths, strict=True)
    ]


def clipped(rho: float, advantage: float, low: float, high: float) -> float:
    return min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)


def k3(logp: float, ref: float) -> float:
    """pi_ref / pi_theta - ln(pi_ref / pi_theta) - 1 (P eq 33)."""
    return math.exp(ref) / math.exp(logp) - (ref - logp) - 1


def v2_loss(logp, old, ref, advantages, low, high, beta) -> float:
    """-(1/G) sum_i (min(rho_i A_i, clip(rho_i) A_i) - beta KL_i), everything of whole outputs (P eq 32)."""
    total = 0.0
    for now, before, reference, advantage in zip(logp, old, ref, advantages, strict=True):
        rho = math.exp(sum(now)) / math.exp(sum(before))
        total += clipped(rho, advantage, low, high) - beta * k3(sum(now), sum(reference))
    return -total / len(logp)


def deepseekmath_loss(logp, old, ref, advantages, low, high, beta) -> float:
    """-(1/G) sum_i (1/|o_i|) sum_t (min(rho_it A_i, clip(rho_it) A_i) - beta KL_it) (DeepSeekMath eq 3)."""
    total = 0.0
    for now, before, reference, advantage in zip(logp, old, ref, advantages, strict=True):
        terms = [clipped(math.exp(now[t] - before[t]), advantage, low, high) - beta * k3(now[t], reference[t]) for t in range(len(now))]
        total += sum(terms) / len(terms)
    return -total / len(logp)


def token_sum(logp, old, advantages, low, high) -> float:
    """-sum_i sum_t min(rho_it A_i, clip(rho_it) A_i): what Dr. GRPO divides by a constant and DAPO by all tokens."""
    return -sum(
        clipped(math.exp(now[t] - before[t]), advantage, low, high)
        for now, before, advantage in zip(logp, old, advantages, strict=True)
        for t in range(len(now))
    )


def dr_grpo_loss(logp, old, advantages, low, high, max_len) -> float:
    """The sum over tokens, over the longest length allowed instead of each own, meaned over outputs (Dr. GRPO section 3.2)."""
    return token_sum(logp, old, advantages, low, high) / (max_len * len(logp))


def dapo_loss(logp, old, advantages, low, high) -> float:
    """The sum over tokens, over the number of all tokens (DAPO eq 8)."""
    return token_sum(logp, old, advantages, low, high) / sum(len(now) for now in logp)
