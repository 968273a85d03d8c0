"""Rewards in deviations: as the loop says, blind to unit and origin, and nothing where nothing differs or is known."""

import statistics
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.reward_scale import in_deviations

ANSWERS = st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(-8, 8).map(float))), max_size=24)


def loop(values, groups, scale):
    """Return the same, group by group."""
    known = {group: [v for v, g in zip(values, groups, strict=True) if g == group and v is not None] for group in groups}
    means = {group: statistics.fmean(own) if own else 0.0 for group, own in known.items()}
    rests = {group: [value - means[group] for value in own] for group, own in known.items()}
    all_rests = [rest for own in rests.values() for rest in own]
    units = {group: statistics.pstdev(own) if own else 0.0 for group, own in rests.items()}
    if scale == "batch":
        units = dict.fromkeys(groups, (sum(rest * rest for rest in all_rests) / max(1, len(all_rests))) ** 0.5)
    return [v if v is None else (v - means[g]) / units[g] if units[g] else 0.0 for v, g in zip(values, groups, strict=True)]


def close(one, other):
    return all((a is None) == (b is None) and (a is None or a == pytest.approx(b, abs=1e-9)) for a, b in zip(one, other, strict=True))


@given(ANSWERS, st.sampled_from(["group", "batch"]))
def test_values_are_counted_in_deviations(answers, scale):
    groups, values = [group for group, _ in answers], [value for _, value in answers]
    assert close(in_deviations(values, groups, scale), loop(values, groups, scale))
    assert in_deviations(values, groups, "none") == values


@given(ANSWERS, st.sampled_from(["group", "batch"]), st.sampled_from([0.01, 3.0, 500.0]), st.integers(-50, 50))
def test_unit_and_origin_do_not_matter_nor_does_that_of_each_prompt(answers, scale, unit, origin):
    groups, values = [group for group, _ in answers], [value for _, value in answers]
    other = [value if value is None else unit * value + origin * (1 + group) for group, value in answers]
    assert close(in_deviations(other, groups, scale), in_deviations(values, groups, scale))


def test_a_group_weighs_as_much_as_another_or_as_much_as_it_differs():
    values, groups = [0.0, 2.0, 10.0, 10.2, 5.0, 5.0 + 1e-7], [0, 0, 1, 1, 2, 2]
    assert in_deviations(values, groups, "group") == pytest.approx([-1, 1, -1, 1, 0, 0])
    of_all = ((1 + 1 + 0.01 + 0.01 + 0 + 0) / 6) ** 0.5
    assert in_deviations(values, groups, "batch") == pytest.approx([-1 / of_all, 1 / of_all, -0.1 / of_all, 0.1 / of_all, 0, 0])
    assert in_deviations([None, None, 3.0], [0, 0, 1], "batch") == [None, None, 0.0] and in_deviations([], [], "batch") == []


# In a sum -------------------------------------------------------------------------------------------------------------------------------


ROLLOUTS = [SimpleNamespace(tokens=(i,), group=i // 4, example={"group": i // 4}) for i in range(8)]


def fixed(*values):
    return lambda rollouts: [values[rollout.tokens[0]] for rollout in rollouts]


LOUD = fixed(0.0, 800.0, 0.0, 800.0, None, 100.0, 300.0, 200.0)
QUIET = fixed(0.1, 0.1, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_scaled_rewards_weigh_like_with_like_and_are_shown_as_they_are(scale):
    scores = Rewards([Part("loud", LOUD, 1.0, scale=scale), Part("quiet", QUIET, 2.0, scale=scale)]).score(ROLLOUTS)
    quiet = 1.0 if scale == "group" else (8 / 4) ** 0.5  # the second group has none of it
    rests = [400.0**2] * 4 + [100.0**2, 100.0**2, 0.0]
    loud = [1.0, 3**0.5 / 2**0.5] if scale == "group" else [of / (sum(rests) / 7) ** 0.5 for of in (400.0, 100.0)]
    expected = [-loud[0] - 2 * quiet, loud[0] - 2 * quiet, -loud[0] + 2 * quiet, loud[0] + 2 * quiet, None, -loud[1], loud[1], 0.0]
    assert close(scores.compared, expected)
    assert scores.total == [0.2, 800.2, 0.6, 800.6, None, 100.2, 300.2, 200.2]
    assert scores.parts["loud"] == [0.0, 800.0, 0.0, 800.0, None, 100.0, 300.0, 200.0]
    longer = (type(scores).empty() + scores).with_penalty([-1.0] * 8)
    assert close(longer.compared, [None if value is None else value - 1 for value in expected])


def test_without_a_scale_answers_are_compared_by_the_sum():
    scores = Rewards([Part("loud", LOUD), Part("quiet", QUIET, 2.0)]).score(ROLLOUTS)
    assert scores.compared == scores.total


def test_what_is_not_paid_counts_as_0_among_what_is():
    """A right answer in poor form earns no less than a wrong one: both have the form's mean against them."""
    right = Part("right", fixed(1.0, 1.0, 0.0, 0.0, 1.0, 0.0, None, 1.0))
    form = Part("form", fixed(1.0, 0.0, 1.0, None, None, 1.0, 1.0, 1.0), 0.1, only_with="right", scale="group")
    scores = Rewards([right, form]).score(ROLLOUTS)
    low, high = -1 / 3**0.5, 3**0.5  # of 1, 0, 0, 0
    assert close(scores.compared, [1 + 0.1 * high, 1 + 0.1 * low, 0.1 * low, 0.1 * low, None, -0.1, None, 1.1])
    assert scores.total == [1.1, 1.0, 0.0, 0.0, None, 0.0, None, 1.1] and scores.parts["form"][2:4] == [1.0, None]


def test_answers_that_a_reward_is_not_asked_about_have_no_part_in_its_spread():
    second = Part("loud", LOUD, scale="batch", lacks=lambda example: "" if example["group"] else "no request")
    scores = Rewards([second, Part("quiet", QUIET)]).score(ROLLOUTS)
    assert close(scores.compared[:4], [0.1, 0.1, 0.3, 0.3]) and scores.compared[6] == pytest.approx(0.1 + 1.5**0.5)


def test_whole_answers_are_scaled_beside_steps_and_steps_are_not():
    steps = Part("steps", lambda rollouts: [[(0, 0.5)] for _ in rollouts], of_steps=True)
    scores = Rewards([steps, Part("quiet", QUIET, scale="group")]).score(ROLLOUTS)
    assert [own[0][1] for own in scores.steps] == pytest.approx([-0.5, -0.5, 1.5, 1.5, 0.5, 0.5, 0.5, 0.5])
    with pytest.raises(ConfigError, match="the reward 'steps' scores steps, and scale = 'batch' counts whole answers"):
        Rewards([Part("steps", QUIET, of_steps=True, scale="batch")])
    with pytest.raises(ConfigError, match="scale = 'groups' of the reward 'quiet' is none of none, group, batch"):
        Rewards([Part("quiet", QUIET, scale="groups")])
