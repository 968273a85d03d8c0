"""The interpolated bigram against a slow one made of dictionaries."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.errors import DataError
from dsv2.train.bigram import InterpolatedBigram, bits_per_byte

BOS, EOS, VOCAB = 10, 11, 14

documents = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=6)


def stream(texts: list[list[int]]) -> np.ndarray:
    return np.array([token for text in texts for token in [BOS, *text, EOS]], dtype=np.uint16)


class Slow:
    """The formulas of the docstring, one dictionary look-up at a time."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.singles: Counter[int] = Counter()
        self.followers: dict[int, set[int]] = defaultdict(set)
        for text in texts:
            whole = [BOS, *text, EOS]
            for previous, current in zip(whole, whole[1:], strict=False):
                self.pairs[previous, current] += 1
                self.singles[current] += 1
                self.followers[previous].add(current)

    def probability(self, previous: int, current: int) -> float:
        types, total = len(self.singles), sum(self.singles.values())
        unigram = (self.singles[current] + types / VOCAB) / (total + types)
        after = len(self.followers[previous])
        seen = sum(count for (left, _), count in self.pairs.items() if left == previous)
        return unigram if seen == 0 else (self.pairs[previous, current] + after * unigram) / (seen + after)

    def nll(self, texts: list[list[int]]) -> float:
        return -sum(
            math.log(self.probability(previous, current))
            for text in texts
            for previous, current in zip([BOS, *text], [*text, EOS], strict=True)
        )


@settings(deadline=None, max_examples=60)
@given(train=documents, held_out=documents)
def test_it_equals_the_slow_version_on_any_text(train: list[list[int]], held_out: list[list[int]]) -> None:
    model = InterpolatedBigram.fit(stream(train), VOCAB, bos_id=BOS)
    assert model.nll(stream(held_out)) == pytest.approx(Slow(train).nll(held_out), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(train=documents)
def test_every_distribution_sums_to_one_and_gives_every_id_a_chance(train: list[list[int]]) -> None:
    model = InterpolatedBigram.fit(stream(train), VOCAB, bos_id=BOS)
    for previous in range(VOCAB):  # seen, never seen, and BOS
        distribution = model.distribution(previous)
        assert distribution.sum() == pytest.approx(1.0, abs=1e-12)
        assert (distribution > 0).all()


def test_a_document_is_not_predicted_from_the_one_before() -> None:
    model = InterpolatedBigram.fit(stream([[1, 2], [3]]), VOCAB, bos_id=BOS)
    both, apart = stream([[1, 2], [3]]), [stream([[1, 2]]), stream([[3]])]
    assert model.log_probabilities(both).size == both.size - 2
    assert model.nll(both) == pytest.approx(sum(model.nll(part) for part in apart))


def test_it_learns_what_follows() -> None:
    model = InterpolatedBigram.fit(stream([[1, 2] * 50]), VOCAB, bos_id=BOS)
    assert model.distribution(1)[2] > 0.9
    assert model.distribution(2)[1] > 0.9


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no token besides BOS"),
        ([BOS], "no token besides BOS"),
        ([1, 2], "not with BOS"),
        ([BOS, VOCAB], "do not fit a vocabulary of 14"),
    ],
)
def test_bad_streams_are_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        InterpolatedBigram.fit(np.array(tokens, dtype=np.int64), VOCAB, bos_id=BOS)


def test_bits_per_byte() -> None:
    assert bits_per_byte(16 * math.log(2), 4) == pytest.approx(4.0)
    with pytest.raises(DataError, match="0 bytes"):
        bits_per_byte(1.0, 0)
