"""Grouped experts, row movement, norm, activation and the chunked head against plain definitions, forward and written-out backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv2.kernels import attention, cross_entropy, grouped_swiglu, linear_cross_entropy, reference
from dsv2.kernels.norm import rms_norm
from dsv2.kernels.permute import permute_rows, sum_copies
from dsv2.kernels.swiglu import swiglu
from reference import training


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def laid_out(tokens, copies, fillers, seed):
    """A random layout of ``copies`` copies of each token, with fillers among the rows: order, inverse."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(tokens * copies + fillers, generator=generator)
    inverse = places[: tokens * copies]
    return torch.zeros(len(places), dtype=torch.int64).scatter_(0, inverse, torch.arange(tokens * copies)), inverse


def require_equal_gradients(ours, expected, inputs, atol=1e-11):
    assert torch.allclose(ours, expected, atol=atol)
    mix = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=expected.dtype)
    both = (torch.autograd.grad((out * mix).sum(), inputs) for out in (ours, expected))
    for ours_grad, expected_grad in zip(*both, strict=True):
        assert torch.allclose(ours_grad, expected_grad, atol=atol)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), copies=st.integers(1, 3), hidden=st.integers(1, 5), width=st.integers(1, 4)
)
def test_grouped_swiglu_is_one_expert_after_the_other(counts, copies, hidden, width):
    tokens, fillers = divmod(sum(counts), copies)
    assume(tokens)
    order, inverse = laid_out(tokens, copies, fillers, seed=sum(counts))
    real = torch.zeros(len(order), dtype=torch.float64).scatter_(0, inverse, 1.0)
    x, weights = randn(tokens, hidden), (randn(sum(counts), seed=1).detach() * real).requires_grad_()
    gate_up, down = randn(len(counts), 2 * width, hidden, seed=2), randn(len(counts), hidden, width, seed=3)
    out, expected = (
        kernel(x, order, inverse, copies, counts, gate_up, down, weights) for kernel in (grouped_swiglu, reference.grouped_swiglu)
    )
    require_equal_gradients(out, expected, (x, gate_up, down, weights))


