"""Our model against transformers' DeepseekV2 (>= 5.15), both in float32: logits to 1e-4, positions past 4096 included."""

import pytest
import torch

from reference.subject import ListCache, logits_in_chunks, our_model
from reference.tiny import CONFIGS, random_state
from reference.upstream import upstream_logits, upstream_model

TOKENS = [[0, 5, 17, 99, 5, 2, 64, 127, 3, 3], [1, 1, 80, 42, 7, 7, 9, 120, 0, 31]]
POSITIONS = [[0, 1, 2, 3, 50, 1000, 4095, 4096, 4097, 5000], [4090, 4091, 4092, 4093, 4094, 4095, 4096, 4097, 4098, 4099]]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name):
    config = CONFIGS[name]
    state = random_state(config)
    theirs = upstream_logits(upstream_model(state, config), TOKENS, POSITIONS)
    model = our_model(state, config, torch.float32)
    with torch.no_grad():
        ours = model.logits(model(torch.tensor(TOKENS), positions=torch.tensor(POSITIONS)).hidden)
    assert theirs.abs().max() > 1
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def test_absorbed_decoding_equals_transformers():
    config = CONFIGS["v2"]
    state = random_state(config)
    theirs = upstream_logits(upstream_model(state, config), TOKENS, POSITIONS)
    ours = logits_in_chunks(our_model(state, config, torch.float32), torch.tensor(TOKENS), torch.tensor(POSITIONS), [1] * 10, ListCache())
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_whole_sequence_longer_than_4096():
    """The real thing once, not only large positions: 4,200 tokens in one forward, compared at the end."""
    config = {**CONFIGS["v2"], "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    state = random_state(config)
    tokens = torch.randint(0, 128, (1, 4200), generator=torch.Generator().manual_seed(0))
    model = our_model(state, config, torch.float32)
    with torch.no_grad():
        ours = model.logits(model(tokens).hidden)[0, -64:]
    theirs = upstream_logits(upstream_model(state, config), tokens.tolist())[0, -64:]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
