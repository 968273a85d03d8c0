"""Device-level token dropping, one assignment at a time (P section 2.2.4; spec 3.4, 10.8)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import balance, moe


def kept(
    affinity: Sequence[Sequence[float]],
    experts: Sequence[Sequence[int]],
    protected: Sequence[bool],
    *,
    n_group: int,
    capacity_factor: float = 1.0,
) -> list[list[bool]]:
    """Which (token, choice) pairs are computed; `protected` says for each token whether its sequence is.

    Each device drops the assignment of lowest affinity, of equals the last, until its budget of ceil(K_r N / D) times the factor is met
    or only protected ones are left.
    """
    num_experts, num_chosen = len(affinity[0]), len(experts[0])
    budget = round(capacity_factor * math.ceil(num_chosen * len(experts) / n_group))
    result = [[True] * num_chosen for _ in experts]
    for members in balance.groups(num_experts, n_group):
        here = [(t, k) for t, row in enumerate(experts) for k, i in enumerate(row) if i in members]
        while len(here) > budget:
            free = [(t, k) for t, k in here if not protected[t]]
            if not free:
                break
            lowest = min(affinity[t][experts[t][k]] for t, k in free)
            t, k = [(t, k) for t, k in free if affinity[t][experts[t][k]] == lowest][-1]
            here.remove((t, k))
            result[t][k] = False
    return result


def layer(
    u: Tensor, state: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], protected: Sequence[bool], capacity_factor: float
) -> tuple[Tensor, list[list[bool]]]:
    """The MoE layer over the N tokens of a micro-batch, dropped assignments left out of the sum, and which were kept.

    No gate is renormalised; shared experts see every token.
    """
    affinities = [moe.affinities(u_t, state[prefix + "gate.weight"]) for u_t in u]
    experts = [moe.select(affinity, config) for affinity in affinities]
    computed = kept([a.tolist() for a in affinities], experts, protected, n_group=config["n_group"], capacity_factor=capacity_factor)
    outputs = []
    for u_t, affinity, chosen, stays in zip(u, affinities, experts, computed, strict=True):
        output = moe.expert(u_t, state, prefix + "shared_experts.") if config["n_shared_experts"] else torch.zeros_like(u_t)
        for gate, i, stay in zip(moe.gates(affinity, chosen, config), chosen, stays, strict=True):
            if stay:
                output = output + gate * moe.expert(u_t, state, f"{prefix}experts.{i}.")
        outputs.append(output)
    return torch.stack(outputs), computed
