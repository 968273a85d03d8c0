"""The three balance losses, per sequence (section 2.2.3, eq 23-31; spec 3.3), without their weights: those are the recipe's.

Each is a sum of products f * P: f counts assignments and is a constant for the gradient, P is a mean affinity and carries it. Perfect
balance gives 1, so a value says how far routing is from it. Sequences are averaged; layers are summed by the caller (spec 10.9).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expert_balance_loss(affinity: Float[Tensor, "batch tokens experts"], experts: Int[Tensor, "batch tokens chosen"]) -> Float[Tensor, ""]:
    """Return sum_i f_i P_i (eq 23-25): keeps the load of single experts even."""
    loss: Tensor = (_relative_load(affinity, experts) * affinity.mean(dim=1)).sum(dim=-1).mean()
    return loss


def device_balance_loss(
    affinity: Float[Tensor, "batch tokens experts"], experts: Int[Tensor, "batch tokens chosen"], n_group: int
) -> Float[Tensor, ""]:
    """Return sum_d f'_d P'_d (eq 26-28): keeps the load of devices even; f' is a mean over a group's experts, P' a sum."""
    load: Tensor = _relative_load(affinity, experts).unflatten(-1, (n_group, -1)).mean(dim=-1)
    return (load * _group_affinity(affinity, n_group)).sum(dim=-1).mean()


def communication_balance_loss(
    affinity: Float[Tensor, "batch tokens experts"], experts: Int[Tensor, "batch tokens chosen"], n_group: int, topk_group: int
) -> Float[Tensor, ""]:
    """Return sum_d f''_d P''_d (eq 29-31): keeps what devices receive even; a token sent to a device counts once there."""
    group_of = experts // (affinity.shape[-1] // n_group)
    reached = torch.zeros(*affinity.shape[:2], n_group, device=affinity.device).scatter_(-1, group_of, 1.0)
    received = reached.mean(dim=1) * (n_group / topk_group)  # D/(M T), not 1/T
    return (received * _group_affinity(affinity, n_group)).sum(dim=-1).mean()


def pool_sequences(
    affinity: Float[Tensor, "batch tokens experts"], experts: Int[Tensor, "batch tokens chosen"]
) -> tuple[Float[Tensor, "one pooled experts"], Int[Tensor, "one pooled chosen"]]:
    """Make one sequence of a batch, so that the losses above even its load as a whole: the option that the paper does not take.

    Every sequence may then be one-sided while the batch is even. In DeepSeek's published code it is ``seq_aux=false``.
    """
    return affinity.flatten(0, 1).unsqueeze(0), experts.flatten(0, 1).unsqueeze(0)


def _relative_load(affinity: Tensor, experts: Tensor) -> Float[Tensor, "batch experts"]:
    """f_i = N_r / (K_r T) * assignments of expert i in the sequence: 1 when balanced (eq 24)."""
    num_experts, assignments = affinity.shape[-1], experts[0].numel()
    counts = torch.zeros(len(affinity), num_experts, dtype=affinity.dtype, device=affinity.device)
    counts.scatter_add_(1, experts.flatten(1), torch.ones_like(experts, dtype=affinity.dtype).flatten(1))
    load: Tensor = counts * (num_experts / assignments)
    return load


def _group_affinity(affinity: Tensor, n_group: int) -> Float[Tensor, "batch groups"]:
    by_group: Tensor = affinity.mean(dim=1).unflatten(-1, (n_group, -1))
    return by_group.sum(dim=-1)
