"""A saved run with a tokenizer, as a user brings one."""

from pathlib import Path

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer

TEXT = "The river runs from the hills to the sea, and 河流入海 is how the old book says it; the boats run with the river.\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 4, vocab_size=384)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    shape = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    built = Transformer(preset("nano", **shape))
    initialise(built, seed=5)
    return built


@pytest.fixture
def run(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Return a run's folder with one step in it."""
    save_checkpoint(tmp_path / "run" / "step-3", model, tokenizer)
    return tmp_path / "run"
