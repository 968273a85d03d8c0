"""What a run with low-rank adapters (model/lora.py) must look at before it begins, and what its plan says of them; alike in all stages."""

from dsv2.errors import ConfigError
from dsv2.model.accounting import count_parameters
from dsv2.model.config import ModelConfig
from dsv2.model.lora import LoraSection
from dsv2.model.transformer import Transformer
from dsv2.train.memory import require_training_memory
from dsv2.train.optimizer import OptimizerSection


def require_trainable(config: ModelConfig, lora: LoraSection | None, optimizer: OptimizerSection) -> None:
    """Refuse a run whose optimiser would not move its adapters, or that does not fit in memory.

    Raises:
        ConfigError: Muon with adapters, or too little memory.
    """
    if lora is not None and optimizer.kind == "muon":
        raise ConfigError(
            "optimizer.kind = 'muon' moves hidden matrices, which stay as they are with lora", hint="set optimizer.kind=adamw"
        )
    # With adapters: the weights, and the adapted ones beside them. Without: weights, gradients and two moments.
    needed = (8 if lora else 16) * count_parameters(config).total
    require_training_memory(needed, hint="train adapters: lora.rank=16 lora.alpha=32" if lora is None else "choose a smaller model")


def describe_trained(model: Transformer, lora: LoraSection | None) -> str:
    """Say how many parameters a run trains, and how."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    how = f"adapters of rank {lora.rank}" if lora else "all weights"
    return f"{trained:,} of {count_parameters(model.config).total:,} parameters: {how}"
