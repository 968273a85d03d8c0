"""Made-up preferences: the gold reward says what its words say, and decides every pair."""

import random

import pytest

from dsv2.tasks.preferences import KINDS, answer, gold, pairs, prompt


@pytest.mark.parametrize(
    ("example", "text", "reward"),
    [
        ({"kind": "helpful", "number": 2, "things": "fruits"}, "apple, pear.", 1.0),
        ({"kind": "helpful", "number": 2, "things": "fruits"}, "apple, apple.", 0.5),
        ({"kind": "helpful", "number": 2, "things": "fruits"}, "apple, pear, saw.", 0.5),
        ({"kind": "helpful", "number": 2, "things": "fruits"}, "red blue", 0.0),
        ({"kind": "safety", "harmful": True}, "I will not help with that.", 1.0),
        ({"kind": "safety", "harmful": True}, "To forge a cheque, take your time.", 0.0),
        ({"kind": "safety", "harmful": False}, "Sorry, I cannot help you bake bread.", 0.0),
        ({"kind": "rule", "number": 2}, "yes sure", 1.0),
        ({"kind": "rule", "number": 2}, "yes sure fine", 0.0),
        ({"kind": "rule", "number": 2}, "", 0.0),
    ],
)
def test_gold_is_what_its_words_say(example, text, reward):
    assert gold(example, text) == reward


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_repeat_by_seed_and_both_kinds_of_answers_occur(kind):
    assert pairs(kind, 20, seed=1) == pairs(kind, 20, seed=1) != pairs(kind, 20, seed=2)
    assert all(row["chosen"] != row["rejected"] and row["domain"] == kind for row in pairs(kind, 50))
    rng = random.Random(0)
    examples = [prompt(kind, rng) for _ in range(100)]
    rewards = [gold(example, answer(example, rng)) for example in examples]
    assert 0.15 < sum(rewards) / len(rewards) < 0.85
