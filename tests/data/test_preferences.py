"""Judged answers from files: the forms that are read, what is refused and why, what filters drop, and how answers lie in rows."""

import json

import numpy as np
import pytest

from dsv2.data.packing import IGNORE
from dsv2.data.preference_filters import filtered, in_proportion
from dsv2.data.preference_rows import PADDING, PreferenceRows, render_preferences
from dsv2.data.preferences import read_preferences
from dsv2.data.rows import ReadingReport
from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.train import train_tokenizer

USER = {"role": "user", "content": "hello"}


def turn(text):
    return {"role": "assistant", "content": text}


def read(tmp_path, *rows):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadingReport("preferences")
    return list(read_preferences([tmp_path / "p.jsonl"], report)), report


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello yes no maybe later never"] * 9, vocab_size=384)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "hello", "chosen": [turn("yes")], "rejected": [turn("no")]},
        {"chosen": [USER, turn("yes")], "rejected": [USER, turn("no")]},
        {"prompt": [USER], "chosen": [USER, turn("yes")], "rejected": [USER, turn("no")]},
        {"messages": [USER], "chosen": turn("yes"), "rejected": turn("no")},
    ],
)
def test_pairs_are_read_in_every_form(tmp_path, row):
    ((preference,), report) = read(tmp_path, row)
    assert [(list(a.prompt), list(a.messages)) for a in preference.answers] == [([USER], [turn("yes")]), ([USER], [turn("no")])]
    assert preference.is_pair
    assert report.read == {"pair": 1}


def test_single_answers_are_read_with_label_or_score(tmp_path):
    found, report = read(
        tmp_path,
        {"messages": [USER, turn("yes")], "label": True, "domain": "d"},
        {"prompt": "hello", "completion": "no", "label": 0},
        {"prompt": "hello", "completion": "maybe", "score": -1.5, "source": "s"},
    )
    assert [(p.answers[0].messages[0]["content"], p.score, p.domain) for p in found] == [
        ("yes", 1.0, "d"), ("no", 0.0, "p"), ("maybe", -1.5, "p"),
    ]  # fmt: skip
    assert report.read == {"label": 2, "score": 1}
    assert report.other_fields == {"source": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER], "chosen": "yes", "rejected": "yes"}, "chosen and rejected are equal"),
        ({"messages": [USER], "chosen": "yes", "rejected": " "}, "the assistant's turns are all empty"),
        ({"messages": [USER, turn("a"), USER], "chosen": "yes", "rejected": ""}, "an answer is empty"),
        ({"messages": [USER], "chosen": "yes"}, "no known form; its fields are chosen, messages"),
        ({"messages": [USER, turn("yes")], "label": 3}, "label is neither true (1) nor false (0)"),
        ({"messages": [USER, turn("yes")], "score": "good"}, "score is no finite number"),
        ({"messages": [], "chosen": "yes", "rejected": "no"}, "there is no prompt"),
        ({"messages": [USER], "label": 1}, "there is no prompt"),
        ({"messages": [USER], "chosen": "yes", "rejected": 5}, "rejected is of type int, neither text nor messages"),
        ({"messages": [USER], "chosen": [USER], "rejected": "no"}, "the answer does not end with a turn of the assistant"),
    ],
)
def test_what_is_no_judgement_is_refused_with_its_reason(tmp_path, row, reason):
    good = {"messages": [USER], "chosen": "yes", "rejected": "no"}
    found, report = read(tmp_path, good, row)
    assert len(found) == 1
    assert dict(report.refused) == {reason: 1}
    assert report.first_refused[reason].endswith(":2")


def test_a_file_without_any_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no preferences in .*: 1 rows refused: no known form; its fields are text"):
        read(tmp_path, {"text": "a"})


def test_filters_drop_repeats_contradictions_and_lengths(tmp_path):
    def pair(prompt, good, bad):
        return {"prompt": prompt, "chosen": good, "rejected": bad}

    found, _ = read(tmp_path, pair("a", "x", "y"), pair("a", "x", "y"), pair("b", "x", "y"), pair("b", "y", "x"), pair("c", "x" * 30, "y"))
    kept, dropped = filtered(found, max_length_ratio=5)
    assert [p.place[-1] for p in kept] == ["1"]
    assert sorted(dropped.values()) == [1, 1, 2]
    assert [p.place[-1] for p in filtered(found, drop_contradictions=False)[0]] == ["1", "3", "5"]


