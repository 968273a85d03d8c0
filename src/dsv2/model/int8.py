"""A model whose matrices are int8 with one scale per row: the same blocks with other modules in the places of their matrices.

For inference only. Published names hold for it too: beside each ``weight`` lies a ``weight_scale``, beside the stacked experts a
``gate_up_proj_scale`` and a ``down_proj_scale``. Norms, router, embedding and kv_b_proj stay in the floating dtype of the model.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.kernels.quantize import int8_linear
from dsv2.model.config import FLOAT_IN_INT8
from dsv2.model.experts import RoutedExperts
from dsv2.model.transformer import Transformer


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Int8Linear(nn.Module):
    """A linear layer without bias that holds its weight as int8 rows."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = _frozen(rows, columns, dtype=torch.int8)
        self.weight_scale = _frozen(rows, dtype=torch.float32)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return x W^T."""
        return int8_linear(x, self.weight, self.weight_scale)


class Int8Experts(nn.Module):
    """The routed experts of a layer as int8 rows, run one expert at a time."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = _frozen(experts, 2 * width, hidden, dtype=torch.int8)  # rows 0..m-1 gate, m..2m-1 up
        self.gate_up_proj_scale = _frozen(experts, 2 * width, dtype=torch.float32)
        self.down_proj = _frozen(experts, hidden, width, dtype=torch.int8)
        self.down_proj_scale = _frozen(experts, hidden, dtype=torch.float32)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], experts: Int[Tensor, "tokens chosen"], gates: Float[Tensor, "tokens chosen"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Return sum_i g_i FFN_i(x) over each token's chosen experts (second sum of eq 20)."""
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for expert in experts.unique().tolist():
            token, choice = (experts == expert).nonzero(as_tuple=True)
            gate, up = int8_linear(x[token], self.gate_up_proj[expert], self.gate_up_proj_scale[expert]).chunk(2, dim=-1)
            rows = int8_linear(F.silu(gate) * up, self.down_proj[expert], self.down_proj_scale[expert])
            out.index_add_(0, token, rows.to(out.dtype) * gates[token, choice].unsqueeze(1).to(out.dtype))
        return out.to(x.dtype)


def hold_int8(model: Transformer) -> Transformer:
    """Put int8 modules, empty, in the places of a model's matrices; weights are read into them afterwards.

    Args:
        model: on the meta device, so that nothing is thrown away.
    """
    kept = (*FLOAT_IN_INT8, "lm_head") if model.config.tie_word_embeddings else FLOAT_IN_INT8  # a tied head is the embedding
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in kept:
                setattr(module, name, Int8Linear(child.out_features, child.in_features))
            elif isinstance(child, RoutedExperts):
                experts, hidden, width = child.down_proj.shape
                setattr(module, name, Int8Experts(experts, width, hidden))
    return model
