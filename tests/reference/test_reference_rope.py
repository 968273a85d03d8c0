"""The oracle's rotary part against the golden numbers of the specification (5.1, 5.2) and against itself."""

import math

import pytest
import torch

from reference import rope
from reference.tiny import CONFIGS, YARN

V2_ROPE = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_theta": 10000.0}


def test_yarn_correction_range_of_v2():
    assert rope.correction_dimension(32, 64, 10000.0, 4096) == pytest.approx(10.4722, abs=1e-4)
    assert rope.correction_dimension(1, 64, 10000.0, 4096) == pytest.approx(22.5134, abs=1e-4)
    assert rope.correction_range(64, 10000.0, 4096, 32, 1) == (10, 23)


def test_yarn_golden_frequencies():
    base = rope.base_frequencies(64, 10000.0)
    yarn = rope.frequencies({**V2_ROPE, "rope_scaling": YARN})
    assert torch.equal(yarn[:11], base[:11])
    golden = {11: 3.900693e-2, 16: 5.5e-3, 22: 1.778279e-4, 23: 3.333804e-5, 31: 3.333804e-6}
    for j, frequency in golden.items():
        assert yarn[j].item() == pytest.approx(frequency, rel=1e-6)
    assert torch.allclose(yarn[23:], base[23:] / 40, rtol=1e-14, atol=0)
    rotations = base * 4096 / (2 * math.pi)
    assert [round(rotations[j].item(), 2) for j in (10, 11, 22, 23)] == [36.66, 27.49, 1.16, 0.87]


@pytest.mark.parametrize(
    ("weight", "m", "squared", "scale"),
    [(0.707, 1.2608037774, 1.5896261652, 0.1147213868), (1.0, 1.3688879454, 1.8738542071, 0.1352337789)],
)
def test_yarn_temperature(weight, m, squared, scale):
    config = {**V2_ROPE, "rope_scaling": {**YARN, "mscale": weight, "mscale_all_dim": weight}}
    assert rope.mscale(40, weight) == pytest.approx(m, abs=1e-10)
    assert rope.mscale(40, weight) ** 2 == pytest.approx(squared, abs=1e-9)
    assert rope.softmax_scale(config) == pytest.approx(scale, abs=1e-10)
    assert rope.amplitude(config) == 1.0
    assert rope.softmax_scale({**V2_ROPE, "rope_scaling": None}) == pytest.approx(0.0721687836, abs=1e-10)
    assert rope.mscale(1, weight) == 1.0


def test_interleaved_and_half_split_are_one_vector_in_two_orders():
    generator = torch.Generator().manual_seed(0)
    theta = rope.frequencies(CONFIGS["v2"])
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    for m, n in [(0, 0), (3, 1), (5000, 17), (100_000, 99_000)]:
        interleaved_q, interleaved_k = rope.rotate(q, m, theta), rope.rotate(k, n, theta)
        half_q = rope.rotate_half_split(rope.deinterleave(q), m, theta)
        half_k = rope.rotate_half_split(rope.deinterleave(k), n, theta)
        assert torch.allclose(rope.deinterleave(interleaved_q), half_q, rtol=0, atol=1e-12)
        assert abs(interleaved_q @ interleaved_k - half_q @ half_k) < 1e-12


def test_rotation_sees_only_the_distance():
    generator = torch.Generator().manual_seed(1)
    theta = rope.base_frequencies(8, 10000.0)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    near = rope.rotate(q, 7, theta) @ rope.rotate(k, 4, theta)
    far = rope.rotate(q, 5007, theta) @ rope.rotate(k, 5004, theta)
    assert abs(near - far) < 1e-11
    assert torch.equal(rope.rotate(q, 0, theta), q)
