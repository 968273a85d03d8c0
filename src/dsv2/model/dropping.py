"""Device-level token dropping, in training only (section 2.2.4; spec 3.4, 10.8).

The unit is one assignment: a token at one of its experts. A device computes at most its budget, the average load times a capacity factor;
of what exceeds it the assignments with the lowest affinity are dropped. Those of protected sequences count in the load and are never
dropped, so that a model works with and without. A dropped assignment adds nothing; the gates that are left are not renormalised, and
residual and shared experts still act.

One process stands here for the D = ``n_group`` devices of an expert-parallel group: it sees the micro-batch of the whole group, and what
it drops is what the devices would. A device that holds its own part alone calls ``keep_within_budget`` with ``num_devices=1``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.model.config import ModelConfig
from dsv2.model.router import Routing


@dataclass(frozen=True, slots=True)
class Dropping:
    """The wish to drop, given to a forward pass in training; evaluation and generation give none.

    Args:
        capacity_factor: budget of a device over its average load; the paper's is 1.0.
        protected: [B] sequences whose tokens are never dropped; the paper protects about 10 %.
    """

    capacity_factor: float
    protected: Bool[Tensor, " batch"]

    def rows(self, start: int, stop: int) -> "Dropping":
        """Return the wish for sequences ``start`` to ``stop`` of the batch: one micro-batch of it."""
        return Dropping(self.capacity_factor, self.protected[start:stop])


def device_budget(num_tokens: int, chosen: int, num_devices: int, capacity_factor: float) -> int:
    """Return how many assignments a device computes: ceil(K_r N / D) times the factor, rounded.

    Args:
        num_tokens: N, of the expert-parallel group's micro-batch.
        chosen: K_r, experts per token.
        num_devices: D.
        capacity_factor: 1.0 is the average load.
    """
    return round(capacity_factor * -(-chosen * num_tokens // num_devices))


def keep_within_budget(
    affinity: Float[Tensor, " assignments"],
    devices: Int[Tensor, " assignments"],
    protected: Bool[Tensor, " assignments"],
    *,
    num_devices: int,
    budget: int,
) -> Bool[Tensor, " assignments"]:
    """Choose the assignments that each device computes (section 2.2.4).

    Args:
        affinity: s_{i,t} of each assignment; carries no gradient here.
        devices: where each is computed, from 0.
        protected: those that stay whatever the load.
        num_devices: D.
        budget: assignments per device.

    Returns:
        True where an assignment stays: all protected ones and, of the others, the highest affinities until the budget is met. Of equals
        the lower index stays. More than the budget stay only where the protected alone are more.
    """
    rank = affinity.detach().masked_fill(protected, float("inf")).sort(descending=True, stable=True).indices
    order = rank.index_select(0, devices.index_select(0, rank).sort(stable=True).indices)  # by device, within one best first
    load = torch.bincount(devices, minlength=num_devices)
    first = load.cumsum(0) - load
    place = torch.arange(len(order), device=order.device) - first.index_select(0, devices.index_select(0, order))
    return torch.empty_like(protected).scatter_(0, order, place < budget) | protected


def drop_assignments(routing: Routing, dropping: Dropping, config: ModelConfig) -> Bool[Tensor, "tokens chosen"]:
    """Return which of a layer's assignments stay when each of its devices keeps to its budget.

    Args:
        routing: of the N = B T tokens, sequence after sequence.
        dropping: how much, and the B sequences' protection.
        config: ``n_group`` devices hold equal contiguous parts of the experts.
    """
    num_tokens, chosen = routing.experts.shape
    group_len = routing.affinity.shape[-1] // config.n_group
    protected = dropping.protected.repeat_interleave(num_tokens // len(dropping.protected)).unsqueeze(-1).expand(-1, chosen)
    kept = keep_within_budget(
        routing.affinity.detach().gather(1, routing.experts).flatten(),
        (routing.experts // group_len).flatten(),
        protected.flatten(),
        num_devices=config.n_group,
        budget=device_budget(num_tokens, chosen, config.n_group, dropping.capacity_factor),
    )
    return kept.view(num_tokens, chosen)
