"""Muon on the matrices of the blocks, AdamW beside it on the rest (beyond the paper).

Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) takes the momentum of a matrix and steps along the nearest matrix with equal
singular values. torch.optim.Muon is of plain matrices only; here one batched product serves all experts of a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2.model.attention import LatentAttention
from dsv2.model.experts import RoutedExperts
from dsv2.model.transformer import Transformer

# Of the quintic a x + b x^3 + c x^5 that takes singular values in (0, 1] to about 1 in five rounds: Jordan's, and torch's.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS, _EPSILON = 5, 1e-7
_HEADS = ("lm_head", "score_head")  # a language model has the first, a reward model the second


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the matrices lie in a parameter of any shape [..., columns].

    Args:
        count: equal blocks of rows, one after the other: experts or heads.
        rows: rows of the matrices in each block, one below the other.
    """

    count: int
    rows: tuple[int, ...]

    def apply(self, parameter: Tensor) -> Sequence[Float[Tensor, "count rows columns"]]:
        """Return the matrices as views, a stack for each entry of ``rows``."""
        blocks = parameter.view(self.count, sum(self.rows), parameter.shape[-1])
        stacks: Sequence[Tensor] = blocks.split(self.rows, dim=1)
        return stacks


def hidden_matrices(model: Transformer) -> dict[str, Cut]:
    """Return the parameters that Muon moves, by name, cut into the matrices of the paper's equations, one a head or expert.

    What files store as one is several matrices here: gate and up of an expert, W^DKV and W^KR, a head's W^UK and W^UV. The embedding,
    the head and the router are left out: their rows are vectors of tokens or experts, each used alone.
    """
    cuts: dict[str, Cut] = {}
    for name, module in model.named_modules():
        if isinstance(module, LatentAttention):
            query = "q_b_proj" if module.compressed_queries else "q_proj"
            cuts[f"{name}.{query}.weight"] = Cut(module.heads, (module.nope_dim, module.rope_dim))
            cuts[f"{name}.kv_a_proj_with_mqa.weight"] = Cut(1, (module.latent_dim, module.rope_dim))
            cuts[f"{name}.kv_b_proj.weight"] = Cut(module.heads, (module.nope_dim, module.value_dim))
        elif isinstance(module, RoutedExperts):
            experts, hidden, width = module.down_proj.shape
            cuts[f"{name}.gate_up_proj"] = Cut(experts, (width, width))
            cuts[f"{name}.down_proj"] = Cut(experts, (hidden,))
        elif isinstance(module, nn.Linear) and name not in _HEADS:
            cuts.setdefault(f"{name}.weight", Cut(1, (module.out_features,)))
    return cuts


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on some parameters and the given AdamW on others, to a loop and a checkpoint one optimiser: one list of groups, one state.

    One learning rate serves both: a Muon update is scaled to a fixed root mean square per element, as AdamW's have by themselves
    (arXiv 2502.16982, section 2.2). Weight decay is decoupled in both.

    A matrix without gradient still moves: its momentum shrinks but its update does not, until nothing is left of it.

    Args:
        matrices: parameters and the matrices in them.
        adamw: of all other parameters; from here on its groups and state are this optimiser's.
        weight_decay: on the matrices.
        momentum: decay of the mean of gradients; looked ahead by one step (Nesterov).
        rms: root mean square of an update over the learning rate.
        products: dtype of the matrix products; momentum and weights keep theirs.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, Cut]],
        adamw: torch.optim.AdamW,
        *,
        weight_decay: float,
        momentum: float,
        rms: float,
        products: torch.dtype,
    ) -> None:
        super().__init__([parameter for parameter, _ in matrices], {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self._cuts = dict(matrices)
        self._adamw, self._rms, self._products = adamw, rms, products
        self.param_groups += adamw.param_groups
        adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; the groups and the state stay shared with AdamW."""
        super().load_state_dict(state_dict)
        self._adamw.param_groups = self.param_groups[1:]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; a closure is not taken."""
        self._adamw.step()
        group = self.param_groups[0]
        for parameter, cut in self._cuts.items():
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, cut, group["lr"], group["weight_decay"], group["momentum"])

    def _move(self, parameter: Tensor, grad: Tensor, cut: Cut, lr: float, weight_decay: float, momentum: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        ahead = grad.lerp(buffer, momentum)
        parameter.mul_(1 - lr * weight_decay)
        for matrices, update in zip(cut.apply(parameter), cut.apply(ahead), strict=True):
            # k unit singular values in a k x l matrix, k <= l: mean square 1 / l
            scale = self._rms * math.sqrt(max(update.shape[1:]))
            matrices.add_(orthogonalise(update, self._products), alpha=-lr * scale)


def orthogonalise(matrices: Float[Tensor, "count rows columns"], products: torch.dtype) -> Float[Tensor, "count rows columns"]:
    """Return U V^T of each matrix U S V^T, nearly: Newton-Schulz leaves singular values between about 0.7 and 1.2.

    Args:
        matrices: of any scale; zeros stay zeros.
        products: dtype of the matrix products and of the result.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # so that the square products are of the shorter side
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    x = x.to(products, memory_format=torch.contiguous_format)
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
