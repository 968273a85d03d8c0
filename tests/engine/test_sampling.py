import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.engine import sampler
from dsv2.engine.request import SamplingParams
from dsv2.engine.sampler import NotFinite, make_generator, sample


def draw(logits: torch.Tensor, params: SamplingParams, num_tokens: int | None = None) -> int:
    tokens, _ = sample(logits[None], [params], [make_generator(params)], num_tokens=num_tokens or len(logits))
    return tokens[0]


def expected(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution by its definition: sort, filter, renormalise, in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")[: params.top_k or len(logits)]
    shares = np.exp(scaled[order] - scaled.max())
    shares /= shares.sum()
    size = int(np.searchsorted(np.cumsum(shares), params.top_p * (1 - 1e-12))) + 1
    out = np.zeros(len(logits))
    out[order[:size]] = shares[:size] / shares[:size].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 5, 1.0), (1.0, 0, 0.8), (0.8, 6, 0.7), (1.3, 99, 0.05)]
)
def test_the_drawn_frequencies_are_those_of_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    generator, draws = make_generator(params), 4000
    tokens = [sample(logits[None], [params], [generator], num_tokens=12)[0][0] for _ in range(draws)]
    counts = np.bincount(tokens, minlength=12)
    shares = expected(logits.numpy(), params)
    assert (counts[shares == 0] == 0).all()
    assert (np.abs(counts - draws * shares) <= 4.5 * np.sqrt(draws * shares * (1 - shares)) + 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([7, 1024, 1025, 3000]), st.floats(0.01, 0.999), st.floats(0.0, 4.0))
def test_the_nucleus_is_the_shortest_that_reaches_top_p(seed: int, size: int, top_p: float, spread: float) -> None:
    weights = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread).exp()
    kept, ids = sampler._nucleus(weights, top_p)
    total = weights.double().sum().item()
    assert torch.equal(weights[ids], kept) and len(set(ids.tolist())) == len(ids)
    rest = weights[~torch.isin(torch.arange(size), ids)]
    assert len(rest) == 0 or rest.max() <= kept.min()
    assert kept.double().sum().item() >= top_p * total * (1 - 1e-12)
    assert kept[:-1].double().sum().item() < top_p * total * (1 + 1e-12)


def test_greedy_takes_the_lowest_of_equals_and_draws_nothing() -> None:
    params = SamplingParams(temperature=0, top_k=1, seed=3)
    assert make_generator(params) is None
    assert draw(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0]), params) == 1


def test_the_padding_of_the_vocabulary_is_never_chosen() -> None:
    logits = torch.tensor([0.0, 0.1, 0.2, 90.0])
    assert draw(logits, SamplingParams(temperature=0), num_tokens=3) == 2
    assert {draw(logits, SamplingParams(seed=seed), num_tokens=3) for seed in range(60)} == {0, 1, 2}


def test_one_row_draws_the_same_alone_and_among_others() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    every = [
        SamplingParams(seed=11), SamplingParams(temperature=0), SamplingParams(top_p=0.9, seed=12), SamplingParams(top_k=9, seed=11),
        SamplingParams(temperature=0.5, seed=13, logprobs=2),
    ]  # fmt: skip
    together = [make_generator(params) for params in every]
    alone = [make_generator(params) for params in every]
    for _ in range(20):
        tokens, logprobs = sample(logits, every, together, num_tokens=300)
        single = [sample(logits[i : i + 1], [every[i]], [alone[i]], num_tokens=300) for i in range(5)]
        assert tokens == [tokens[0] for tokens, _ in single]
        assert logprobs == [entries[0] for _, entries in single]


@pytest.mark.parametrize("params", [SamplingParams(top_k=40, seed=0), SamplingParams(top_p=0.9999, seed=0), SamplingParams(seed=0)])
def test_rounding_differences_that_swap_ranks_do_not_change_the_draw(params: SamplingParams) -> None:
    tail = torch.full((24,), -60.0)
    rising = torch.cat((torch.arange(40) * 1e-6, tail))
    falling = torch.cat((torch.arange(40).flip(0) * 1e-6, tail))
    generator, other = make_generator(params), make_generator(params)
    for _ in range(100):
        assert sample(rising[None], [params], [generator], num_tokens=64) == sample(falling[None], [params], [other], num_tokens=64)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-20, 1e-3])
def test_a_tiny_temperature_takes_the_best(temperature: float) -> None:
    assert draw(torch.tensor([3.0, 80.0, 79.0]), SamplingParams(temperature=temperature, seed=0)) == 1


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 3)])
@pytest.mark.parametrize("top_k", [0, 4])
def test_the_ends_of_the_uniform_number_find_a_token_with_weight(
    monkeypatch: pytest.MonkeyPatch, uniform: float, token: int, top_k: int
) -> None:
    monkeypatch.setattr(sampler.torch, "rand", lambda *_, **__: torch.tensor(uniform, dtype=torch.float64))
    logits = torch.tensor([-1000.0, 0.0, -1000.0, -35.0, -1000.0])
    assert draw(logits, SamplingParams(seed=0, top_k=top_k)) == token


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_named_by_row(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4] = bad
    params = SamplingParams(temperature=temperature, seed=0)
    with pytest.raises(NotFinite) as caught:
        sample(logits, [params] * 3, [make_generator(params)] * 3, num_tokens=8)
    assert caught.value.rows == [1]


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.5, 9.0])  # the last one is padding: it counts in the sum, as in training
    params = SamplingParams(temperature=0.3, top_k=1, seed=0, logprobs=2)
    _, (entry,) = sample(logits[None], [params], [make_generator(params)], num_tokens=4)
    truth = logits.double().log_softmax(0).tolist()
    assert entry is not None and entry.token == 1
    assert entry.logprob == pytest.approx(truth[1], abs=1e-6)
    assert [token for token, _ in entry.top] == [1, 2]
    assert [value for _, value in entry.top] == pytest.approx([truth[1], truth[2]], abs=1e-6)
