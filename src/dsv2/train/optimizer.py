"""AdamW as published: decay on matrices only, moments saved by parameter name (section 3.1.2; spec 4.1, 10.11)."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from dsv2.config import Section
from dsv2.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdamWSection(Section):
    """AdamW and the gradient clip."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices; norm gains have none")
    clip_norm: float = Field(default=1.0, gt=0, description="largest global gradient norm")


def make_optimizer(model: nn.Module, section: AdamWSection) -> torch.optim.AdamW:
    """Return AdamW over all parameters in two groups: matrices with weight decay, gains without."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (section.adam_beta1, section.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=section.adam_epsilon, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of every parameter as ``name.moment``."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{moment}"] = value
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put saved moments back.

    Raises:
        CheckpointError: a parameter's moments are missing.
    """
    for name, parameter in model.named_parameters():
        try:
            optimizer.state[parameter] = {moment: tensors[f"{name}.{moment}"].clone() for moment in _MOMENTS}
        except KeyError as error:
            raise CheckpointError(
                f"the checkpoint's optimiser lacks {error.args[0]!r}", hint="its model has other parameters than this run's"
            ) from None
