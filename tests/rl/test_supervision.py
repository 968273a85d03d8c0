"""From scores to advantages: of whole answers, and of tokens as a loop over the steps to come gives them; what does not fit is refused."""

from types import SimpleNamespace

import pytest
import torch

from dsv2.errors import ConfigError
from dsv2.rl.objective import PRESETS, Objective
from dsv2.rl.reward import Part, Rewards, Scores
from dsv2.rl.supervision import advantages_of, require_supervision, shown_advantage
from reference import grpo as reference

ROLLOUTS = [SimpleNamespace(tokens=(0,) * length) for length in (4, 3, 5, 2, 4, 1)]
STEPS = [
    [(1, 0.2), (3, 1.0)], [(2, 0.5)], [(0, -1.0), (1, 0.0), (4, 0.7)],
    None, [(1, 1.0), (3, 1.0)], [(0, 0.0)],
]  # fmt: skip
TOTAL = [0.6, 0.5, -0.1, None, 1.0, 0.0]
GROUPS = (slice(0, 3), slice(3, 6))


def of_steps(rollouts: object) -> list:
    return []


def test_tokens_get_what_the_steps_to_come_earn() -> None:
    seen = advantages_of("process", Scores(TOTAL, TOTAL, {}, {}, STEPS), ROLLOUTS, Objective(), group_size=3, max_tokens=7)
    assert seen.shape == (6, 7) and seen.dtype == torch.float32
    for group in GROUPS:
        rewards = [[earned for _, earned in steps or ()] for steps in STEPS[group]]
        ends = [[end for end, _ in steps or ()] for steps in STEPS[group]]
        lengths = [len(rollout.tokens) for rollout in ROLLOUTS[group]]
        for row, expected in zip(seen[group].tolist(), reference.step_advantages(rewards, ends, lengths), strict=True):
            assert row[: len(expected)] == pytest.approx(expected, abs=1e-6)
            assert row[len(expected) :] == [0.0] * (7 - len(expected))
    assert seen[3].tolist() == [0.0] * 7, "no score, nothing to learn"
    less_mean = advantages_of("process", Scores(TOTAL, TOTAL, {}, {}, STEPS), ROLLOUTS, PRESETS["dr_grpo"], group_size=3, max_tokens=7)
    assert less_mean[1, 0].item() == pytest.approx(0.5 - (0.2 + 1.0 + 0.5 - 1.0 + 0.7) / 6)
    assert less_mean[4, :2].tolist() == pytest.approx([2 / 3, 2 / 3]) and less_mean[4, 2].item() == pytest.approx(1 / 3)


def test_whole_answers_get_what_they_earn() -> None:
    seen = advantages_of("outcome", Scores([0.0] * 6, TOTAL, {}), ROLLOUTS, Objective(), group_size=3, max_tokens=7)
    assert seen[:3].tolist() == pytest.approx(reference.z_scores(TOTAL[:3]), abs=1e-6)
    assert seen[3:].tolist() == pytest.approx([0.0, 1.0, -1.0])


def test_nothing_scored_is_nothing_learned() -> None:
    seen = advantages_of("process", Scores([None] * 6, [None] * 6, {}, {}, [None] * 6), ROLLOUTS, Objective(), group_size=3, max_tokens=7)
    assert seen.tolist() == [[0.0] * 7] * 6


def test_rollouts_show_the_advantages_of_their_steps() -> None:
    own = torch.tensor([1.0, 1.0, -0.5, -0.5, 0.0, 0.0])
    assert shown_advantage(own, 4, [(1, 1.0), (3, 0.0)]) == {
        "advantage": 0.25, "steps": [{"end": 1, "reward": 1.0, "advantage": 1.0}, {"end": 3, "reward": 0.0, "advantage": -0.5}]
    }  # fmt: skip
    assert shown_advantage(torch.tensor(0.5), 4, None) == {"advantage": 0.5}


@pytest.mark.parametrize(
    ("kind", "parts", "objective", "says"),
    [
        ("process", [Part("right", of_steps)], Objective(), "no reward that is paid scores steps; rewards: right"),
        ("process", [Part("right", of_steps), Part("seen", of_steps, 0.0, of_steps=True)], Objective(), "rewards: right, seen"),
        ("outcome", [Part("right", of_steps), Part("partial", of_steps, of_steps=True)], Objective(), "paid score steps: partial"),
        ("process", [Part("partial", of_steps, of_steps=True)], PRESETS["v2"], 'with ratio = "output": one ratio moves all tokens'),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, parts: list[Part], objective: Objective, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        require_supervision(kind, Rewards(parts), objective)


def test_what_fits_is_not() -> None:
    require_supervision("outcome", Rewards([Part("right", of_steps), Part("seen", of_steps, 0.0, of_steps=True)]), PRESETS["v2"])
    require_supervision("process", Rewards([Part("right", of_steps), Part("partial", of_steps, of_steps=True)]), PRESETS["dapo"])
