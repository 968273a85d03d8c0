from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.config import load_recipe
from dsv2.data.loader import Loader
from dsv2.data.mixture import BLOCK, Mixture, MixtureRules
from dsv2.errors import ConfigError

SEQ_LEN = 4
DOMAINS = {"code": 30, "en": 50, "zh": 7}  # rows of each


@pytest.fixture(scope="module")
def shards(write_shards, tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("mixed") / "s", {domain: [[5] * SEQ_LEN * rows] for domain, rows in DOMAINS.items()})


def rules(*stages, **max_epochs):
    return MixtureRules.model_validate({"stages": stages, "max_epochs": max_epochs})


def mixture(shards, *stages, seed=0, **max_epochs):
    return Mixture(shards, SEQ_LEN, rules(*stages, **max_epochs), seed=seed)


def domains_of(mixed, first, count):
    edges = np.cumsum(list(DOMAINS.values()))
    return [list(DOMAINS)[number] for number in np.searchsorted(edges, mixed.indices(first, count), side="right")]


def test_every_block_holds_the_weights(shards):
    mixed = mixture(shards, {"weights": {"code": 6, "en": 3, "zh": 1}})
    for block in (0, 1, 77):
        assert Counter(domains_of(mixed, block * BLOCK, BLOCK)) == {"code": 600, "en": 300, "zh": 100}
    first = domains_of(mixed, 0, BLOCK)
    assert first != domains_of(mixed, BLOCK, BLOCK)
    assert 30 < Counter(first[:100])["code"] < 90, "mixed well within a block"


def test_a_domain_is_read_whole_before_it_is_read_again(shards):
    mixed = mixture(shards, {"weights": {"code": 1, "en": 1, "zh": 1}})
    read = mixed.indices(0, 3000)
    for low, high in ((0, 30), (30, 80), (80, 87)):
        mine = [index for index in read.tolist() if low <= index < high]
        for at in range(0, len(mine) - (high - low), high - low):
            assert sorted(mine[at : at + high - low]) == list(range(low, high))
    assert mixed.epochs(3000)["en"] == pytest.approx(20, abs=0.1)


def test_the_curriculum_changes_by_tokens(shards):
    mixed = mixture(shards, {"tokens": 1500 * SEQ_LEN, "weights": {"en": 1}}, {"weights": {"zh": 1, "code": 3}})
    assert set(domains_of(mixed, 0, 2 * BLOCK)) == {"en"}, "1500 samples are rounded up to 2000"
    assert [mixed.stage(sample) for sample in (0, 2 * BLOCK - 1, 2 * BLOCK, 9 * BLOCK)] == [0, 0, 1, 1]
    assert Counter(domains_of(mixed, 2 * BLOCK, 10 * BLOCK)) == {"zh": 2500, "code": 7500}
    assert mixed.epochs(3 * BLOCK) == {"en": 40.0, "zh": pytest.approx(250 / 7), "code": 25.0}


@settings(max_examples=30)
@given(first=st.integers(0, 10_000), counts=st.lists(st.integers(1, 900), min_size=1, max_size=4), seed=st.integers(0, 2**64 - 1))
def test_the_number_of_a_sample_is_the_whole_state(shards, first, counts, seed):
    mixed = mixture(shards, {"tokens": 5000, "weights": {"en": 1, "zh": 0.01}}, {"weights": {"code": 1, "zh": 1}}, seed=seed)
    parts, at = [], first
    for count in counts:
        parts.append(mixed.indices(at, count))
        at += count
    assert np.concatenate(parts).tolist() == mixed.indices(first, sum(counts)).tolist()
    read = np.bincount(np.searchsorted(np.cumsum(list(DOMAINS.values())), mixed.indices(0, first), side="right"), minlength=3)
    assert list(mixed.epochs(first).values()) == pytest.approx([count / rows for count, rows in zip(read, DOMAINS.values(), strict=True)])


