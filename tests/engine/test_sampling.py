"""The sampler against its definition in float64, and that a row's token depends on its own logits and state alone."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.engine import sampler
from dsv2.engine.request import Constraint, SamplingParams
from dsv2.engine.sampler import NotFinite, SamplerState, draw_seed, read_logprobs, sample, stream_key, uniform


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def state(params: SamplingParams, prompt: tuple[int, ...] = (), said: tuple[int, ...] = (), **fields: Any) -> SamplerState:
    made = SamplerState(params, prompt, seed=0 if params.seed is None else params.seed, **fields)
    for token in said:
        made.accept(token)
    return made


def draw(logits: np.ndarray, given_state: SamplerState, num_tokens: int | None = None) -> int:
    (drawn,) = sample(logits[None].copy(), [given_state], num_tokens=num_tokens or len(logits))
    (token,) = drawn.tokens
    return token


def expected(logits: np.ndarray, params: SamplingParams, prompt: tuple[int, ...] = (), said: tuple[int, ...] = ()) -> np.ndarray:
    """The distribution by its definition, in float64: change, sort, filter, renormalise."""
    changed = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        changed[token] += bias
    for token in {*prompt, *said}:
        changed[token] *= 1 / params.repetition_penalty if changed[token] > 0 else params.repetition_penalty
    for token in set(said):
        changed[token] -= said.count(token) * params.frequency_penalty + params.presence_penalty
    if params.temperature == 0:
        return np.eye(len(logits))[changed.argmax()]
    scaled = changed / params.temperature
    order = np.argsort(-scaled, kind="stable")[: params.top_k or len(logits)]
    shares = np.exp(scaled[order] - scaled.max())
    size = int(np.searchsorted(np.cumsum(shares) / shares.sum(), params.top_p * (1 - 1e-12))) + 1
    order, shares = order[:size], shares[:size]
    order, shares = order[shares >= params.min_p], shares[shares >= params.min_p]
    out = np.zeros(len(logits))
    out[order] = shares / shares.sum()
    return out


CASES: list[dict[str, Any]] = [
    {}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 99, "top_p": 0.05}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.15},
    {"repetition_penalty": 1.4}, {"repetition_penalty": 0.7}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.8},
    {"logit_bias": {3: 2.0, 11: -100.0}},
]  # fmt: skip


@pytest.mark.parametrize("fields", CASES)
def test_the_drawn_frequencies_are_those_of_the_definition(fields: dict[str, Any]) -> None:
    logits, prompt, said, draws = normal(12, seed=1) * 1.5, (1, 2, 2, 5), (2, 7, 7, 7), 4000
    params = SamplingParams(seed=5, **fields)
    made = state(params, prompt, said)
    numbers = [uniform(stream_key(5), index) for index in range(draws)]
    counts = np.zeros(12)
    shares = expected(logits, params, prompt, said)
    for number in numbers:
        made._key = 0
        counts[pick_with(made, logits, number)] += 1
    assert (counts[shares == 0] == 0).all()
    assert (np.abs(counts - draws * shares) <= 4.5 * np.sqrt(draws * shares * (1 - shares)) + 1e-9).all()


def pick_with(made: SamplerState, logits: np.ndarray, number: float) -> int:
    """Draw with a given uniform number, without moving the state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda *_: number)
        row = logits.copy()
        return made.pick(row, int(row.argmax()), float(row.max()))


# A number of exactly 0 draws the first token that float32 does not round to nothing, which may be another one than in float64.
@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32), st.integers(2, 1500), st.floats(1e-9, 1, exclude_max=True), st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 7, 900]), st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-6]), st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    st.sampled_from([1.0, 1.3, 0.8]), st.sampled_from([0.0, 0.5, -0.5]), st.sampled_from([0.0, 1.0, -2.0]), st.floats(0.1, 4),
)  # fmt: skip
def test_any_combination_draws_what_the_definition_draws(
    seed: int, size: int, number: float, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float,
    frequency: float, presence: float, spread: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(size) * spread).astype(np.float32)
    prompt, said = tuple(rng.integers(0, size, 5).tolist()), tuple(rng.integers(0, size, 90).tolist())
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition, frequency_penalty=frequency,
        presence_penalty=presence, logit_bias={0: 1.5},
    )  # fmt: skip
    token = pick_with(state(params, prompt, said), logits, number)
    shares = expected(logits, params, prompt, said)
    cumulative = np.cumsum(shares)
    # float32 weights move each border by some 1e-6; where one filter cuts there, a near-equal token may take the place
    low = cumulative[token] - shares[token]
    near = low - 1e-3 <= number <= cumulative[token] + 1e-3
    assert near and (shares[token] > 0 or close_to_a_border(logits, params, prompt, said, token))


def close_to_a_border(logits: np.ndarray, params: SamplingParams, prompt: tuple[int, ...], said: tuple[int, ...], token: int) -> bool:
    """Whether a change of 1e-5 in a logit brings a token in."""
    nudged = logits.copy()
    nudged[token] += 1e-5
    return expected(nudged, params, prompt, said)[token] > 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([7, 512, 513, 3000]), st.floats(0.01, 0.999), st.floats(0.0, 4.0))
