"""The benchmark of reward models: what is held out was not seen, rules need the prompt, and the baselines find what they are for."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dsv2.data.preference_rows import JudgedAnswers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
benchmark = importlib.import_module("reward_models")


def said(preference):
    return [answer.messages[-1]["content"] for answer in preference.answers]


def test_folds_share_no_prompt_and_hold_every_pair_once(tmp_path):
    pairs = list(benchmark.by_rules(400, 0))
    prompts = [pair.answers[0].prompt[0]["content"] for pair in pairs]
    assert len(set(prompts)) == 400
    parts = Counter(benchmark.part_of(pair, 0) for pair in pairs)
    assert len(parts) == benchmark.PARTS
    assert min(parts.values()) > 15
    train, held = (file.read_text().splitlines() for file in benchmark.write_fold(pairs, 3, tmp_path, 0))
    assert len(held) == parts[3]
    assert len(train) == 400 - parts[3]


def test_the_answers_alone_do_not_decide_three_of_the_rules():
    for rule in ("language", "case"):
        first = Counter(said(pair)[0].isascii() if rule == "language" else said(pair)[0].isupper() for pair in by(rule))
        assert min(first.values()) > 30, "either kind of answer is the chosen one about as often"
    assert min(Counter("will not help" in said(pair)[0] for pair in by("safety")).values()) > 30


def test_a_tenth_of_the_noisy_pairs_is_the_wrong_way_round():
    right, noisy = (list(benchmark.by_rules(1000, 0, noise)) for noise in (0.0, benchmark.NOISE))
    rude = ("What a silly", "Go away", "Not again")
    turned = [said(pair)[0].startswith(rude) for pair in noisy if pair.domain == "manners"]
    assert np.mean(turned) == pytest.approx(0.1, abs=0.05)
    assert not any(said(pair)[0].startswith(rude) for pair in right)


def test_baselines_find_length_and_words():
    rng = np.random.default_rng(0)

    def judged(number):
        answers = JudgedAnswers()
        for _ in range(number):
            for length, word in ((5, 7), (9, 8)):  # the shorter one, with the token 7, is the chosen one
                answers.tokens.append(np.append(rng.integers(10, 20, size=length), word))
                answers.learn.append(np.ones(length + 1, dtype=bool))
        return answers

    assert benchmark.length_accuracy(judged(20), [judged(10), judged(10)]) == 1.0
    assert benchmark.words_accuracy(judged(20), [judged(10)], 20) == 1.0
    assert benchmark.accuracy_of([1.0, 0.0, -2.0, 3.0]) == 0.625


def by(rule):
    return [pair for pair in benchmark.by_rules(1000, 0) if pair.domain == rule]
