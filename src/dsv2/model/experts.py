"""The routed experts of a layer, and the seam through which their tokens travel.

The layer always does the same three things: dispatch token rows to experts, compute, combine. The default dispatch is local; expert
parallelism puts an all-to-all in its place without the layer noticing.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.kernels import grouped_swiglu, one_token_swiglu, row_tile
from dsv2.kernels.permute import permute_rows, sum_copies
from dsv2.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Token rows at the process that holds their experts, and how to lay them out: one row per assignment, sorted by expert.

    Every expert's rows may be followed by rows that fill up a tile: copies of some token with gate 0, which add nothing anywhere.

    Args:
        x: [N, D] the tokens' rows.
        gates: [M] fp32 weight of each laid-out row's result.
        counts: rows of each expert, fillers included; sums to M.
        order: [M] for each row, its flat (token, choice) index.
        inverse: [N * K] for each flat (token, choice) index, its row.
        copies: K, assignments per token.
    """

    x: Float[Tensor, "tokens hidden"]
    gates: Float[Tensor, " rows"]
    counts: list[int]
    order: Int[Tensor, " rows"]
    inverse: Int[Tensor, " assignments"]
    copies: int


@runtime_checkable
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

    def combine(self, rows: Float[Tensor, "rows hidden"], sent: Dispatched) -> Float[Tensor, "tokens hidden"]:
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
        """Sort the assignments by expert (stable, so tokens keep their order within an expert)."""
        copies, flat = experts.shape[1], experts.flatten()
        order, inverse, counts = sort_by_expert(flat, num_experts, row_tile(x))
        flat_gates = gates.flatten()
        if len(order) == len(inverse):
            return Dispatched(x, permute_rows(flat_gates, order, inverse), counts, order, inverse, copies)
        real = flat_gates.new_zeros(len(order)).scatter_(0, inverse, 1.0)
        return Dispatched(x, flat_gates.index_select(0, order) * real, counts, order, inverse, copies)

    def combine(self, rows: Float[Tensor, "rows hidden"], sent: Dispatched) -> Float[Tensor, "tokens hidden"]:
        """Sum each token's rows."""
        return sum_copies(rows, sent.order, sent.inverse, sent.copies)


def sort_by_expert(
    flat: Int[Tensor, " assignments"], num_experts: int, tile: int
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " assignments"], list[int]]:
    """Lay out assignments by expert, each expert's rows rounded up to whole tiles.

    Args:
        flat: expert of each flat (token, choice) index.
        num_experts: E.
        tile: rows per tile.

    Returns:
        order: for each row its assignment; fillers point at assignment 0.
        inverse: for each assignment its row.
        counts: rows of each expert, fillers included.
    """
    by_expert = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    if tile == 1:
        return by_expert, torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(len(flat), device=flat.device)), counts.tolist()
    tiled = (counts + tile - 1) // tile * tile
    shift = (tiled.cumsum(0) - tiled) - (counts.cumsum(0) - counts)  # how far fillers push each expert's first row
    row = torch.arange(len(flat), device=flat.device) + shift.index_select(0, flat.index_select(0, by_expert))
    tiled_counts: list[int] = tiled.tolist()
    order = by_expert.new_zeros(sum(tiled_counts)).scatter_(0, row, by_expert)
    return order, torch.empty_like(by_expert).scatter_(0, by_expert, row), tiled_counts


class RoutedExperts(nn.Module):
    """E SwiGLU experts as two stacked weights (published files hold them one by one; checkpoint/names.py says which lies where)."""

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
        if len(x) == 1 and not torch.is_grad_enabled() and isinstance(self.transport, LocalDispatch):
            return one_token_swiglu(x[0], experts[0].tolist(), gates[0], self.gate_up_proj, self.down_proj).unsqueeze(0)
        sent = self.transport.dispatch(x, experts, gates, len(self.down_proj))
        rows = grouped_swiglu(sent.x, sent.order, sent.inverse, sent.copies, sent.counts, self.gate_up_proj, self.down_proj, sent.gates)
        return self.transport.combine(rows, sent)
