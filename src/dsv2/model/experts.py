"""The routed experts of a layer, and the seam through which their tokens travel.

The layer always does the same three things: dispatch token rows to experts, compute, combine. The default dispatch is local; expert parallelism
puts an all-to-all in its place without the layer noticing.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.kernels import grouped_swiglu
from dsv2.kernels.permute import permute_rows, repeat_rows, sum_copies
from dsv2.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Token rows at the experts that this process holds, sorted by expert.

    Args:
        rows: [M, D] one row per (token, expert) assignment.
        gates: [M] fp32 weight of each row's result.
        counts: rows of each expert; sums to M.
        order: [M] for each row, its flat (token, choice) index.
        inverse: [M] the permutation back.
        copies: K, assignments per token.
    """

    rows: Float[Tensor, "assignments hidden"]
    gates: Float[Tensor, " assignments"]
    counts: list[int]
    order: Int[Tensor, " assignments"]
    inverse: Int[Tensor, " assignments"]
    copies: int


class Dispatch(Protocol):
    """How token rows reach their experts and come back."""

    def dispatch(
        self,
        x: Float[Tensor, "tokens hidden"],
        experts: Int[Tensor, "tokens chosen"],
        gates: Float[Tensor, "tokens chosen"],
        num_experts: int,
    ) -> Dispatched:
        """Send each token's row to its chosen experts."""
        ...

    def combine(self, rows: Float[Tensor, "assignments hidden"], sent: Dispatched) -> Float[Tensor, "tokens hidden"]:
        """Bring the weighted results back and sum them per token."""
        ...


class LocalDispatch:
    """All experts live in this process: sort the assignments by expert, and back."""

    def dispatch(
        self,
        x: Float[Tensor, "tokens hidden"],
        experts: Int[Tensor, "tokens chosen"],
        gates: Float[Tensor, "tokens chosen"],
        num_experts: int,
    ) -> Dispatched:
        """Copy each token's row once per chosen expert, sorted by expert (stable, so tokens keep their order within an expert)."""
        copies = experts.shape[1]
        flat = experts.flatten()
        order = torch.argsort(flat, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.bincount(flat, minlength=num_experts).tolist()
        sorted_gates = permute_rows(gates.flatten(), order, inverse)
        return Dispatched(repeat_rows(x, order, inverse, copies), sorted_gates, counts, order, inverse, copies)

    def combine(self, rows: Float[Tensor, "assignments hidden"], sent: Dispatched) -> Float[Tensor, "tokens hidden"]:
        """Sum each token's rows."""
        return sum_copies(rows, sent.order, sent.inverse, sent.copies)


class RoutedExperts(nn.Module):
    """E SwiGLU experts as two stacked weights (published files hold them one by one; checkpoint/huggingface.py converts)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None and config.moe_intermediate_size is not None
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))  # rows 0..m-1 gate, m..2m-1 up
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.transport: Dispatch = LocalDispatch()

    def forward(
        self, x: Float[Tensor, "tokens hidden"], experts: Int[Tensor, "tokens chosen"], gates: Float[Tensor, "tokens chosen"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Return sum_i g_i FFN_i(x) over each token's chosen experts (second sum of eq 20)."""
        sent = self.transport.dispatch(x, experts, gates, len(self.down_proj))
        rows = grouped_swiglu(sent.rows, sent.counts, self.gate_up_proj, self.down_proj, sent.gates)
        return self.transport.combine(rows, sent)
