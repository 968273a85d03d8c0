"""The three balance losses of one sequence and one layer, without their factors alpha (P eq 23-31).

`affinity` is s_{i,t} [T, N_r] (the full softmax), `experts` the chosen ones [T, K_r]. Counts are constants for the gradient.
"""

import torch
from torch import Tensor


def expert_loss(affinity: Tensor, experts: Tensor) -> Tensor:
    """sum_i f_i P_i (P eq 23-25)."""
    frequency, probability = expert_frequency(affinity, experts), affinity.mean(dim=0)
    return sum(frequency[i] * probability[i] for i in range(len(frequency)))


def device_loss(affinity: Tensor, experts: Tensor, n_group: int) -> Tensor:
    """sum_d f'_d P'_d: f' the mean of f over a device's experts, P' the sum of P (P eq 26-28)."""
    frequency, probability = expert_frequency(affinity, experts), affinity.mean(dim=0)
    total = affinity.new_zeros(())
    for members in groups(affinity.shape[1], n_group):
        mean_frequency = sum(frequency[i] for i in members) / len(members)  # P eq 27
        total = total + mean_frequency * sum(probability[i] for i in members)  # P eq 28
    return total


def communication_loss(affinity: Tensor, experts: Tensor, n_group: int, topk_group: int) -> Tensor:
    """sum_d f''_d P''_d: f'' counts tokens sent to a device, once however many of its experts they want (P eq 29-31)."""
    probability, num_tokens = affinity.mean(dim=0), affinity.shape[0]
    total = affinity.new_zeros(())
    for members in groups(affinity.shape[1], n_group):
        sent = sum(1 for chosen in experts.tolist() if any(i in members for i in chosen))
        total = total + n_group * sent / (topk_group * num_tokens) * sum(probability[i] for i in members)  # P eq 30, 31
    return total


def expert_frequency(affinity: Tensor, experts: Tensor) -> list[float]:
    """f_i = N_r / (K_r T) * #{t : token t selects expert i} (P eq 24)."""
    (num_tokens, num_experts), num_chosen = affinity.shape, experts.shape[1]
    chosen = experts.flatten().tolist()
    return [num_experts / (num_chosen * num_tokens) * chosen.count(i) for i in range(num_experts)]


def groups(num_experts: int, n_group: int) -> list[range]:
    """The contiguous expert indices of each device (P section 2.2.2)."""
    group_len = num_experts // n_group
    return [range(g * group_len, (g + 1) * group_len) for g in range(n_group)]


def batch_mean(losses: list[Tensor]) -> Tensor:
    """The loss of a batch: that of each sequence, averaged (P eq 23 says "in a sequence"; spec 10.9)."""
    return torch.stack(losses).mean()
