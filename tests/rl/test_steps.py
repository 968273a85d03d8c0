"""Steps of an answer: which token completes each, whatever bytes the tokens hold, and what a step is worth."""

import re
from itertools import accumulate
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.rl.rollout import text_with_ends
from dsv2.rl.steps import Step, cut, model_steps, worked_steps
from dsv2.tasks.arithmetic import STEP_SEPARATOR, holds, problems, working
from dsv2.tokenizer.tokenizer import Tokenizer

SAID = "5+8=13, 数学 é🙂 4+7+1=12。 \n3+6+1=10: 1032"


def answer(text: str, **example: object) -> SimpleNamespace:
    """An answer of one token a character, and an end token."""
    num = len(text)
    return SimpleNamespace(
        prompt_tokens=(1, 2), tokens=tuple(range(num + 1)), text=text, text_ends=(*range(1, num + 1), num), example=example
    )


def scores(text: str, **example: object) -> list[float] | None:
    (found,) = worked_steps([answer(text, **example)])
    return None if found is None else [score for _, score in found]


def test_a_character_is_whole_behind_the_token_with_its_last_byte(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(SAID, add_bos=False)
    text, ends = text_with_ends(tokenizer, tokens)
    of_tokens = accumulate(len(tokenizer.token_bytes(token)) for token in tokens)
    of_characters = list(accumulate(len(character.encode()) for character in SAID))
    assert text == SAID
    assert list(ends) == [sum(end <= behind for end in of_characters) for behind in of_tokens]
    assert len(set(ends)) < len(ends), "some characters are spread over tokens"


@given(st.data())
def test_any_tokens_have_the_text_that_decoding_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Markers, bytes that are no UTF-8 and a character cut off at the end among them."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.num_tokens - 1), max_size=12))
    text, ends = text_with_ends(tokenizer, tokens)
    assert text == tokenizer.decode(tokens)
    for num, end in enumerate(ends, start=1):
        assert text.startswith(tokenizer.decode(tokens[:num])[:end])
    assert list(ends) == sorted(ends)


@pytest.mark.parametrize("separator", [",", "。", "=1", "1"])
def test_a_step_ends_with_the_token_that_completes_its_separator(tokenizer: Tokenizer, separator: str) -> None:
    tokens = [*tokenizer.encode(SAID, add_bos=False), tokenizer.eos_id]
    text, ends = text_with_ends(tokenizer, tokens[:-1])
    steps = cut(SimpleNamespace(tokens=tokens, text=text, text_ends=(*ends, len(text))), re.compile(separator))
    assert [step.text for step in steps] == SAID.split(separator)
    for number, step in enumerate(steps[:-1], start=1):
        first = min(num for num in range(1, len(tokens)) if tokenizer.decode(tokens[:num]).count(separator) == number)
        assert step.end == first - 1
    assert steps[-1].end == len(tokens) - 1, "the last step takes the end token along"


def test_blanks_are_no_steps_and_one_token_ends_one_step() -> None:
    line = re.compile("\n")
    assert cut(answer("a\n\n \nb\n \n"), line) == [Step(1, "a"), Step(9, "\n \nb")]
    assert cut(answer("a"), line) == [Step(1, "a")]
    assert cut(answer(" \n"), line) == [Step(2, " \n")] and cut(answer(""), line) == [Step(0, "")]
    wide = SimpleNamespace(tokens=(7, 8, 9), text="a,b,c,d", text_ends=(1, 4, 7))  # the second token completes two separators
    assert cut(wide, STEP_SEPARATOR) == [Step(1, "a,b"), Step(2, "c,d")]
    cut_off = SimpleNamespace(tokens=(7, 8), text="a,\ufffd", text_ends=(2, 2))  # half a character at the end
    assert cut(cut_off, STEP_SEPARATOR) == [Step(0, "a"), Step(1, "\ufffd")]


def test_right_steps_of_a_sum_are_worth_1() -> None:
    said = "5+8=13, 4+7+1=13, 12-7-1=4, so: 1032"
    assert scores(said, answer="1032") == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert scores(said, answer="1033") == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert scores("5+8=13, 4+7", answer="1032") == [1.0, 0.0], "cut off: no answer"
    assert scores(said) is None, "nobody knows the truth"
    assert worked_steps([answer("1+1=2: 2", answer="2")]) == [[(5, 1.0), (8, 1.0)]]


def test_the_workings_of_demonstrations_hold() -> None:
    for problem in problems(200, seed=1):
        said = f"{working(problem)}: {problem.answer}"
        assert scores(said, answer=problem.answer) == [1.0] * (len(str(problem.first)) + 1)
    assert not any(map(holds, ("13", "5+8=", "5+8=14", "5*8=40", "=13", "5+8=13=13", "5--8=13", "")))


def test_a_model_sees_prompt_and_answer_up_to_the_end_of_each_step() -> None:
    def score_steps(answers: list[list[int]], places: list[list[int]]) -> list[list[float]]:
        return [[float(sum(tokens[: place + 1])) for place in own] for tokens, own in zip(answers, places, strict=True)]

    found = model_steps(SimpleNamespace(score_steps=score_steps), ".", [answer("ab.c.d"), answer("")])
    assert found == [[(2, 3.0 + 0 + 1 + 2), (4, 3.0 + 10), (6, 3.0 + 21)], [(0, 3.0)]]
    assert model_steps(SimpleNamespace(score_steps=score_steps), ".*", [answer("ab.c")]) == [[(4, 3.0 + 10)]], "no pattern, a text"
