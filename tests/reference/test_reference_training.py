"""The oracle's training arithmetic against the numbers of the V2 recipe (spec 4.1) and torch's own AdamW and cross entropy."""

import math

import pytest
import torch

from reference import training

V2 = {"peak": 2.4e-4, "warmup_steps": 2000, "total_tokens": 8.1e12}


def test_learning_rate_of_v2():
    def rate(step, share):
        return training.learning_rate(step, share * 8.1e12, **V2)

    assert rate(0, 0.0) == 0.0
    assert rate(1000, 0.001) == pytest.approx(1.2e-4)
    assert rate(2000, 0.01) == pytest.approx(2.4e-4)
    assert rate(130_000, 0.599) == pytest.approx(2.4e-4)
    assert rate(132_000, 0.601) == pytest.approx(7.584e-5)
    assert rate(200_000, 0.901) == pytest.approx(2.396544e-5)


def test_batch_ramp_of_v2():
    ramp = {"start": 2304, "end": 9216, "ramp_tokens": 225e9}
    assert [training.batch_size(tokens, **ramp) for tokens in (0, 112.5e9, 225e9, 8e12)] == [2304, 5760, 9216, 9216]
    assert training.batch_size(1e9, **ramp, multiple=64) == 2304  # 2334.7, nearer to 2304 than to 2368


def test_adamw_is_torch_adamw():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours, first, second = parameter.detach().clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    for step in range(1, 4):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        parameter.grad = gradient
        optimizer.step()
        ours, first, second = training.adamw_step(ours, gradient, first, second, step, rate=1e-2)
    assert torch.allclose(ours, parameter, rtol=0, atol=1e-14)


def test_gains_do_not_decay():
    gain, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    moved, _, _ = training.adamw_step(gain, zero, zero, zero, 1, rate=1.0)
    assert torch.equal(moved, gain)


def test_clip_shrinks_only_above_the_norm():
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    clipped, norm = training.clip(gradients, 1.0)
    assert norm == pytest.approx(5.0)
    assert [g.item() for g in clipped] == pytest.approx([0.6, 0.8])
    assert training.clip(gradients, 10.0)[0][0].item() == 3.0


def test_cross_entropy_ignores_and_averages():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    labels = torch.tensor([1, -100, 3, 6, -100])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    assert training.cross_entropy(hidden, weight, labels).item() == pytest.approx(expected.item(), abs=1e-14)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert training.bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)
