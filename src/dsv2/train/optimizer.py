"""The optimisers, and their moments by parameter name: AdamW as published (section 3.1.2; spec 4.1, 10.11), or Muon on hidden matrices."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsv2.config import Section
from dsv2.errors import CheckpointError
from dsv2.model.transformer import Transformer
from dsv2.train.muon import MuonWithAdamW, hidden_matrices


class OptimizerSection(Section):
    """AdamW on everything, as published, or Muon on the hidden matrices and AdamW on the rest; and the gradient clip."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw", description="of the blocks' matrices; embedding, head, router and norm gains have AdamW in any case"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of gradients in Muon")
    muon_rms: float = Field(default=0.2, gt=0, description="root mean square of a Muon update over the learning rate; AdamW's is near 0.2")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices; norm gains have none")
    clip_norm: float = Field(default=1.0, gt=0, description="largest global gradient norm")

    @model_validator(mode="after")
    def _check(self) -> "OptimizerSection":
        for name in ("muon_momentum", "muon_rms"):
            if self.kind == "adamw" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)} has no meaning with kind = 'adamw': leave it out, or set kind = 'muon'")
        return self


def make_optimizer(model: Transformer, section: OptimizerSection, *, products: torch.dtype | None = None) -> torch.optim.Optimizer:
    """Return the optimiser of all parameters: matrices with weight decay, gains without.

    Args:
        model: on its device.
        section: which, and its numbers.
        products: dtype of Muon's matrix products, as that of the model's; None: fp32.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    cuts = {name: cut for name, cut in hidden_matrices(model).items() if name in named} if section.kind == "muon" else {}
    rest = [parameter for name, parameter in named.items() if name not in cuts]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (section.adam_beta1, section.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=section.adam_epsilon, fused=True)
    if not cuts:
        return adamw
    return MuonWithAdamW(
        [(named[name], cut) for name, cut in cuts.items()], adamw, weight_decay=section.weight_decay,
        momentum=section.muon_momentum, rms=section.muon_rms, products=products or torch.float32,
    )  # fmt: skip


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of every parameter as ``name.moment``."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{moment}"] = value
    return tensors


def restore_optimizer(model: Transformer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put saved moments back; on the same device they become the optimiser's own, not copies: a run holds them once.

    No tensor at all is the state of an optimiser that has taken no step: a run whose first steps had nothing to learn from.

    Raises:
        CheckpointError: a parameter's moments are missing.
    """
    if not tensors:
        optimizer.state.clear()
        return
    moments = {parameter: _moments(group) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in ((name, parameter) for name, parameter in model.named_parameters() if parameter in moments):
        try:
            own = {moment: tensors[f"{name}.{moment}"] for moment in moments[parameter]}
        except KeyError as error:
            raise CheckpointError(
                f"the checkpoint's optimiser lacks {error.args[0]!r}",
                hint="its model has other parameters than this run's, or its optimizer.kind was another",
            ) from None
        optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in own.items()}


def _moments(group: Mapping[str, object]) -> tuple[str, ...]:
    """Name what the optimiser keeps of each parameter of a group."""
    return ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq", "step")