def test_sources_are_weighed_by_content(tmp_path):
    found, _ = read(
        tmp_path,
        *({"prompt": f"{d} {n}", "chosen": "x", "rejected": "y", "domain": d} for d in "ab" for n in range(200)),
    )
    weighed = in_proportion(found, {"a": 0.25, "b": 2})
    kept = [p.place for p in weighed if p.domain == "a"]
    assert 30 <= len(kept) <= 70
    assert sum(p.domain == "b" for p in weighed) == 400
    assert [p.place for p in in_proportion(found[:200], {"a": 0.25})] == kept
    with pytest.raises(ConfigError, match="names 'c'"):
        in_proportion(found, {"c": 1})


def test_answers_lie_side_by_side_and_only_their_own_tokens_are_labels(tmp_path, tokenizer):
    history = [USER, turn("maybe"), {"role": "user", "content": "later"}]
    found, _ = read(tmp_path, *({"messages": history, "chosen": f"yes {n}", "rejected": "no no no"} for n in range(4)))
    answers = render_preferences(found, tokenizer, template=None, seq_len=80, too_long="refuse", report=ReadingReport())
    rows = PreferenceRows(answers, 80, pad_id=tokenizer.eos_id)
    seen = []
    for index in range(len(rows)):
        row = rows.row(index)
        for number in dict.fromkeys(row.document_ids[row.document_ids != PADDING].tolist()):
            here = np.flatnonzero(row.document_ids == number)
            assert row.tokens[here].tolist() == answers.tokens[number].tolist()
            assert row.positions[here].tolist() == list(range(len(here)))
            labels = row.labels[here]
            assert tokenizer.decode(labels[labels != IGNORE][:-1].tolist()) == ("no no no" if number % 2 else f"yes {number // 2}")
            assert row.tokens[here[-1]] == tokenizer.eos_id
            seen.append(number)
        assert (row.labels[row.document_ids == PADDING] == IGNORE).all()
    assert sorted(seen) == list(range(8))
    assert all(second == first + 1 for first, second in zip(seen[::2], seen[1::2], strict=True)), "a pair stays together"


def test_a_long_conversation_is_refused_or_loses_its_beginning(tmp_path, tokenizer):
    found, _ = read(
        tmp_path,
        {"prompt": "hello " * 50, "chosen": "yes", "rejected": "no"},
        {"prompt": "hello", "chosen": "yes", "rejected": "no"},
    )
    report = ReadingReport("preferences")
    assert len(render_preferences(found, tokenizer, template=None, seq_len=48, too_long="refuse", report=report)) == 2
    assert dict(report.refused) == {"a conversation is longer than 24 tokens": 1}
    cut = render_preferences(found, tokenizer, template=None, seq_len=48, too_long="cut", report=ReadingReport())
    assert cut.cut == 2
    assert max(len(tokens) for tokens in cut.tokens[:2]) == 24
    assert cut.tokens[0][0] == tokenizer.bos_id
    assert cut.learn[0].sum() == cut.learn[2].sum()


def test_a_pair_that_is_cut_keeps_one_prompt(tmp_path, tokenizer):
    found, _ = read(
        tmp_path,
        {"prompt": "hello " * 20 + "maybe later", "chosen": "yes yes yes yes yes", "rejected": "no"},
        {"prompt": "hello " * 20, "chosen": "yes " * 30, "rejected": "no"},
    )
    report = ReadingReport("preferences")
    cut = render_preferences(found, tokenizer, template=None, seq_len=60, too_long="cut", report=report)
    prompts = [tokenizer.decode(tokens[~learn].tolist()) for tokens, learn in zip(cut.tokens, cut.learn, strict=True)]
    assert prompts[0] == prompts[1]
    assert prompts[0].endswith("hello maybe later")
    assert [max(map(len, cut.tokens)), cut.cut] == [30, 2]
    assert dict(report.refused) == {"an answer is longer than 15 tokens": 1}