def test_grouped_swiglu_casts_weights_as_if_they_had_been_cast_before():
    """Under autocast the fp32 stacks pass through a small buffer; products and gradients are those of bf16 stacks."""
    order, inverse = laid_out(6, 2, 0, seed=3)
    counts = [5, 0, 7]
    tensors = (randn(6, 8), randn(3, 10, 8, seed=2), randn(3, 8, 5, seed=3), randn(12, seed=1))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        x, gate_up, down = (t.detach().to(dtype).requires_grad_() for t in tensors[:3])
        weights = tensors[3].detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = grouped_swiglu(x, order, inverse, 2, counts, gate_up, down, weights)
        grads = torch.autograd.grad(out.float().square().sum(), (x, gate_up, down, weights))
        results.append((out, *grads))
    assert results[0][0].dtype == torch.bfloat16 and results[0][2].dtype == torch.float32
    for through_buffer, cast_before in zip(*results, strict=True):
        assert torch.equal(through_buffer.float(), cast_before.float())


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 5), copies=st.integers(1, 4), fillers=st.integers(0, 3), seed=st.integers(0, 1000))
def test_rows_travel_and_come_back(tokens, copies, fillers, seed):
    order, inverse = laid_out(tokens, copies, fillers, seed)
    x = randn(tokens, 3)
    assert torch.allclose(sum_copies(x[order // copies], order, inverse, copies), x * copies)
    if not fillers:
        assert torch.equal(permute_rows(permute_rows(x[order // copies], inverse, order), order, inverse), x[order // copies])
        assert torch.autograd.gradcheck(lambda t: permute_rows(t, order, inverse).sin(), randn(tokens * copies, 2))


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=4), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_norm_and_activation_are_torchs(shape, scale, seed):
    x, gain = (randn(*shape, seed=seed).detach() * scale).requires_grad_(), randn(shape[-1], seed=1)
    require_equal_gradients(rms_norm(x, gain, 1e-6), F.rms_norm(x, gain.shape, gain, 1e-6), (x, gain), atol=1e-10 + 1e-12 / scale**2)
    up = randn(*shape, seed=seed + 1)
    require_equal_gradients(swiglu(x, up), F.silu(x) * up, (x, up), atol=1e-10 * max(1.0, scale))


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    key=st.integers(1, 5),
    value=st.integers(1, 7),
    block=st.integers(1, 9),
)
def test_blocked_attention_is_the_fused_one(batch, tokens, heads, key, value, block):
    """Both against softmax over the visible keys, written out."""
    q, k = randn(batch, tokens, heads, key), randn(batch, tokens, heads, key, seed=1)
    v = randn(batch, tokens, heads, value, seed=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.7
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    expected = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~causal, float("-inf")).softmax(dim=-1), v)
    mix = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * mix).sum(), (q, k, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_BLOCK", block)
        for ours in (
            attention.attend(q, k, v, scale=0.7),
            attention.attend(q, k, v, scale=0.7, visible=causal.expand(batch, -1, -1)),
            attention._fused(q, k, v, 0.7, None),
        ):
            assert torch.allclose(ours, expected, atol=1e-12)
            for ours_grad, expected_grad in zip(torch.autograd.grad((ours * mix).sum(), (q, k, v)), expected_grads, strict=True):
                assert torch.allclose(ours_grad, expected_grad, atol=1e-11)


@pytest.mark.parametrize("piece_elements", [1, 20, 1 << 22])
@settings(deadline=None, max_examples=15)
@given(labels=st.lists(st.integers(-1, 6), min_size=1, max_size=9), hidden=st.integers(1, 4))
def test_chunked_head_is_the_cross_entropy_of_the_whole(piece_elements, labels, hidden):
    labels = torch.tensor([label if label >= 0 else -100 for label in labels])
    h, weight = randn(len(labels), hidden), randn(7, hidden, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_PIECE_ELEMENTS", piece_elements)
        patch.setattr(cross_entropy, "_PIECE_ROWS", 1)
        patch.setattr(cross_entropy, "_TILE", 1)
        total = linear_cross_entropy(h, weight, labels, -100)
    count = int((labels != -100).sum())
    ours_grads = torch.autograd.grad(total * 0.5, (h, weight))
    if count == 0:
        assert total.item() == 0.0
        assert all((grad == 0).all() for grad in ours_grads)
        return
    expected = training.cross_entropy(h, weight, labels) * count
    assert total.item() == pytest.approx(expected.item(), abs=1e-10)
    for ours_grad, expected_grad in zip(ours_grads, torch.autograd.grad(expected * 0.5, (h, weight)), strict=True):
        assert torch.allclose(ours_grad, expected_grad, atol=1e-10)


def test_norm_takes_any_layout():
    x, gain = randn(3, 2, 6), randn(6, seed=1)
    ours, expected = (norm(x.transpose(0, 1)) for norm in (lambda t: rms_norm(t, gain, 1e-6), lambda t: F.rms_norm(t, (6,), gain, 1e-6)))
    for a, b in zip(torch.autograd.grad(ours.sum(), (x, gain)), torch.autograd.grad(expected.sum(), (x, gain)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_head_forms_no_gradient_that_nobody_asked_for(monkeypatch):
    hidden, weight, labels = randn(4, 3), randn(7, 3, seed=1), torch.tensor([1, 2, -100, 3])
    with_gradient = linear_cross_entropy(hidden, weight, labels, -100)
    monkeypatch.setattr(cross_entropy, "_accumulate", None)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels, -100).item() == with_gradient.item()


def test_head_does_not_look_at_rows_without_label():
    hidden, weight, labels = randn(3, 2).detach(), randn(5, 2, seed=1), torch.tensor([1, -100, 3])
    expected = linear_cross_entropy(hidden, weight, labels, -100)
    hidden[1] = float("nan")
    total = linear_cross_entropy(hidden.requires_grad_(), weight, labels, -100)
    assert total.item() == expected.item()
    assert (torch.autograd.grad(total, hidden)[0][1] == 0).all()


def test_written_out_backwards_refuse_second_derivatives():
    x, gain = randn(2, 3), randn(3, seed=1)
    (grad,) = torch.autograd.grad(rms_norm(x, gain, 1e-6).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(grad.sum(), x)


def test_head_survives_large_logits_and_needs_no_gradient():
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[5e4], [-5e4]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), -100).item() == pytest.approx(1e5)
