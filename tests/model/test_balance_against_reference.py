"""The three balance losses against the oracle, values and gradients (P eq 23-31; spec 3.3)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.model.balance import communication_balance_loss, device_balance_loss, expert_balance_loss, pool_sequences
from reference import balance


def all_three(affinity, experts, n_group, topk_group):
    return [
        expert_balance_loss(affinity, experts),
        device_balance_loss(affinity, experts, n_group),
        communication_balance_loss(affinity, experts, n_group, topk_group),
    ]


def reference_three(affinity, experts, n_group, topk_group):
    """Per sequence, then averaged over the batch."""
    rows = list(zip(affinity, experts, strict=True))
    return [
        balance.batch_mean([balance.expert_loss(a, e) for a, e in rows]),
        balance.batch_mean([balance.device_loss(a, e, n_group) for a, e in rows]),
        balance.batch_mean([balance.communication_loss(a, e, n_group, topk_group) for a, e in rows]),
    ]


def random_case(batch, num_tokens, groups, group_len, num_chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_tokens, groups * group_len, generator=generator, dtype=torch.float64)
    experts = torch.rand(batch, num_tokens, groups * group_len, generator=generator).argsort(dim=-1)[..., :num_chosen]
    return logits.requires_grad_(), experts


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    num_tokens=st.integers(1, 6),
    groups=st.integers(1, 4),
    group_len=st.integers(1, 4),
    data=st.data(),
)
def test_values_and_gradients_are_the_reference(batch, num_tokens, groups, group_len, data):
    num_chosen = data.draw(st.integers(1, groups * group_len))
    topk_group = data.draw(st.integers(1, groups))
    logits, experts = random_case(batch, num_tokens, groups, group_len, num_chosen, data.draw(st.integers(0, 2**31 - 1)))
    affinity = logits.softmax(dim=-1)
    for ours, expected in zip(
        all_three(affinity, experts, groups, topk_group), reference_three(affinity, experts, groups, topk_group), strict=True
    ):
        assert ours.shape == ()
        assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
        (ours_grad,) = torch.autograd.grad(ours, logits, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, logits, retain_graph=True)
        assert torch.allclose(ours_grad, expected_grad, rtol=1e-6, atol=1e-9)


WORKED = [
    ([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], [[0, 1], [2, 3]], 1.0),
    ([[0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.1, 0.1]], [[0, 1], [0, 1]], 1.5),
]


@pytest.mark.parametrize(("affinity", "experts", "expected"), WORKED)
def test_worked_cases(affinity, experts, expected):
    losses = all_three(torch.tensor([affinity]), torch.tensor([experts]), 2, 1)
    assert [loss.item() for loss in losses] == pytest.approx([expected] * 3, abs=1e-6)
    one = pool_sequences(torch.tensor([affinity]), torch.tensor([experts]))
    assert [loss.item() for loss in all_three(*one, 2, 1)] == [loss.item() for loss in losses], "one sequence is its own pool"


def test_losses_are_per_sequence_not_over_the_batch():
    """Two sequences, each one-sided, together balanced: a loss over the pooled batch would be 1."""
    affinity = torch.tensor([[[0.7, 0.1, 0.1, 0.1]] * 2, [[0.1, 0.1, 0.1, 0.7]] * 2])
    experts = torch.tensor([[[0, 1]] * 2, [[3, 2]] * 2])
    losses = all_three(affinity, experts, 2, 1)
    assert [loss.item() for loss in losses] == pytest.approx([1.6, 1.6, 1.6], abs=1e-6)
    assert [loss.item() for loss in all_three(*pool_sequences(affinity, experts), 2, 1)] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)


def test_balanced_routing_gives_one():
    """Eight tokens over eight experts in four groups; token t takes expert t and t + 2: two devices each, all loads equal."""
    affinity = torch.full((2, 8, 8), 1 / 8)
    experts = torch.stack([torch.arange(8), (torch.arange(8) + 2) % 8], dim=-1).expand(2, 8, 2)
    assert [loss.item() for loss in all_three(affinity, experts, 4, 2)] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    fewer_devices = (torch.arange(8).unsqueeze(-1) // 2 * 2 + torch.arange(2)).expand(2, 8, 2)
    assert communication_balance_loss(affinity, fewer_devices, 4, 2).item() == pytest.approx(0.5)


def test_the_gradient_of_the_expert_loss_is_the_load_only():
    """Counts carry no gradient: dL/ds_{i,t} = f_i / (T B)."""
    affinity = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.1, 0.1]]], requires_grad=True)
    expert_balance_loss(affinity, torch.tensor([[[0, 1], [0, 2]]])).backward()
    assert affinity.grad is not None
    for t in range(2):
        assert affinity.grad[0, t].tolist() == pytest.approx([1.0, 0.5, 0.5, 0.0])
