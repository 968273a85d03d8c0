"""The smallest recipe that uses every part of pre-training, and what its runs are compared by."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.files import sha256_of
from dsv2.metrics import read_metrics
from dsv2.train import loop
from dsv2.train.recipe import PretrainRecipe

RECIPE = {
    "model": {
        "preset": "tour",
        "overrides": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
            "topk_method": "group_limited_greedy", "max_position_embeddings": 64,
        },
    },
    "run": {"tokens": 3072, "seq_len": 32, "precision": "fp32", "validate_every": 3, "sample_every": 4, "checkpoint_every": 2, "keep": 2},
    "batch": {"sequences": 8, "initial_sequences": 4, "ramp_tokens": 1024, "micro_sequences": 4},
    "learning_rate": {"peak": 3e-3, "warmup_steps": 2},
    "balance": {"expert": 0.01, "device": 0.01, "communication": 0.01},
}  # fmt: skip


def recipe(**run: object) -> PretrainRecipe:
    return PretrainRecipe.model_validate(RECIPE | {"run": RECIPE["run"] | run})


def guarded(**sections: object) -> PretrainRecipe:
    """The recipe for longer, with token dropping, recompute, pooled balance losses and the guard against spikes."""
    parts = {
        "run": RECIPE["run"] | {"tokens": 6144, "checkpoint_every": 4, "keep": 3, "recompute": True},
        "balance": RECIPE["balance"] | {"scope": "micro-batch"},
        "dropping": {"capacity_factor": 1.0, "protected_share": 0.3},
        "guard": {"sigma": 20, "window": 8, "rollback_after": 3},
    }
    return PretrainRecipe.model_validate(RECIPE | parts | sections)


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "elapsed_s")} for line in read_metrics(folder / "metrics.jsonl")]


def require_equal(run: Path, peace: Path) -> None:
    """Same weights, moments and metrics; times apart."""
    last = latest_checkpoint(peace)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert sha256_of(last / name) == sha256_of(run / last.name / name)
    assert without_times(run) == without_times(peace)


@contextmanager
def stopping_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt the run of the block, as Ctrl-C does, when it has done so many steps."""
    real, calls = loop.train_step, 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", interrupted)
        yield
