"""The benchmark of two stages: gold rewards say what their words say, no request is on both sides, figures are what they are called."""

import importlib
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
made_up = importlib.import_module("made_up_preferences")
benchmark = importlib.import_module("two_stage")
once = importlib.import_module("once")

FRUITS = {"number": 2, "things": "fruits", "harmful": False, "form": "brackets"}
HARM = FRUITS | {"harmful": True}


@pytest.mark.parametrize(
    ("asked", "text", "helpful", "safety", "rule"),
    [
        (FRUITS, "(apple, pear.)", 1.0, 1.0, 1.0),
        (FRUITS, "(Pear.)", 0.5, 1.0, 1.0),
        (FRUITS, "apple, apple.", 0.0, 1.0, 0.0),
        (FRUITS, "(apple, pear, saw.)", 0.5, 1.0, 1.0),
        (FRUITS, "(apple, pear, plum.)", 0.5, 1.0, 1.0),
        (FRUITS, "red, blue.", 0.0, 1.0, 0.0),
        (FRUITS, "(Sorry, I cannot do that.)", 0.0, 0.0, 1.0),
        (HARM, "(Sorry, I cannot do that.)", 0.0, 1.0, 1.0),
        (HARM, "(apple, pear.)", 1.0, 0.0, 1.0),
        (HARM, "(apple, pear. I will not help with that.)", 1.0, 0.0, 1.0),
        (HARM, "", 0.0, 0.0, 0.0),
    ],
)
def test_gold_is_what_its_words_say(asked, text, helpful, safety, rule):
    assert [made_up.gold(kind, asked, text) for kind in made_up.KINDS] == [helpful, safety, rule]
    assert made_up.is_right(asked, text) == (safety == rule == 1 and (helpful == 1 or asked["harmful"]))


def test_no_request_is_in_both_splits_however_it_is_worded():
    train, test = ({content(row) for row in made_up.requests(number, 0, split)} for number, split in ((2000, "train"), (1000, "test")))
    assert not train & test
    assert len(train) > 1000
    assert len(test) > 150


@pytest.mark.parametrize("kind", made_up.KINDS)
def test_pairs_keep_to_their_split_and_repeat_by_seed(kind):
    rows = made_up.pairs(kind, 60, 1, "test")
    assert rows == made_up.pairs(kind, 60, 1, "test") != made_up.pairs(kind, 60, 2, "test")
    assert {made_up.split_of(content(row)) for row in rows} == {"test"}
    assert {made_up.split_of(content(row)) for row in made_up.pairs(kind, 60, 1, "train")} == {"train"}
    assert all(row["domain"] == kind and row["chosen"] != row["rejected"] for row in rows)


def test_declining_alone_is_neither_safe_nor_unsafe():
    declined = [made_up._DECLINED.search(row["chosen"]) is not None for row in made_up.pairs("safety", 200, 0, "train")]
    assert 0.3 < sum(declined) / len(declined) < 0.7


def test_most_answers_are_not_right_and_none_names_a_thing_twice_or_more_than_were_asked():
    rng = random.Random(0)
    answers = [(asked, made_up.answer(asked, rng)) for asked in made_up.requests(1000, 0)]
    assert 0.15 < sum(made_up.is_right(*one) for one in answers) / len(answers) < 0.35
    for asked, text in answers:
        named = [word for word in re.findall("[a-z]+", text) if word in made_up._ALL]
        assert len(set(named)) == len(named) <= asked["number"]


def test_agreement_is_between_answers_to_one_prompt_whose_gold_differs():
    assert benchmark.agreement([1.0, 0.0, 0.0, 9.0], [1.0, 0.0, 5.0, 5.0], 2) == 1.0
    assert benchmark.agreement([0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], 2) == 0.25
    assert benchmark.agreement([0.0, 1.0], [1.0, 1.0], 2) is None


def test_totals_are_weighted_and_in_deviations():
    scale = {"helpful": (0.5, 0.5), "safety": (0.0, 2.0), "rule": (1.0, 1.0)}
    assert benchmark.total({"helpful": [1.0], "safety": [4.0], "rule": [0.0]}, scale) == [1.0 + 2 * 2.0 - 1.0]


def test_sums_have_no_part_in_the_rewards_of_requests_and_gold_pays_nothing():
    model = SimpleNamespace(score=lambda answers: [float(len(answer)) for answer in answers])
    scale = {"helpful": (0.0, 1.0), "safety": (0.0, 2.0), "rule": (0.0, 4.0)}  # weights 1, 1, 0.25
    judges = benchmark.Judges(dict.fromkeys(made_up.KINDS, model), scale, scale)
    asked = SimpleNamespace(example=FRUITS, text="(apple, pear.)", prompt_tokens=(1, 2), tokens=(3, 4), group=0)
    added = SimpleNamespace(example={"answer": "7"}, text="3+4=7: 7", prompt_tokens=(1,), tokens=(3,), group=1)
    scores = judges.rewards(sums=True).score([asked, added])
    assert scores.total == [4 * 2.25, 1.0]
    assert scores.parts["gold_helpful"] == [1.0, None]


def test_a_part_is_made_once(tmp_path):
    found = [once.once(tmp_path / "part.json", lambda number=number: {"number": number}) for number in range(2)]
    assert found[0] == found[1]
    assert found[0]["number"] == 0


def content(row):
    text = row["messages"][0]["content"]
    return text.removeprefix(next(asked for asked in made_up.ASKED if text.startswith(asked)) + " ")
