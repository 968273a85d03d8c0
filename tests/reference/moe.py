"""DeepSeekMoE: affinities, device-limited selection, gates, shared and routed experts (P section 2.2, eq 20-22)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layers import swiglu


def affinities(u: Tensor, centroids: Tensor) -> Tensor:
    """s_{i,t} = softmax_i(u_t . e_i) of one token, [N_r] (P eq 22)."""
    logits = torch.stack([u @ centroid for centroid in centroids])
    return torch.softmax(logits, dim=0)


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` highest scores, best first, the lower index first among equals (spec 10.17)."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def select(affinity: Tensor, config: Mapping[str, Any]) -> list[int]:
    """Experts of one token, best first (P eq 21; P section 2.2.2 for the device limit).

    With groups: a group's score is its highest affinity; the `topk_group` best groups stay; the top `num_experts_per_tok` come from them.
    """
    scores = affinity.tolist()
    if config["topk_method"] == "greedy":
        return best(scores, config["num_experts_per_tok"])
    groups, group_len = config["n_group"], len(scores) // config["n_group"]
    group_scores = [max(scores[g * group_len : (g + 1) * group_len]) for g in range(groups)]
    kept = set(best(group_scores, config["topk_group"]))
    masked = [score if i // group_len in kept else float("-inf") for i, score in enumerate(scores)]
    return best(masked, config["num_experts_per_tok"])


def gates(affinity: Tensor, experts: list[int], config: Mapping[str, Any]) -> Tensor:
    """c_r g_{i,t} of the chosen experts, [K_r] (P eq 21): the softmax over all experts, not renormalised unless `norm_topk_prob`."""
    chosen = torch.stack([affinity[i] for i in experts])
    if config.get("norm_topk_prob", False):
        chosen = chosen / chosen.sum()
    return chosen * config["routed_scaling_factor"]


def layer(u: Tensor, state: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Shared plus routed experts of every token (P eq 20 without its residual).

    Returns:
        The layer's output [T, d], the affinities [T, N_r] and the chosen experts [T, K_r], best first.
    """
    outputs, all_affinities, all_experts = [], [], []
    for u_t in u:
        affinity = affinities(u_t, state[prefix + "gate.weight"])
        experts = select(affinity, config)
        output = torch.zeros_like(u_t)
        if config["n_shared_experts"]:
            output = output + expert(u_t, state, prefix + "shared_experts.")
        for gate, i in zip(gates(affinity, experts, config), experts, strict=True):
            output = output + gate * expert(u_t, state, f"{prefix}experts.{i}.")
        outputs.append(output)
        all_affinities.append(affinity)
        all_experts.append(torch.tensor(experts))
    return torch.stack(outputs), torch.stack(all_affinities), torch.stack(all_experts)


def expert(u: Tensor, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """FFN_i(u) of the expert stored under `prefix` (P eq 20)."""
    return swiglu(u, state[prefix + "gate_proj.weight"], state[prefix + "up_proj.weight"], state[prefix + "down_proj.weight"])
