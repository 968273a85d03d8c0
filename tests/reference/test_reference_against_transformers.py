"""The oracle against transformers' DeepseekV2 (>= 5.15) on tiny random networks, positions past 4096 included."""

import pytest
import torch

from reference import moe, transformer
from reference.tiny import CONFIGS, V2, random_state
from reference.upstream import upstream_logits, upstream_model

TOKENS = [0, 5, 17, 99, 5, 2, 64, 127, 3, 3]
POSITIONS = [0, 1, 2, 3, 50, 1000, 4095, 4096, 4097, 5000]


# unequal-mscale and the rest: every feature that transformers has.
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_equals_transformers_in_double(name):
    config = CONFIGS[name]
    state = random_state(config)
    ours = transformer.forward(state, config, TOKENS, POSITIONS).logits
    model = upstream_model(state, config, torch.float64)
    theirs = upstream_logits(model, [TOKENS], [POSITIONS])[0]
    assert ours.abs().max() > 1
    # Theirs computes angles, norms and router in float32 whatever the dtype: this is its error, not ours.
    assert torch.allclose(ours, theirs, rtol=0, atol=5e-5)


def test_device_limit_changes_what_transformers_computes():
    """Without this a config in which the limit never binds would make the comparison above empty."""
    state = random_state(V2)
    output = transformer.forward(state, V2, TOKENS, POSITIONS)
    limited = [experts.sort(dim=-1).values for experts in output.experts]
    free = [torch.tensor([sorted(moe.best(a.tolist(), 3)) for a in affinity]) for affinity in output.affinities]
    assert any(not torch.equal(a, b) for a, b in zip(limited, free, strict=True))
