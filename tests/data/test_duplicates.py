import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.data.contamination import Benchmarks, benchmark_files, benchmark_grams, judge_contamination
from dsv2.data.duplicates import Index, digest, signature
from dsv2.data.reading import read
from dsv2.data.recipe import ContaminationRules, DuplicateRules
from dsv2.errors import DataError

RULES = DuplicateRules(exact=True, near=True)
WORDS = [f"{a}{b}{c}" for a in ("ba", "de", "fi", "go", "lu") for b in ("ra", "ni", "to", "ke") for c in ("n", "s", "m", "l", "t")]
HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光果珍李柰菜重芥姜"


def prose(seed, length=200, han=False):
    draw = random.Random(seed)
    return "".join(draw.choices(HAN, k=length)) if han else " ".join(draw.choices(WORDS, k=length))


def edited(text, seed, share, han=False):
    """Replace a share of the words."""
    draw = random.Random(seed)
    units = list(text) if han else text.split()
    for place in draw.sample(range(len(units)), int(share * len(units))):
        units[place] = draw.choice(HAN) if han else draw.choice(WORDS)
    return "".join(units) if han else " ".join(units)


def jaccard(one, two, words=5):
    grams = [{tuple(units[at : at + words]) for at in range(len(units) - words + 1)} for units in (one.split(), two.split())]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def decide(texts, rules=RULES):
    index = Index(rules)
    return [index.add(str(place), digest(text), signature(read(text), rules)) for place, text in enumerate(texts)]


def test_equal_but_for_blanks_and_unicode_form():
    assert digest("a  b\n\tcé ") == digest(" a b ce\u0301")
    assert len({digest(text) for text in ("a b", "ab", "A b", "a b.", "")}) == 5


def test_signatures_estimate_the_similarity():
    errors = []
    for seed in range(30):
        text = prose(seed, 300)
        other = edited(text, seed + 1000, share=seed / 300)
        one, two = signature(read(text), RULES), signature(read(other), RULES)
        errors.append(float((one == two).mean()) - jaccard(text, other))
    assert np.abs(errors).max() < 0.16  # three standard deviations of 100 hashes
    assert abs(np.mean(errors)) < 0.03


def test_the_first_of_the_sources_stays():
    one, two = prose(1), prose(2)
    drops = decide([one, two, edited(one, 3, 0.02), one, two + " and more", prose(4)])
    assert [drop and drop.rule for drop in drops] == [None, None, "duplicates.near", "duplicates.exact", "duplicates.near", None]
    assert drops[3].why == "equal to 0"
    assert drops[4].why.endswith("to 1; below 0.7 is allowed")


def test_short_texts_are_compared_for_equality_alone():
    assert signature(read("one two three"), RULES) is None
    assert [drop and drop.rule for drop in decide(["one two", "one three", "one  two"])] == [None, None, "duplicates.exact"]


def test_either_kind_can_be_off():
    text = prose(1)
    texts = [text, text, edited(text, 2, 0.02)]
    assert [bool(drop) for drop in decide(texts, DuplicateRules(exact=True))] == [False, True, False]
    assert [bool(drop) for drop in decide(texts, DuplicateRules(near=True))] == [False, True, True]
    assert [bool(drop) for drop in decide(texts, DuplicateRules())] == [False, False, False]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_what_stays_are_the_first_of_each(numbers):
    drops = decide([prose(number, 60) for number in numbers])
    seen = [number for number, drop in zip(numbers, drops, strict=True) if drop is None]
    assert seen == list(dict.fromkeys(numbers))


@pytest.mark.parametrize("han", [False, True], ids=["words", "han"])
def test_recall_and_precision_of_near_duplicates(han):
    originals = [prose(seed, 240, han) for seed in range(100)]
    near = [edited(text, seed, 0.02, han) for seed, text in enumerate(originals)]  # a similarity of about 0.82
    others = [edited(text, seed, 0.3, han) for seed, text in enumerate(originals)]  # of about 0.1
    drops = [drop is not None for drop in decide([*originals, *near, *others])]
    found, wrong = sum(drops[100:200]), sum(drops[:100]) + sum(drops[200:])
    print(f"near-duplicates: recall {found / 100:.2f}, precision {found / max(found + wrong, 1):.2f}")
    assert found >= 97
    assert wrong == 0


# Contamination ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(tmp_path, write_rows):
    (tmp_path / "bench" / "mc").mkdir(parents=True)
    write_rows(tmp_path / "bench" / "a.jsonl", [{"question": prose(1, 30), "choices": [prose(2, 13), "short"], "n": 3}])
    write_rows(tmp_path / "bench" / "mc" / "b.jsonl.gz", [{"deep": {"er": prose(3, 40, han=True)}}, {"half": "\ud800"}, [prose(4, 12)]])
    return tmp_path / "bench"


def judge(folder, text, rules=None):
    rules = rules or ContaminationRules()
    return judge_contamination(read(text), Benchmarks.of(benchmark_grams(benchmark_files(folder), rules).grams), rules)


def test_a_shared_run_is_found(benchmarks):
    question = prose(1, 30).split()
    assert judge(benchmarks, prose(9)) is None
    assert judge(benchmarks, f"{prose(9)} {' '.join(question[5:17])}") is None, "12 words"
    drop = judge(benchmarks, f"{prose(9)} {', '.join(question[5:18]).upper()} {prose(8)}")
    assert drop.rule == "contamination.run"
    assert drop.why == f"1 runs of a benchmark, the first: {', '.join(question[5:18]).upper()}"
    assert judge(benchmarks, prose(2, 13)) is not None
    assert judge(benchmarks, prose(4, 12) + " " + prose(9)) is None, "shorter than the run"


def test_texts_too_short_to_be_found_are_counted(benchmarks):
    hashed = benchmark_grams(benchmark_files(benchmarks), ContaminationRules())
    assert (hashed.num_texts, hashed.num_short) == (6, 3), "short, half a surrogate pair, and 12 words"
    hashed = benchmark_grams(benchmark_files(benchmarks), ContaminationRules(words=12))
    assert (hashed.num_texts, hashed.num_short) == (6, 2)


def test_chinese_needs_twenty_characters(benchmarks):
    run = prose(3, 40, han=True)
    assert judge(benchmarks, prose(9, han=True) + run[3:22]) is None
    assert judge(benchmarks, prose(9, han=True) + "，".join(run[3:23]) + prose(8, han=True)) is not None
    assert judge(benchmarks, run[3:18], ContaminationRules(ideographs=15)) is not None


def test_no_run_goes_from_one_benchmark_text_to_the_next(benchmarks):
    question, choice = prose(1, 30).split(), prose(2, 13).split()
    assert judge(benchmarks, " ".join([*question[-7:], *choice[:7]])) is None
    assert judge(benchmarks, " ".join([*choice[-7:], *question[:7]])) is None


def test_many_hashes_against_a_set():
    draw = np.random.default_rng(0)
    grams = np.unique(draw.integers(0, 2**63, 50_000).astype(np.uint64))
    asked = np.concatenate([grams[::7], draw.integers(0, 2**63, 50_000).astype(np.uint64), grams[:9] ^ np.uint64(1 << 60)])
    assert Benchmarks.of(grams).contain(asked).tolist() == np.isin(asked, grams).tolist()
    assert Benchmarks.of(grams[:0]).contain(asked).sum() == 0


def test_benchmarks_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no .jsonl file"):
        benchmark_files(tmp_path)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DataError, match="a.jsonl is damaged"):
        benchmark_grams(benchmark_files(tmp_path), ContaminationRules())
