"""Drafts: what is proposed, how many, and that the answer is the same with and without them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv2.engine import speculate
from dsv2.engine.request import SamplingParams
from dsv2.engine.sampler import SamplerState, sample
from dsv2.engine.speculate import DraftLength, PromptLookup

VOCAB = 40


def proposal(tokens: list[int], most: int, max_ngram: int, min_ngram: int) -> list[int]:
    """By definition: look back for the longest n-gram that ends the text, and go on from its latest earlier occurrence."""
    for length in range(max_ngram, min_ngram - 1, -1):
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == tokens[len(tokens) - length :]:
                text = list(tokens)
                for place in range(begin + length, begin + length + most):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 9), st.integers(0, 40), st.sampled_from([(4, 2), (3, 1), (1, 1)]))
@example([1, 2, 1, 2, 1, 2], 7, 3, (4, 2))
def test_what_followed_the_latest_occurrence_is_proposed(tokens: list[int], most: int, cut: int, ngrams: tuple[int, int]) -> None:
    lookup = PromptLookup(tokens[:cut], max_ngram=ngrams[0], min_ngram=ngrams[1])
    for token in tokens[cut:]:
        lookup.extend((token,))
    assert lookup.propose(most) == proposal(tokens, most, *ngrams)


def test_large_ids_do_not_run_into_each_other() -> None:
    lookup = PromptLookup([2**31 - 1, 0, 5, 2**31 - 1, 1, 0, 2**31 - 1])
    assert lookup.propose(3) == []
    lookup.extend((0,))
    assert lookup.propose(3) == [5, 2**31 - 1, 1]
    with pytest.raises(ValueError, match="2 to 1"):
        PromptLookup(max_ngram=1, min_ngram=2)


def model_row(tokens: list[int], reads: int) -> np.ndarray:
    """Logits that depend on the last few tokens, as a model's would on all."""
    return np.random.default_rng(tokens[-reads:]).standard_normal(VOCAB).astype(np.float32) * 3


def generate(
    params: SamplingParams, prompt: list[int], draft: Callable[[list[int]], list[int]], reads: int = 3
) -> tuple[list[int], list[Any], int]:
    """Return the answer, its log-probabilities and the number of steps."""
    state = SamplerState(params, prompt, seed=params.seed or 0, end_ids=(1,))
    tokens, logprobs, steps = list(prompt), [], 0
    while len(tokens) < len(prompt) + params.max_tokens and not (len(tokens) > len(prompt) and tokens[-1] == 1):
        proposed = draft(tokens)
        rows = np.stack([model_row(tokens + proposed[:i], reads) for i in range(len(proposed) + 1)])
        (drawn,) = sample(rows, [state], num_tokens=VOCAB, drafts=[proposed])
        assert drawn.error is None and drawn.tokens
        tokens += drawn.tokens
        logprobs += drawn.logprobs or ()
        steps += 1
        assert state.num_drawn == len(tokens) - len(prompt)
    return tokens[len(prompt) : len(prompt) + params.max_tokens], logprobs[: params.max_tokens], steps


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000),
    st.sampled_from(
        [{"temperature": 0}, {"temperature": 0.3}, {"temperature": 0.8, "top_p": 0.9, "min_tokens": 9}, {"frequency_penalty": 0.7}]
    ),
    st.data(),
)
def test_the_answer_does_not_depend_on_drafts(seed: int, fields: dict[str, Any], data: st.DataObject) -> None:
    params = SamplingParams(seed=seed, max_tokens=40, logprobs=2, repetition_penalty=1.1 if seed % 2 else 1.0, **fields)
    prompt = [seed % VOCAB, 7, 8, 9]
    plain, plain_logprobs, _ = generate(params, prompt, lambda _: [])

    def drafted(tokens: list[int]) -> list[int]:
        ahead = (prompt + plain)[len(tokens) : len(tokens) + data.draw(st.integers(0, 5))]
        return ahead + data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=2))

    answer, logprobs, _ = generate(params, prompt, drafted)
    assert answer == plain and logprobs == plain_logprobs


def test_prompt_lookup_saves_steps_where_the_text_repeats_itself() -> None:
    params = SamplingParams(temperature=0, max_tokens=120, logit_bias={1: -100})
    lookup = PromptLookup([3, 7, 8, 9])
    fed = 4

    def drafted(tokens: list[int]) -> list[int]:
        nonlocal fed
        lookup.extend(tokens[fed:])
        fed = len(tokens)
        return lookup.propose(6)

    plain, _, steps = generate(params, [3, 7, 8, 9], lambda _: [], reads=1)
    answer, _, fewer = generate(params, [3, 7, 8, 9], drafted, reads=1)
    assert answer == plain and steps == 120 and fewer < 60


def play(accepts: Callable[[int], float], costs: list[float], steps: int, seed: int = 0) -> tuple[float, list[int], DraftLength]:
    """Return tokens per cost compared with plain decoding, and the lengths drafted, when a draft token is right with a probability."""
    length, rng = DraftLength(), np.random.default_rng(seed)
    tokens, cost, drafted = 0, 0.0, []
    for step in range(steps):
        chosen = length.choose(costs)
        right = rng.random(chosen) < accepts(step)
        accepted = int(np.argmin(right)) if not right.all() else chosen
        tokens, cost = tokens + 1 + accepted, cost + costs[chosen]
        drafted.append(chosen)
        if chosen:
            length.record(chosen, accepted)
    return tokens / cost * costs[0], drafted, length


CHEAP = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
STEEP = [1.0, 1.7, 2.4, 3.0, 3.6, 4.2, 4.8]  # each token brings its own experts


def test_drafts_that_lose_are_switched_off_and_tried_again() -> None:
    gain, drafted, _ = play(lambda _: 0.0, CHEAP, 3000)
    tries = [step for step, chosen in enumerate(drafted) if chosen]
    assert gain > 0.98 and tries[-1] > 2000
    gaps = np.diff(tries[3:])
    assert all(later >= earlier for earlier, later in zip(gaps, gaps[1:], strict=False)) and gaps.max() <= speculate.LAST_PAUSE + 1


def test_drafts_that_win_are_long_where_that_pays() -> None:
    gain, drafted, length = play(lambda _: 0.9, CHEAP, 1000)
    assert gain > 2 and np.mean(drafted) > 5 and length.acceptance > 0.8
    gain, drafted, _ = play(lambda _: 0.9, STEEP, 1000)
    assert gain > 0.99 and np.mean(drafted) < 3


def test_a_text_that_turns_repetitive_is_noticed() -> None:
    _, drafted, _ = play(lambda step: 0.0 if step < 300 else 0.95, CHEAP, 1500)
    assert np.mean(drafted[:300]) < 0.5 and np.mean(drafted[-300:]) > 5


@given(st.lists(st.floats(0.01, 100), max_size=9), st.lists(st.booleans(), max_size=60))
def test_a_length_is_within_the_costs_and_repeats_itself(costs: list[float], accepted: list[bool]) -> None:
    one, other = DraftLength(), DraftLength()
    for right in accepted:
        chosen = one.choose(costs)
        assert chosen == other.choose(costs) and 0 <= chosen < max(1, len(costs))
        if chosen:
            one.record(chosen, chosen if right else 0)
            other.record(chosen, chosen if right else 0)
            assert 0 < one.acceptance < 1
