"""The guard against spikes as pure functions: what is a spike, and what the state remembers."""

import json
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.errors import CheckpointError
from dsv2.train.guard import GuardSection, GuardState, after_rollback, after_step, find_spike, spike_limit

SECTION = GuardSection(sigma=3, window=8, rollback_after=2)
VALUES = st.floats(0.01, 100)


@settings(deadline=None, max_examples=100)
@given(st.lists(VALUES, min_size=1, max_size=40), st.floats(0.1, 10))
def test_the_limit_is_mean_and_deviation(past, sigma):
    assert spike_limit(past, sigma) == pytest.approx(statistics.fmean(past) + sigma * statistics.pstdev(past), rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(VALUES, VALUES, st.booleans()), max_size=40))
def test_the_state_is_the_last_accepted_steps_and_survives_json(steps):
    state = GuardState()
    for loss, norm, skipped in steps:
        state = after_step(SECTION, state, loss=loss, grad_norm=norm, skipped=skipped)
        assert GuardState.from_json(json.loads(json.dumps(state.to_json()))) == state
    accepted = [(loss, norm) for loss, norm, skipped in steps if not skipped][-8:]
    assert list(zip(state.losses, state.grad_norms, strict=True)) == accepted
    in_a_row = 0
    for *_, skipped in steps:
        in_a_row = in_a_row + 1 if skipped else 0
    assert state.in_a_row == in_a_row


def test_what_is_a_spike():
    state = GuardState((4.0, 4.1, 3.9, 4.0), (1.0, 1.1, 0.9, 1.0))
    assert find_spike(SECTION, state, 4.2, 1.2) is None
    loss, norm = find_spike(SECTION, state, 4.3, 1.0), find_spike(SECTION, state, 4.0, 1.3)
    assert loss is not None and norm is not None
    assert (loss.what, norm.what) == ("loss", "grad_norm")
    assert loss.limit == pytest.approx(4.0 + 3 * 0.005**0.5) and norm.value == 1.3
    assert find_spike(SECTION, state, 0.1, 0.01) is None, "a fall is no spike"
    assert find_spike(SECTION, GuardState((4.0,) * 3, (1.0,) * 3), 400.0, 1.0) is None, "half a window must be there"
    assert find_spike(GuardSection(), state, 400.0, 400.0) is None, "off"
    assert after_step(GuardSection(), GuardState(), loss=1.0, grad_norm=1.0, skipped=False) == GuardState()


def test_a_rollback_starts_the_count_again_and_is_remembered_until_a_step_passes():
    state = after_rollback(GuardState((1.0,), (1.0,), 2))
    assert (state.in_a_row, state.rolled_back) == (0, True)
    spiking = after_step(SECTION, state, loss=9.0, grad_norm=9.0, skipped=True)
    assert (spiking.in_a_row, spiking.rolled_back) == (1, True)
    passed = after_step(SECTION, spiking, loss=1.0, grad_norm=1.0, skipped=False)
    assert (passed.in_a_row, passed.rolled_back) == (0, False)


@pytest.mark.parametrize(
    "damaged",
    [
        {"losses": [1.0]},
        {"losses": [1.0], "grad_norms": [], "in_a_row": 0, "rolled_back": False},
        {"losses": "ab", "grad_norms": [1, 2], "in_a_row": 0, "rolled_back": False},
        {"losses": [], "grad_norms": [], "in_a_row": None, "rolled_back": False},
        {"losses": [], "grad_norms": [], "in_a_row": 0, "rolled_back": False, "more": 1},
    ],
)
def test_damaged_state_is_refused(damaged):
    with pytest.raises(CheckpointError, match="guard"):
        GuardState.from_json(damaged)
    assert GuardState.from_json({}) == GuardState()
