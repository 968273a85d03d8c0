"""Which experts a token goes to, with what weight, and what came of it (section 2.2; spec 3.1-3.2)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv2.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """The decision for N tokens.

    Args:
        affinity: [N, E] s_{i,t}, fp32, rows sum to 1, of all experts (eq 22).
        experts: [N, K] the chosen experts, best first.
        gates: [N, K] g_{i,t} of the chosen, fp32, times ``routed_scaling_factor`` (eq 21).
    """

    affinity: Float[Tensor, "tokens experts"]
    experts: Int[Tensor, "tokens chosen"]
    gates: Float[Tensor, "tokens chosen"]


@dataclass(frozen=True, slots=True)
class RouterStats:
    """What one MoE layer's router did with a batch: the input of the balance losses and of load metrics.

    Args:
        layer: index of the layer in the model.
        affinity: [B, T, E] fp32; carries the gradient.
        experts: [B, T, K] the selection before any dropping.
        kept: [B, T, K] False where an assignment was dropped; None where nothing may be.
    """

    layer: int
    affinity: Float[Tensor, "batch tokens experts"]
    experts: Int[Tensor, "batch tokens chosen"]
    kept: Bool[Tensor, "batch tokens chosen"] | None = None


class Router(nn.Module):
    """Centroids e_i and the choice of experts; logits, softmax and gates are fp32 in any model dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x: Float[Tensor, "tokens hidden"], chosen: Int[Tensor, "tokens chosen"] | None = None) -> Routing:
        """Route N tokens; to the ``chosen`` experts where they are given."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 logits would flip near-ties between experts
            return route(F.linear(x.to(dtype), self.weight.to(dtype)), self.config, chosen)


def route(logits: Float[Tensor, "tokens experts"], config: ModelConfig, chosen: Int[Tensor, "tokens chosen"] | None = None) -> Routing:
    """Choose every token's experts from its router logits (eq 20-22, section 2.2.2).

    Args:
        logits: u_t . e_i, fp32.
        config: ``topk_method``, ``num_experts_per_tok``, groups and gate scaling.
        chosen: experts that were chosen before, as reinforcement learning replays those of its rollouts; their gates are of today's logits.

    Returns:
        The routing. Gates are the softmax over *all* experts at the chosen ones: not renormalised unless ``norm_topk_prob``. Equal
        affinities go to the lower index.
    """
    affinity = logits.softmax(dim=-1)
    experts = _choose(affinity.detach(), config) if chosen is None else chosen
    gates = affinity.gather(1, experts)
    if config.norm_topk_prob:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    if config.routed_scaling_factor != 1.0:
        gates = gates * config.routed_scaling_factor
    return Routing(affinity, experts, gates)


def _choose(candidates: Float[Tensor, "tokens experts"], config: ModelConfig) -> Int[Tensor, "tokens chosen"]:
    assert config.num_experts_per_tok is not None
    if config.topk_method == "group_limited_greedy":
        candidates = limit_groups(candidates, config.n_group, config.topk_group)
    return _top(candidates, config.num_experts_per_tok)


def limit_groups(affinity: Float[Tensor, "tokens experts"], n_group: int, topk_group: int) -> Float[Tensor, "tokens experts"]:
    """Set to -inf what lies outside each token's best groups; a group is worth its *highest* affinity (section 2.2.2).

    A group stands for a device, but the choice depends on the config alone: one process and eight choose alike.
    """
    best_groups = _top(affinity.unflatten(-1, (n_group, -1)).amax(dim=-1), topk_group)
    reachable = torch.zeros(len(affinity), n_group, dtype=torch.bool, device=affinity.device).scatter_(1, best_groups, True)
    return affinity.masked_fill(~reachable.repeat_interleave(affinity.shape[-1] // n_group, dim=-1), -math.inf)


def _top(values: Float[Tensor, "tokens choices"], count: int) -> Int[Tensor, "tokens chosen"]:
    # a stable sort, not topk: topk does not say which of two equal values it takes
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
