"""Frequencies and rotation of the model against the oracle (spec 1.4, 5.1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.model.config import ModelConfig
from dsv2.model.rope import rope_frequencies, rotate, rotation
from dsv2.presets import preset
from reference import rope
from reference.tiny import CONFIGS, V2, YARN


def test_golden_frequencies_of_v2():
    ours = rope_frequencies(preset("v2")).double()
    golden = {0: 1.0, 10: 5.623413e-2, 11: 3.900693e-2, 16: 5.5e-3, 22: 1.778279e-4, 23: 3.333804e-5, 31: 3.333804e-6}
    for j, frequency in golden.items():
        assert ours[j].item() == pytest.approx(frequency, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.integers(2, 64),
    theta=st.floats(100, 1e6),
    factor=st.floats(1, 64),
    original=st.integers(64, 32768),
    yarn=st.booleans(),
)
def test_frequencies_are_the_reference(pairs, theta, factor, original, yarn):
    scaling = {**YARN, "factor": factor, "original_max_position_embeddings": original} if yarn else None
    raw = {**V2, "qk_rope_head_dim": 2 * pairs, "rope_theta": theta, "rope_scaling": scaling}
    ours = rope_frequencies(ModelConfig.from_dict(raw))
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), rope.frequencies(raw), rtol=2e-6, atol=0)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("name", ["lite", "v2", "unequal-mscale"])
def test_rotation_is_the_reference_in_interleaved_order(name, heads):
    config = ModelConfig.from_dict(CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 1, 700], [3, 4096, 5000]])
    shape = (2, 3, 8) if heads is None else (2, 3, heads, 8)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    turned = rotate(x, rotation(positions, rope_frequencies(config), config.rotation_scale))
    theta, amplitude = rope.frequencies(CONFIGS[name]), rope.amplitude(CONFIGS[name])
    for row in range(2):
        for token in range(3):
            expected = rope.rotate(x[row, token], int(positions[row, token]), theta, amplitude)
            # fp32 angles: 5000 rad is known to 2.4e-4.
            assert torch.allclose(turned[row, token], expected, rtol=0, atol=2e-3 if positions[row, token] > 4000 else 2e-4)


def test_gradient_of_a_rotation_is_the_turn_back():
    config = ModelConfig.from_dict(CONFIGS["lite"])
    x = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    factors = tuple(t.double() for t in rotation(torch.tensor([[0, 1, 7], [3, 40, 90]]), rope_frequencies(config), 1.0))
    assert torch.autograd.gradcheck(lambda t: rotate(t, factors), x)


def test_casting_the_model_leaves_the_angles_in_fp32():
    """Module.to(bfloat16) casts buffers; a frequency of 8 bits would be off by whole turns after a few hundred tokens."""
    from dsv2.model.transformer import Transformer

    config = ModelConfig.from_dict(V2)
    tokens, positions = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[3001]])
    cached = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(config).to(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.125)  # exact in bf16; every layer input is then the same in both
            model = model.to(dtype)
            cache = _Spy()
            model(tokens, positions=positions, cache=cache)
        cached.append(cache.first_k_rope.float())
    assert torch.allclose(cached[0], cached[1], rtol=0.02, atol=0.02)


class _Spy:
    visible = None
    first_k_rope = torch.empty(0)

    def append(self, layer, kv_latent, k_rope):
        if layer == 0:
            self.first_k_rope = k_rope
        return kv_latent, k_rope