def test_the_nucleus_is_the_shortest_that_reaches_top_p(seed: int, size: int, top_p: float, spread: float) -> None:
    weights = np.exp(normal(size, seed=seed) * np.float32(spread))
    kept = weights.copy()
    sampler._keep_nucleus(kept, top_p)
    ids, total = np.flatnonzero(kept), weights.sum(dtype=np.float64)
    rest = weights[kept == 0]
    assert np.array_equal(weights[ids], kept[ids])
    assert len(rest) == 0 or rest.max() <= kept[ids].min()
    assert kept.sum(dtype=np.float64) >= top_p * total * (1 - 1e-12)
    assert kept.sum(dtype=np.float64) - kept[ids].min() < top_p * total * (1 + 1e-12)


@pytest.mark.parametrize("fields", [{"top_k": 3}, {"top_p": 0.3}])
def test_of_equals_at_a_border_the_lowest_ids_stay(fields: dict[str, Any]) -> None:
    logits = np.zeros(10, np.float32)
    assert {pick_with(state(SamplingParams(**fields)), logits, number) for number in np.linspace(0, 0.999, 40)} == {0, 1, 2}


def test_greedy_takes_the_lowest_of_equals_with_and_without_the_best_given() -> None:
    logits = np.array([[0.0, 2.0, 1.0, 2.0, 2.0], [5.0, 2.0, 1.0, 2.0, 2.0]], np.float32)
    params = SamplingParams(temperature=0, top_k=1, seed=3)
    assert [drawn.tokens for drawn in sample(logits.copy(), [state(params), state(params)], num_tokens=5)] == [(1,), (0,)]
    best = np.array([3, 0]), np.array([2.0, 5.0], np.float32)
    states = [state(params), state(SamplingParams(temperature=0, logprobs=1))]
    assert [drawn.tokens for drawn in sample(logits.copy(), states, num_tokens=5, best=best)] == [(3,), (0,)]
    assert [one.num_drawn for one in states] == [1, 1]


def test_the_padding_of_the_vocabulary_is_never_chosen() -> None:
    logits = np.array([0.0, 0.1, 0.2, 90.0], np.float32)
    assert draw(logits, state(SamplingParams(temperature=0)), num_tokens=3) == 2
    assert {draw(logits, state(SamplingParams(seed=seed)), num_tokens=3) for seed in range(60)} == {0, 1, 2}


def test_one_row_draws_the_same_alone_and_among_others() -> None:
    every = [
        SamplingParams(seed=11), SamplingParams(temperature=0), SamplingParams(top_p=0.9, seed=12), SamplingParams(top_k=9, seed=11),
        SamplingParams(temperature=0.5, seed=13, logprobs=2), SamplingParams(temperature=0.5, seed=13, frequency_penalty=1),
    ]  # fmt: skip
    together, alone = [state(params) for params in every], [state(params) for params in every]
    for step in range(20):
        logits = normal(len(every), 300, seed=step)
        drawn = sample(logits.copy(), together, num_tokens=300)
        assert drawn == [sample(logits[i : i + 1].copy(), [alone[i]], num_tokens=300)[0] for i in range(len(every))]


@pytest.mark.parametrize("params", [SamplingParams(top_k=40, seed=0), SamplingParams(top_p=0.9999, seed=0), SamplingParams(seed=0)])
def test_rounding_differences_that_swap_ranks_do_not_change_the_draw(params: SamplingParams) -> None:
    tail = np.full(24, -60.0, np.float32)
    rising = np.concatenate((np.arange(40, dtype=np.float32) * np.float32(1e-6), tail))
    falling = np.concatenate((rising[39::-1], tail))
    one, other = state(params), state(params)
    assert [draw(rising, one) for _ in range(100)] == [draw(falling, other) for _ in range(100)]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-20, 1e-3])
