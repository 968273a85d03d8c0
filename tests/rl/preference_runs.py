"""A small model, preferences for it with a rule that decides them, and the smallest recipes of the stages on preferences."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.rl.preference_recipe import DpoRecipe, RewardRecipe
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.precision import make_deterministic

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip
WORDS = ["river", "stone", "model", "expert"]
RECIPE = {
    "data": {"validation_share": 0.2, "max_refused": 1.0},
    "run": {"epochs": 2, "seq_len": 96, "precision": "fp32", "validate_every": 4, "checkpoint_every": 2, "keep": 2},
    "batch": {"sequences": 4, "micro_sequences": 2},
    "learning_rate": {"peak": 3e-3, "warmup_steps": 2, "decay": "cosine"},
}  # fmt: skip


def with_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    make_deterministic(number)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def make_tokenizer() -> Tokenizer:
    rng = np.random.default_rng(0)
    return train_tokenizer([" ".join(rng.choice(WORDS, size=60)) + "." for _ in range(30)], vocab_size=384)


def make_start(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Path:
    model = Transformer(preset("tour", vocab_size=tokenizer.vocab_size, **SHAPE))
    initialise(model, seed)
    save_checkpoint(folder, model, tokenizer)
    return folder


def make_pairs(path: Path, number: int = 150) -> Path:
    """Answers of one to four words; "stone" at the end is bad, whatever else is said."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for row in range(number):
            said = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 4))))
            messages = [{"role": "user", "content": f"{row} " + " ".join(rng.choice(WORDS, size=2))}]
            good = str(rng.choice(["river", "model", "expert"]))
            file.write(json.dumps({"messages": messages, "chosen": f"{said} {good}", "rejected": f"{said} stone"}) + "\n")
    return path


def reward_recipe(start: Path, **sections: object) -> RewardRecipe:
    return RewardRecipe.model_validate(_sections(start, sections))


def dpo_recipe(start: Path, **sections: object) -> DpoRecipe:
    return DpoRecipe.model_validate(_sections(start, sections))


def _sections(start: Path, sections: dict) -> dict:
    run = RECIPE["run"] | sections.pop("run", {})
    return RECIPE | {"model": {"start": str(start)}} | sections | {"run": run}
