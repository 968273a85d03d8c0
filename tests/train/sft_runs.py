"""A small model to fine-tune, conversations for it, and the smallest recipe that uses every part of the stage."""

import json
from pathlib import Path

import numpy as np

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.sft import fine_tune
from dsv2.train.sft_data import ConversationData, open_conversations
from dsv2.train.sft_recipe import SftRecipe
from dsv2.train.start import open_start

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip
RECIPE = {
    "data": {"too_long": "cut", "validation_share": 0.1},
    "run": {
        "epochs": 2, "seq_len": 48, "precision": "fp32", "validate_every": 3, "sample_every": 4, "checkpoint_every": 2, "keep": 2,
    },
    "batch": {"sequences": 4, "micro_sequences": 2},
    "learning_rate": {"peak": 3e-3, "warmup_steps": 2, "decay": "cosine"},
}  # fmt: skip


def make_start(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Path:
    model = Transformer(preset("tour", vocab_size=tokenizer.vocab_size, **SHAPE))
    initialise(model, seed)
    save_checkpoint(folder, model, tokenizer)
    return folder


def make_chats(path: Path, number: int = 80) -> Path:
    rng = np.random.default_rng(0)
    words = ["river", "stone", "model", "expert"]
    with path.open("w") as file:
        for _ in range(number):
            turns = []
            for _ in range(int(rng.integers(1, 3))):
                asked = " ".join(rng.choice(words, size=int(rng.integers(1, 4))))
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": asked.upper()}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def sft_recipe(start: Path, **sections: object) -> SftRecipe:
    run = RECIPE["run"] | sections.pop("run", {})
    return SftRecipe.model_validate(RECIPE | {"model": {"start": str(start)}} | sections | {"run": run})


def run_sft(recipe: SftRecipe, chats: Path, out: Path, **more: object) -> tuple[Transformer, ConversationData]:
    recipe, start = open_start(recipe)
    data = open_conversations(recipe, start.tokenizer, [chats])
    return fine_tune(recipe, start, data, out, **more), data
