"""A small chat model with its tokenizer, and the engine on its weights."""

from collections.abc import Iterator

import pytest

from dsv2.engine.llm import LLM
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is 12 + 34? The answer is 46. <<12+34=46>>\n"] * 4, vocab_size=384)


@pytest.fixture
def policy(tokenizer: Tokenizer) -> Transformer:
    config = preset(
        "nano", vocab_size=tokenizer.vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3,
        q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, seed=3)
    return model


@pytest.fixture
def llm(policy: Transformer, tokenizer: Tokenizer) -> Iterator[LLM]:
    with LLM(policy, tokenizer=tokenizer, max_batch=16, max_len=96, max_step_s=1e6) as opened:
        yield opened
