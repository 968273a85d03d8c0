"""Sums: right answers, splits that share no pair of numbers, demonstrations of which exactly the given share is wrong."""

import random
import re

import pytest

from dsv2.errors import ConfigError
from dsv2.tasks.arithmetic import Problem, demonstrations, exercises, final_number, holds, near_miss, problems, split_of, working


def test_answers_are_right_and_problems_repeat_with_their_seed():
    made = list(problems(600, seed=1))
    assert made == list(problems(600, seed=1)) != list(problems(600, seed=2))
    assert made != list(problems(600, seed=1, stream="demonstrations"))
    for problem in made:
        assert problem.answer == str(problem.first + problem.second if problem.sign == "+" else problem.first - problem.second)
        assert problem.question.index(str(problem.first)) <= problem.question.rindex(str(problem.second))
        assert 100 <= problem.first <= 999 and 100 <= problem.second <= 999 and int(problem.answer) >= 0
    assert 250 < sum(problem.sign == "+" for problem in made) < 350
    assert 100 < sum("？" in problem.question or "。" in problem.question for problem in made) < 200
    assert all(len(str(problem.second)) == 2 for problem in problems(20, seed=1, digits=2))


def test_no_pair_of_numbers_is_in_both_splits():
    pairs = {split: {frozenset((p.first, p.second)) for p in problems(2000, seed=3, split=split)} for split in ("train", "test")}
    assert not pairs["train"] & pairs["test"] and min(map(len, pairs.values())) > 1900
    assert split_of(123, 456) == split_of(456, 123)
    shares = sum(split_of(first, second) == "test" for first in range(100, 200) for second in range(100, 200)) / 10_000
    assert 0.08 < shares < 0.12


def test_exactly_the_given_share_of_demonstrations_is_wrong():
    for wrong in (0.0, 0.45, 1.0):
        made = list(demonstrations(400, seed=5, wrong=wrong))
        asked = problems(400, seed=5, stream="demonstrations")
        right = [final_number(message["content"]) == problem.answer for (_, message), problem in zip(made, asked, strict=True)]
        assert right.count(False) == round(400 * wrong)
    question, answer = made[0]
    assert question["role"] == "user" and answer["role"] == "assistant"
    assert made == list(demonstrations(400, seed=5, wrong=1.0))


def test_the_working_is_right_even_where_the_answer_is_not():
    assert working(Problem("", "1023", 345, "+", 678)) == "5+8=13, 4+7+1=12, 3+6+1=10"
    assert working(Problem("", "14", 52, "-", 38)) == "12-8=4, 5-3-1=1"
    for problem in problems(300, seed=9):
        steps = [step.split("=") for step in working(problem).split(", ")]
        assert all(eval(left) == int(right) for left, right in steps)
        assert "".join(right[-1] for _, right in reversed(steps)).lstrip("0") in (problem.answer, problem.answer[1:].lstrip("0"))
    (_, plain), (_, worked) = (next(demonstrations(1, seed=0, wrong=1.0, worked=worked)) for worked in (False, True))
    assert worked["content"].endswith(f": {plain['content']}")


def test_exercises_are_all_right_and_keep_to_their_split():
    texts = list(exercises(40, seed=2, split="test"))
    assert texts == list(exercises(40, seed=2, split="test")) and {text.count("\n") for text in texts} == {4}
    for line in "\n".join(texts).splitlines():
        asked, worked, answer = line.split(": ")
        first, second = map(int, re.findall("[0-9]+", asked))
        assert split_of(first, second) == "test" and int(answer) == eval(asked)
        assert all(holds(step) for step in worked.split(", "))


def test_a_near_miss_is_wrong_by_one_digit_or_one_carry():
    generator = random.Random(0)
    for problem in problems(500, seed=7):
        miss = near_miss(problem, generator)
        difference = abs(int(miss) - int(problem.answer))
        one_digit = len(miss) == len(problem.answer) and sum(a != b for a, b in zip(miss, problem.answer, strict=True)) == 1
        assert difference and (one_digit or difference in (10, 100, 1000)) and str(int(miss)) == miss


def test_forgotten_carries_are_those_of_the_columns():
    """57 + 68 = 125: the carry of the ones forgotten gives 115, that of the tens 25. 52 - 38 = 14: the borrow forgotten gives 24."""
    seen = {near_miss(Problem("", "125", 57, "+", 68), random.Random(seed)) for seed in range(200)}
    assert {"115", "25"} <= seen
    seen = {near_miss(Problem("", "14", 52, "-", 38), random.Random(seed)) for seed in range(200)}
    assert "24" in seen and "4" not in seen


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("1234", True),
        ("The answer is 1234.", True),
        ("500 + 734 = 1234", True),
        ("答案是1234。", True),
        ("1234 or 1235", False),
        ("1,234", False),
        ("1234.0", False),
        ("-1234", False),
        ("01234", False),
        ("", False),
        ("no idea", False),
    ],
)
def test_the_last_number_is_the_answer(text, correct):
    assert (final_number(text) == "1234") is correct


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match="digits = 0"):
        next(problems(1, seed=0, digits=0))
    with pytest.raises(ConfigError, match=r"wrong = 1\.5; a share is 0 to 1"):
        next(demonstrations(1, seed=0, wrong=1.5))