def test_a_tiny_temperature_takes_the_best(temperature: float) -> None:
    assert draw(np.array([3.0, 80.0, 79.0], np.float32), state(SamplingParams(temperature=temperature, seed=0))) == 1


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2**-53, 3)])
@pytest.mark.parametrize("fields", [{}, {"top_k": 4}, {"min_p": 1e-20}, {"top_p": 1 - 1e-16}])
@pytest.mark.parametrize("size", [5, 2000])
def test_the_ends_of_the_uniform_number_find_a_token_with_weight(number: float, token: int, fields: dict[str, Any], size: int) -> None:
    logits = np.full(size, -1000.0, np.float32)
    logits[1], logits[3] = 0, -30
    assert pick_with(state(SamplingParams(**fields)), logits, number) == token


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_named_and_nothing_is_drawn(bad: float | None, temperature: float) -> None:
    logits = np.zeros((5, 8), np.float32)
    logits[3, 4 if bad is not None else slice(None)] = -math.inf if bad is None else bad
    before = logits.copy()
    states = [state(SamplingParams(temperature=temperature, logit_bias={0: 1})) for _ in range(3)]
    with pytest.raises(NotFinite) as caught:
        sample(logits, states, num_tokens=8, drafts=[(), (1, 2), ()])
    assert caught.value.rows == [1]  # row 3 is the second draft row of the second sequence
    assert [one.num_drawn for one in states] == [0, 0, 0] and np.array_equal(logits, before, equal_nan=True)
    with pytest.raises(NotFinite):
        read_logprobs(before, [0] * 5, 0, num_tokens=8)


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.array([1.0, 3.0, 2.0, 0.5, 9.0], np.float32)  # the last one is padding: it counts in the sum, as in training
    truth = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(temperature=0.3, top_k=1, seed=0, logprobs=2, logit_bias={3: 50}, frequency_penalty=2)
    (drawn,) = sample(logits[None].copy(), [state(params)], num_tokens=4)
    assert drawn.logprobs is not None
    (entry,) = drawn.logprobs
    assert drawn.tokens == (3,) and entry.token == 3
    assert entry.logprob == pytest.approx(truth[3], abs=1e-6)
    assert [token for token, _ in entry.top] == [1, 2]
    assert [value for _, value in entry.top] == pytest.approx([truth[1], truth[2]], abs=1e-6)
    assert read_logprobs(logits[None], [3], 2, num_tokens=4) == [entry]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(2, 5000), st.floats(0, 30), st.integers(0, 20))
def test_log_probabilities_are_exact_to_a_millionth(seed: int, size: int, spread: float, num_top: int) -> None:
    logits = (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)
    wide = logits.astype(np.float64)
    truth = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    (entry,) = read_logprobs(logits[None], [size // 2], num_top, num_tokens=size)
    assert entry.logprob == pytest.approx(truth[size // 2], abs=1e-6)
    order = np.argsort(-logits, kind="stable")[:num_top]
    assert [token for token, _ in entry.top] == order.tolist()
    assert [value for _, value in entry.top] == pytest.approx(truth[order].tolist(), abs=1e-6)


def test_the_random_numbers_are_uniform_and_those_of_neighbours_independent() -> None:
    rows = np.array([[uniform(stream_key(seed, sample), index) for index in range(64)] for seed in range(-32, 32) for sample in range(4)])
    assert rows.min() >= 0 and rows.max() < 1 and len(np.unique(rows)) == rows.size
    counts = np.histogram(rows, 64, (0, 1))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 63 + 5 * math.sqrt(2 * 63)
    pairs = {"index": (rows[:, :-1], rows[:, 1:]), "sample": (rows[:-1:4], rows[1::4]), "seed": (rows[:-4], rows[4:])}
    for name, (one, next_one) in pairs.items():
        cells = np.histogram2d(one.ravel(), next_one.ravel(), 8, ((0, 1), (0, 1)))[0]
        mean = one.size / 64
        assert ((cells - mean) ** 2 / mean).sum() < 63 + 5 * math.sqrt(2 * 63), name
        assert abs(np.corrcoef(one.ravel(), next_one.ravel())[0, 1]) < 4.5 / math.sqrt(one.size), name
    bits = (rows * 2.0**53).astype(np.int64)
    assert all(abs(((bits >> bit) & 1).mean() - 0.5) < 4.5 * 0.5 / math.sqrt(bits.size) for bit in range(53))


def test_the_random_numbers_are_splitmix64s() -> None:
    # First outputs of SplitMix64 from state 1234567, as listed for its reference implementation.
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert [uniform(1234567, index) for index in range(3)] == [(word >> 11) * 2.0**-53 for word in known]


def test_a_seed_is_kept_and_none_is_drawn_anew() -> None:
    assert draw_seed(SamplingParams(seed=-7)) == -7
    assert len({draw_seed(SamplingParams()) for _ in range(20)}) == 20
    assert len({stream_key(seed, index) for seed in range(-50, 50) for index in range(8)}) == 800


def test_no_end_token_before_min_tokens() -> None:
    logits = np.array([0.0, 5.0, 9.0, 4.0], np.float32)
    made = state(SamplingParams(temperature=0, min_tokens=2), end_ids=(1, 2))
    assert [draw(logits, made) for _ in range(4)] == [3, 3, 2, 2]
    only = state(SamplingParams(min_tokens=1, seed=0), end_ids=range(4))
    (refused, other) = sample(np.stack([logits, logits]), [only, state(SamplingParams(temperature=0))], num_tokens=4)
    assert refused.tokens == () and refused.error is not None and "min_tokens" in refused.error.message
    assert other.tokens == (2,) and only.num_drawn == 0


def test_a_constraint_is_not_forgotten() -> None:
    with pytest.raises(ValueError, match="matcher"):
        state(SamplingParams(constraint=Constraint("json_object")))


def test_penalties_count_more_tokens_than_there_was_room_for() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=0.5, repetition_penalty=1.1)
    logits, said = np.abs(normal(400, seed=4)), tuple(range(0, 400, 2)) * 2
    made = state(params, tuple(range(0, 400, 5)), said)
    assert draw(logits, made) == expected(logits, params, tuple(range(0, 400, 5)), said).argmax()
