"""Figures of held-out answers: pass@k without bias, and what they leave out."""

import pytest

from dsv2.engine.llm import LLM
from dsv2.rl.evaluate import evaluate, pass_at
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.rollout import Rollout


def test_an_answer_without_a_score_leaves_the_others_their_pass_at_k(llm: LLM) -> None:
    def known(rollouts: list[Rollout]) -> list[float | None]:
        return [None if (r.group, r.index) == (0, 0) else float(r.index == 1) for r in rollouts]

    judge = Rewards([Part("right", known, right_or_wrong=True)])
    examples = [{"messages": [{"role": "user", "content": text}]} for text in "abc"]
    found = evaluate(llm, examples, judge, samples=3, max_tokens=2, seed="0")
    assert found["reward"] == pytest.approx(3 / 8) and found["right/pass@3"] == 1.0
    assert found["right/pass@1"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert (found["answers"], found["unscored"], found["right/unscored"]) == (9, 1, 1)


def test_what_is_told_of_held_out_answers_does_not_depend_on_their_values(llm: LLM) -> None:
    """Values that happen to be 0 and 1 make no pass@k, and a reward that could never tell keeps its place."""
    examples = [{"messages": [{"role": "user", "content": "a"}]}]
    keys = []
    for values in ([0.0, 1.0], [0.5, 1.0], [None, None]):
        model = Part("model", lambda rollouts, values=values: values)
        judge = Rewards([model, Part("right", lambda _: [None, 1.0], 0.0, right_or_wrong=True)])
        found = evaluate(llm, examples, judge, samples=2, max_tokens=2, seed="0")
        keys.append(tuple(found))
        assert (found["right/pass@1"], found["right/pass@2"], found["right/unscored"]) == (1.0, None, 1)
    assert found["reward"] is None and found["unscored"] == 2
    assert len(set(keys)) == 1 and not any(key.startswith("model/pass@") for key in keys[0])


def test_pass_at_k_is_unbiased() -> None:
    assert pass_at(1, 4, 2) == 0.5 and pass_at(4, 4, 1) == 1.0 and pass_at(2, 4, 1) == 0.5 and pass_at(3, 4, 0) == 0.0
