"""Initial values (section 3.1.2; spec 10.2): matrices N(0, initializer_range), gains 1, nothing scaled by depth."""

import torch
from torch import nn

from dsv2.model.layers import RMSNorm
from dsv2.model.transformer import Transformer


def initialise(model: Transformer, seed: int) -> None:
    """Fill all parameters in place; the same seed gives the same weights on any device and thread count."""
    generator = torch.Generator().manual_seed(seed)
    gains = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in gains:
                nn.init.ones_(parameter)
            else:
                values = torch.randn(parameter.shape, generator=generator) * model.config.initializer_range
                parameter.copy_(values)
