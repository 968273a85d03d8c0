"""Learning rate and batch ramp against the oracle and the published V2 recipe (P section 3.1.2; spec 4.1, 10.10)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.train.schedule import BatchSize, LearningRate, batch_size, check_batch, learning_rate, steps_of
from reference import training

BUDGET = 8_100_000_000_000
V2_RATE = LearningRate(peak=2.4e-4, warmup_steps=2000)
V2_BATCH = BatchSize(sequences=9216, initial_sequences=2304, ramp_tokens=225_000_000_000, micro_sequences=1)


def v2_rate(updates, share):
    """Rate of update number `updates` (from 1), when that share of the tokens is consumed."""
    return learning_rate(V2_RATE, step=updates - 1, tokens=int(share * BUDGET), total_tokens=BUDGET)


def test_published_learning_rates_of_v2():
    assert v2_rate(1, 0) == pytest.approx(2.4e-4 / 2000)
    assert v2_rate(1000, 0.001) == pytest.approx(1.2e-4)
    assert v2_rate(2000, 0.01) == pytest.approx(2.4e-4)
    assert v2_rate(100_000, 0.599) == pytest.approx(2.4e-4)
    assert v2_rate(140_000, 0.601) == pytest.approx(7.584e-5)
    assert v2_rate(190_000, 0.899) == pytest.approx(7.584e-5)
    assert v2_rate(200_000, 0.901) == pytest.approx(2.3965e-5, rel=1e-4)


@settings(deadline=None, max_examples=100)
@given(
    step=st.integers(0, 300),
    tokens=st.integers(0, 1000),
    warmup=st.integers(0, 200),
    points=st.lists(st.floats(0.01, 0.99), max_size=3).map(sorted),
    factor=st.floats(0.01, 1),
)
def test_learning_rate_is_the_reference(step, tokens, warmup, points, factor):
    schedule = LearningRate(peak=3e-4, warmup_steps=warmup, decay_points=tuple(points), decay_factor=factor)
    ours = learning_rate(schedule, step=step, tokens=tokens, total_tokens=800)
    expected = training.learning_rate(
        step + 1, tokens, peak=3e-4, warmup_steps=warmup, total_tokens=800, decay_points=points, decay_factor=factor
    )
    assert ours == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(step=st.integers(0, 300), tokens=st.integers(0, 1000), warmup=st.integers(0, 200), share=st.floats(0, 1))
def test_cosine_is_the_reference(step, tokens, warmup, share):
    schedule = LearningRate(peak=3e-4, warmup_steps=warmup, decay="cosine", final_share=share)
    ours = learning_rate(schedule, step=step, tokens=tokens, total_tokens=800)
    expected = training.cosine_rate(step + 1, tokens, peak=3e-4, warmup_steps=warmup, total_tokens=800, final_share=share)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_published_learning_rates_of_coder_v2():
    schedule = LearningRate(peak=2.4e-4, warmup_steps=2000, decay="cosine", final_share=0.1)
    total, batch = 6_000_000_000_000, 9216 * 4096

    def rate(step, tokens):
        return learning_rate(schedule, step=step, tokens=tokens, total_tokens=total)

    assert rate(0, 0) == pytest.approx(2.4e-4 / 2000)
    assert rate(1999, 1999 * batch) == pytest.approx(2.4e-4, rel=5e-4)
    assert rate(10**5, total // 2) == pytest.approx(2.4e-4 * 0.55)
    assert rate(10**6, total) == pytest.approx(2.4e-5)


@pytest.mark.parametrize(
    "wrong", [{"decay": "cosine", "decay_points": (0.5,)}, {"decay": "cosine", "decay_factor": 0.5}, {"decay": "steps", "final_share": 0.2}]
)
def test_values_that_a_decay_would_ignore_are_refused(wrong):
    with pytest.raises(ValueError, match="has no meaning with decay"):
        LearningRate(peak=1e-3, **wrong)


def test_published_batch_ramp_of_v2():
    assert [batch_size(V2_BATCH, int(tokens)) for tokens in (0, 112.5e9, 225e9, 8e12)] == [2304, 5760, 9216, 9216]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_batch_size_is_the_reference_in_whole_micro_batches(data):
    micro = data.draw(st.integers(1, 8))
    start, end = sorted(micro * data.draw(st.integers(1, 20)) for _ in range(2))
    ramp_tokens, tokens = data.draw(st.integers(1, 1000)), data.draw(st.integers(0, 2000))
    batch = BatchSize(sequences=end, initial_sequences=start, ramp_tokens=ramp_tokens, micro_sequences=micro)
    check_batch(batch)
    ours = batch_size(batch, tokens)
    assert ours % micro == 0
    assert ours == training.batch_size(tokens, start=start, end=end, ramp_tokens=ramp_tokens, multiple=micro)


def test_steps_follow_each_other_until_the_budget_is_spent():
    batch = BatchSize(sequences=8, initial_sequences=2, ramp_tokens=400, micro_sequences=2)
    steps = list(steps_of(batch, 10, 600))
    assert steps[0] == (0, 2) and steps[-1][1] == 8
    for (consumed, size), (following, _) in zip(steps, steps[1:], strict=False):
        assert following == consumed + size
    last, size = steps[-1]
    assert last * 10 < 600 <= (last + size) * 10


@pytest.mark.parametrize("wrong", [{"sequences": 9}, {"initial_sequences": 3}])
def test_batches_that_do_not_split_are_refused_with_both_numbers(wrong):
    batch = BatchSize(**{"sequences": 8, "initial_sequences": 4, "ramp_tokens": 9, "micro_sequences": 4} | wrong)
    with pytest.raises(ConfigError) as caught:
        check_batch(batch)
    name, value = next(iter(wrong.items()))
    assert f"{name} = {value}" in str(caught.value) and "4" in str(caught.value)
