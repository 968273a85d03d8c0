import tempfile
import tracemalloc
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.data.packing import IGNORE, Rows
from dsv2.errors import ConfigError, DataError

BIG_VOCAB = 1 << 20
EOS = 1  # of the fixture write_shards


@st.composite
def corpora(draw):
    """Documents in a few domains; every token of the corpus has an id of its own, so that it can be traced."""
    ids = count(2)
    lengths = draw(st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1))
    return {domain: [[next(ids) for _ in range(length)] for length in sizes] for domain, sizes in lengths.items()}


def naive_rows(documents, length):
    """The definition, token by token: (token, label, position, document id) of every place of every row."""
    stream = [(token, number, place) for number, ids in enumerate(documents) for place, token in enumerate(ids)]
    rows = []
    for begin in range(0, len(stream), length):
        row, seen = [], []
        for index in range(begin, begin + length):
            token, number, place = stream[index] if index < len(stream) else (EOS, "padding", index)
            following = stream[index + 1] if index + 1 < len(stream) else (None, None, None)
            label = following[0] if following[1] == number else IGNORE
            if number not in seen:
                seen.append(number)
                first = place
            row.append((token, label, place - first, len(seen) - 1))
        rows.append(row)
    return rows


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(1, 12), st.sampled_from([1, 7, 1000]))
def test_rows_are_the_chopped_stream(write_shards, corpus, seq_len, shard_tokens):
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "s", corpus, vocab_size=BIG_VOCAB, shard_tokens=shard_tokens)
        choices = {None: [ids for domain in sorted(corpus) for ids in corpus[domain]]} | corpus
        for domain, documents in choices.items():
            rows = Rows(shards, seq_len, domain)
            found = [rows.row(index) for index in range(len(rows))]
            expected = naive_rows(documents, seq_len)
            assert [list(zip(r.tokens, r.labels, r.positions, r.document_ids, strict=True)) for r in found] == expected

            labels = np.concatenate([row.labels for row in found])
            once = sorted(token for ids in documents for token in ids[1:])
            assert sorted(labels[labels != IGNORE]) == once  # every token but each document's first, exactly once
            assert {array.dtype for row in found for array in (row.tokens, row.labels, row.positions, row.document_ids)} == {
                np.dtype("int64")
            }


def test_the_example_of_the_docstring(tmp_path, write_shards):
    rows = Rows(write_shards(tmp_path / "s", {"en": [[0, 10, 11, EOS], [0, 12, 13, 14, EOS]]}), 4)
    assert [rows.row(index).tokens.tolist() for index in range(3)] == [[0, 10, 11, EOS], [0, 12, 13, 14], [EOS] * 4]
    assert [rows.row(index).labels.tolist() for index in range(3)] == [[10, 11, EOS, IGNORE], [12, 13, 14, EOS], [IGNORE] * 4]
    assert rows.row(2).positions.tolist() == [0, 0, 1, 2]
    assert rows.row(2).document_ids.tolist() == [0, 1, 1, 1]


def test_rows_run_on_across_domains(tmp_path, write_shards):
    shards = write_shards(tmp_path / "s", {"b": [[0, 20, 21, EOS]], "a": [[0, 10, EOS]]})
    row = Rows(shards, 5).row(0)
    assert row.tokens.tolist() == [0, 10, EOS, 0, 20]
    assert row.labels.tolist() == [10, EOS, IGNORE, 20, 21]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]
    assert row.document_ids.tolist() == [0, 0, 0, 1, 1]


def test_a_row_costs_the_same_however_large_the_corpus(tmp_path, write_shards):
    documents = np.tile(np.arange(1000), (2000, 1))  # 2 million tokens in 2000 documents
    rows = Rows(write_shards(tmp_path / "s", {"en": list(documents)}, vocab_size=1000), 128)
    rows.row(0)
    tracemalloc.start()
    row = rows.row(len(rows) // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.tokens.base.size == 129  # its own memory, not a view that keeps the file
    assert peak < 30_000


def test_what_cannot_be(tmp_path, write_shards):
    shards = write_shards(tmp_path / "s", {"en": [[0, 5, EOS]]})
    with pytest.raises(ConfigError, match="seq_len = 0"):
        Rows(shards, 0)
    with pytest.raises(DataError, match="has no domain 'zh'"):
        Rows(shards, 4, "zh")
    for index in (-1, 1):
        with pytest.raises(IndexError, match="of 1"):
            Rows(shards, 4).row(index)
