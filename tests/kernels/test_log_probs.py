"""Log-probabilities of given tokens in pieces: the same numbers and gradients as a whole table of logits."""

import pytest
import torch

from dsv2.kernels import linear_log_probs, log_probs


@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_values_and_gradients_are_those_of_a_whole_table(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "_PIECE_ELEMENTS", 1)  # pieces of 64 rows
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    tokens, pull = torch.randint(50, (rows,)), torch.randn(rows)
    found, entropy = linear_log_probs(hidden, weight, tokens)
    found.backward(pull)
    got = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    whole = (hidden @ weight.t()).log_softmax(dim=-1)
    expected = whole.gather(1, tokens.unsqueeze(1)).squeeze(1)
    expected.backward(pull)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(dim=-1))
    for ours, theirs in zip(got, [hidden.grad, weight.grad], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not entropy.requires_grad
