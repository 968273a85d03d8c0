"""``dsv2 info``: what a config amounts to, from arithmetic alone. No weights are read and torch is not imported."""

import json
from pathlib import Path
from typing import Any

from dsv2.errors import ConfigError
from dsv2.model.accounting import cache_elements_per_token, count_parameters, training_flops_per_token
from dsv2.model.config import ModelConfig
from dsv2.presets import PRESETS, preset


def run(target: str, as_json: bool = False) -> None:
    """Print the counts of a preset, a config.json, a checkpoint, a run or a tour.

    Raises:
        ConfigError: ``target`` is none of these.
    """
    figures = describe(find_config(target))
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<40} {value:,}" if isinstance(value, int) else f"{name:<40} {value:,.3f}")


def describe(config: ModelConfig) -> dict[str, Any]:
    """Return parameters, FLOPs and cache of a config."""
    counts, elements = count_parameters(config), cache_elements_per_token(config)
    seq_len = 4096
    return {
        "parameters_total": counts.total,
        "activated": counts.activated,
        "activated_without_embedding": counts.activated_without_embedding,
        "activated_without_embedding_and_head": counts.activated_without_embedding_and_head,
        "cache_elements_per_token": elements,
        "cache_bytes_per_token_bf16": 2 * elements,
        "training_gflop_per_token_at_4096": training_flops_per_token(config, seq_len) / 1e9,
        "max_position_embeddings": config.max_position_embeddings,
    }


def find_config(target: str) -> ModelConfig:
    """Return the config that ``target`` means.

    Raises:
        ConfigError: it is neither a preset nor a path with a config.
    """
    path = Path(target)
    if target in PRESETS and not path.exists():
        return preset(target)
    if not path.exists():
        return preset(target)  # raises, and names the nearest preset
    saved = [file for run in (path, path / "pretrain") for file in run.glob("step-*/config.json") if file.parent.name[5:].isdigit()]
    steps = sorted(saved, key=lambda file: int(file.parent.name[5:]))
    for file in (path if path.is_file() else path / "config.json", *reversed(steps)):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{file} is not JSON: {error}") from error
            return ModelConfig.from_dict(content, source=str(file))
    raise ConfigError(f"{path} holds no config.json and no step-N folder", hint=f"or give a preset: {', '.join(PRESETS)}")
