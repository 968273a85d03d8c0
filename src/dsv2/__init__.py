"""DeepSeek-V2 as software: the whole life of a DeepSeek-V2 model in one package.

The names below are loaded on first use, so that ``import dsv2`` needs neither torch nor time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv2.checkpoint.huggingface import load_model
    from dsv2.data.batch import Batch
    from dsv2.data.documents import Document
    from dsv2.engine.async_llm import AsyncLLM
    from dsv2.engine.engine import Engine
    from dsv2.engine.llm import LLM
    from dsv2.engine.request import Constraint, Output, Request, SamplingParams
    from dsv2.model.config import ModelConfig
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset
    from dsv2.tokenizer.tokenizer import Tokenizer
    from dsv2.tokenizer.train import train_tokenizer

__version__ = "0.1.0"

_HOME = {
    "train_tokenizer": "dsv2.tokenizer.train",
    "Tokenizer": "dsv2.tokenizer.tokenizer",
    "Document": "dsv2.data.documents",
    "Batch": "dsv2.data.batch",
    "ModelConfig": "dsv2.model.config",
    "Transformer": "dsv2.model.transformer",
    "preset": "dsv2.presets",
    "load_model": "dsv2.checkpoint.huggingface",
    "Request": "dsv2.engine.request",
    "SamplingParams": "dsv2.engine.request",
    "Constraint": "dsv2.engine.request",
    "Output": "dsv2.engine.request",
    "Engine": "dsv2.engine.engine",
    "LLM": "dsv2.engine.llm",
    "AsyncLLM": "dsv2.engine.async_llm",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "Batch",
    "Constraint",
    "Document",
    "Engine",
    "ModelConfig",
    "Output",
    "Request",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "load_model",
    "preset",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dsv2' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
