"""A small tokenizer, small random models and a model that recites, for the engine's tests."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import ModelOutput, Transformer
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer

TEXT = "The river runs from the hills to the sea, and 河流入海 is how the old book says it; the boats run with the river.\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 4, vocab_size=384)


@pytest.fixture(scope="session")
def small_config(tokenizer: Tokenizer) -> Callable[..., ModelConfig]:
    def build(**overrides: object) -> ModelConfig:
        shape = {
            "vocab_size": tokenizer.vocab_size, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 3, "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
            "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1, "max_position_embeddings": 96, "initializer_range": 0.2, "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }  # fmt: skip
        return preset("nano", **(shape | overrides))

    return build


@pytest.fixture(scope="session")
def model(small_config: Callable[..., ModelConfig]) -> Transformer:
    built = Transformer(small_config())
    initialise(built, seed=3)
    return built


class Reciter(Transformer):
    """Says ``script[n]`` after the n-th token of any request, whatever it read; an id of None gives logits that are no numbers."""

    def __init__(self, config: ModelConfig, script: Sequence[int | None]) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.anchor = nn.Parameter(torch.zeros(1))
        self.script = list(script)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None, cache: object = None
    ) -> ModelOutput:
        assert positions is not None
        return ModelOutput(positions[..., None].float(), ())

    def logits(self, hidden: Tensor) -> Tensor:
        rows = []
        for position in hidden[..., 0].flatten().tolist():
            said = self.script[int(position) % len(self.script)]
            rows.append(torch.full((self.config.vocab_size,), float("nan") if said is None else -50.0))
            if said is not None:
                rows[-1][said] = 50.0
        return torch.stack(rows)


@pytest.fixture
def reciter(small_config: Callable[..., ModelConfig]) -> Callable[..., Reciter]:
    """Return a function from what is to be said after a prompt of ``prompt_len`` tokens to a model that says it."""

    def build(answer: Sequence[int | None], prompt_len: int = 1) -> Reciter:
        return Reciter(small_config(), [0] * (prompt_len - 1) + list(answer) + [0])

    return build