def test_the_loader_reads_it_at_any_world_size(shards):
    mixed = mixture(shards, {"weights": {"code": 1, "zh": 1}})
    alone = Loader(mixed, seed=3).batch(10, 8)
    ranks = [Loader(mixed, seed=3, rank=rank, world_size=4).batch(10, 8) for rank in range(4)]
    assert [row for rank in ranks for row in rank.tokens.tolist()] == alone.tokens.tolist()
    assert alone.tokens.shape == (8, SEQ_LEN)
    assert mixed.row(86).tokens.tolist() == [5] * SEQ_LEN
    with pytest.raises(IndexError):
        mixed.row(87)


def test_weights_are_rounded_but_nothing_is_lost(shards):
    mixed = mixture(shards, {"weights": {"code": 1, "en": 1, "zh": 1e-9}})
    assert Counter(domains_of(mixed, 0, BLOCK))["zh"] == 1
    assert sum(mixture(shards, {"weights": {"code": 1, "en": 1, "zh": 1}})._quotas[0]) == BLOCK


def test_epochs_give_the_weights_and_the_length(shards):
    mixed = mixture(shards, {"epochs": {"en": 12, "code": 80}}, {"epochs": {"zh": 143}}, {"epochs": {"code": 1}})
    assert Counter(domains_of(mixed, 0, BLOCK)) == {"en": 200, "code": 800}, "12 x 50 rows and 80 x 30 rows, in all 3000"
    assert mixed.epochs(3 * BLOCK) == {"code": 80, "en": 12, "zh": 0}
    assert [mixed.stage(n * BLOCK) for n in range(7)] == [0, 0, 0, 1, 1, 2, 2], "143 x 7 samples are rounded up to 2000"
    assert mixed.epochs(9 * BLOCK)["code"] == pytest.approx(80 + 4000 / 30), "the last stage lasts to the end"
    timed = mixture(shards, {"epochs": {"en": 12, "code": 80}, "tokens": 9000 * SEQ_LEN}, {"weights": {"zh": 1}})
    assert timed.epochs(9 * BLOCK) == {"code": 240, "en": 36, "zh": 0}
    assert timed.stage(9 * BLOCK) == 1


@pytest.mark.parametrize(
    ("stages", "says"),
    [([{"weights": {"fr": 1}}], "no domain 'fr'"), ([{"weights": {"en": 0}}], "weights = .* at least one must be above 0"),
     ([{"epochs": {"en": 0}}], "epochs = .* at least one must be above 0")],
)  # fmt: skip
def test_what_does_not_fit_the_shards_is_refused(shards, stages, says):
    with pytest.raises(ConfigError, match=says):
        mixture(shards, *stages)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            "stages = [{weights = {en = 1}}, {weights = {zh = 1}}]",
            "stages.0 has weights and no tokens; only the last",
        ),
        ("stages = [{tokens = 5, weights = {en = 1}}]", r"stages.0.tokens = 5; the last stage lasts to the end: leave its tokens out"),
        ("stages = [{epochs = {en = 1}}, {tokens = 7, epochs = {zh = 1}}]", "stages.1.tokens = 7; the last stage lasts to the end"),
        ("stages = []", "stages is empty; at least one stage is needed"),
        ("max_epochs = {zh = 4}", "the key 'stages' is missing"),
        ("stages = [{weights = {en = 1}, epochs = {en = 1}}]", "stages.0: both of weights and epochs"),
        ("stages = [{tokens = 5}]", "stages.0: neither of weights and epochs"),
    ],
)
def test_wrong_rules_are_refused_with_the_recipe(tmp_path, recipe, says):
    (tmp_path / "recipe.toml").write_text(recipe)
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(tmp_path / "recipe.toml"), MixtureRules, folder="pretrain")


def test_too_many_epochs_are_refused(shards):
    mixed = mixture(shards, {"weights": {"en": 9, "zh": 1}}, zh=4)
    assert mixed.epochs(200)["zh"] < 4
    with pytest.raises(ConfigError, match=r"zh would be read 14.29 times; at most 4"):
        mixed.epochs(1000)
