"""Low-rank adaptation: chosen matrices stay as they are, and each gets a trained difference of low rank (Hu et al. 2021).

    W' = W + alpha / r * B A        A [r, in] drawn at random, B [out, r] zero: training begins at the model itself

It works on linear layers and on the stacked experts alike, where A and B are stacks, too. While an adapted module computes, its weight *is*
W + alpha / r * B A: a hook puts the sum in the weight's place before the module runs and takes it away afterwards. So no layer, kernel
or reading of attention has to know of it, and merging changes nothing but where the sum is formed. What it saves is the memory of gradients
and moments and the size of what is kept, not time: the gradient of W' is formed, for a moment, to get those of A and B.

Names of weights stay those of published checkpoints; an adapter is a module beside its weight: ``...q_proj.weight_adapter.a``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dsv2.config import Section
from dsv2.errors import ConfigError
from dsv2.model.experts import RoutedExperts
from dsv2.model.transformer import Transformer

_SUFFIX = "_adapter"


class LoraSection(Section):
    """Train a difference of low rank instead of the weights."""

    rank: int = Field(gt=0, description="r, the rank of each difference")
    alpha: float = Field(gt=0, description="the difference is alpha / rank times B A")
    targets: tuple[str, ...] = Field(
        default=("self_attn.*_proj*", "mlp.*_proj", "mlp.experts"),
        min_length=1,
        description="modules of a block, by name within it; * stands for anything; experts: both stacks of routed experts",
    )


class Adapter(nn.Module):
    """The low-rank difference of one weight: a matrix [out, in], or a stack of them [experts, out, in]."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        drawn = torch.empty(*stack, rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
        self.scale, self.merged = scale, False  # merged: the weight itself holds the sum, see merged()
        self.a = nn.Parameter(drawn.to(weight.device))
        self.b = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device))

    def forward(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        """Return the adapted weight, formed in fp32 whatever autocast says: a rounded sum would lose small differences."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.b @ self.a)


def adapt(model: Transformer, section: LoraSection, seed: int) -> None:
    """Freeze a model's weights and give those that the section names an adapter; the same seed draws the same A.

    A reward model's head, a single row that begins at 0, is trained itself.

    Raises:
        ConfigError: a target names no matrix of any block, or a rank is not below a matrix's sizes.
    """
    model.requires_grad_(False)
    if model.head == "score":
        model.get_submodule("score_head").requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    met: set[str] = set()
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            hit = [target for target in section.targets if fnmatchcase(name, target)]
            if not hit or not isinstance(module, nn.Linear | RoutedExperts):
                continue
            met.update(hit)
            for weight_name, weight in list(module.named_parameters(recurse=False)):
                if section.rank >= min(weight.shape[-2:]):
                    shape = list(weight.shape[-2:])
                    raise ConfigError(f"lora.rank = {section.rank} is no less than the sizes {shape} of {name}.{weight_name}")
                module.add_module(weight_name + _SUFFIX, Adapter(weight, section.rank, section.alpha / section.rank, generator))
            module.register_forward_pre_hook(_put_sums)
            module.register_forward_hook(_take_sums_away, always_call=True)
    missing = [target for target in section.targets if target not in met]
    if missing:
        raise ConfigError(
            f"lora.targets: {missing[0]!r} names no matrix of any block",
            hint="names are those of checkpoints, such as self_attn.o_proj, mlp.shared_experts.up_proj or mlp.experts",
        )


def is_adapted(model: Transformer) -> bool:
    """Tell whether a model has adapters."""
    return any(isinstance(module, Adapter) for module in model.modules())


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return what an adapted model trains, by name: A and B of every adapter, a reward model's head; all to keep beside its beginning."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def merged(model: Transformer) -> Iterator[None]:
    """Let every weight be its adapted self within the block, for saving and sampling; afterwards all is as before, bit for bit.

    Holds both copies of the adapted weights meanwhile. A model without adapters stays as it is.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for module, name, adapter in _adapters(model):
            weight = module.get_parameter(name)
            kept.append((weight, weight.data))
            weight.data = adapter(weight)
            adapter.merged = True
    try:
        yield
    finally:
        for weight, before in kept:
            weight.data = before
        for _, _, adapter in _adapters(model):
            adapter.merged = False


def _adapters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Adapter]]:
    """Yield (module, name of its weight, adapter of that weight)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Adapter):
                yield module, name.removesuffix(_SUFFIX), child


def _put_sums(module: nn.Module, _: Any) -> None:
    """Shadow the module's parameters with the adapted weights: an instance's own attribute is found before its parameter."""
    for name, child in module.named_children():
        if isinstance(child, Adapter) and not child.merged:
            weight_name = name.removesuffix(_SUFFIX)
            module.__dict__[weight_name] = child(module.get_parameter(weight_name))


def _take_sums_away(module: nn.Module, *_: Any) -> None:
    for name, child in module.named_children():
        if isinstance(child, Adapter):
            module.__dict__.pop(name.removesuffix(_SUFFIX), None)
