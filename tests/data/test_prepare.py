import errno
import gzip
import json
import os
from itertools import islice
from pathlib import Path

import pytest

from dsv2.assets import corpus_path
from dsv2.data.documents import Document, read_documents
from dsv2.data.loader import Loader
from dsv2.data.packing import Rows
from dsv2.data.prepare import prepare, run, train_tokenizer_stage
from dsv2.data.shards import TokenShards, _OpenShard
from dsv2.errors import DataError
from dsv2.tokenizer.tokenizer import Tokenizer


def documents(*texts, domain="en"):
    return [Document(text, domain, "test", "whole file") for text in texts]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_document_is_stored_as_bos_text_eos(tmp_path, tokenizer):
    report = prepare([*documents("hé", "x"), *documents("y", domain="zh")], tokenizer, tmp_path / "s")
    shards = TokenShards.open(tmp_path / "s")
    assert next(shards.tokens("en")).tolist() == [256, *"hé".encode(), 257, 256, ord("x"), 257]
    assert shards.shards("en")[0].document_starts.tolist() == [0, 5, 8]
    shards.expect_tokenizer(tokenizer.fingerprint)
    counts = {c.domain: (c.num_documents, c.num_tokens, c.num_bytes, c.bytes_per_token) for c in report.domains}
    assert counts == {"en": (2, 8, 4, 1.0), "zh": (1, 3, 1, 1.0)}
    assert report.num_tokens == shards.num_tokens() == 11


def test_the_report_counts_what_was_left_out(tmp_path, tokenizer, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b'{"text": " "}\n{"text": "bad \xff"}\n{"text": "", "domain": "only blank"}\n')
    (tmp_path / "in" / "b.png").write_bytes(b"")
    stream = read_documents([tmp_path / "in"], invalid_utf8="replace")
    report = prepare(stream, tokenizer, tmp_path / "s")
    assert [(c.domain, c.num_documents, c.num_skipped, c.num_replaced) for c in report.domains] == [
        ("in", 1, 1, 1), ("only blank", 0, 1, 0)]  # fmt: skip
    assert report.ignored_files == 1
    capsys.readouterr()
    report.table()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "only blank" in shown.err
    assert "files of other kinds ignored: 1" in " ".join(shown.err.split())


def test_the_same_input_gives_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    corpus = documents(*(f"document {number}" * number for number in range(1, 40)))
    prepare(corpus, tokenizer, tmp_path / "a", shard_tokens=500)
    monkeypatch.setattr("dsv2.data.prepare.BATCH_CHARACTERS", 100)  # how documents are batched is not seen in the result
    prepare(iter(corpus), tokenizer, tmp_path / "b", shard_tokens=500)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 5


# Nothing half-written -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["tokens", "index", "last"])
def test_a_full_disk_leaves_nothing_new(tmp_path, tokenizer, monkeypatch, when):
    prepare(documents("older"), tokenizer, tmp_path / "s")
    before = contents(tmp_path / "s")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    holder, name = {"tokens": (_OpenShard, "append"), "index": (Path, "write_bytes"), "last": (os, "fsync")}[when]
    monkeypatch.setattr(holder, name, full)
    with pytest.raises(DataError, match=f"the disk is full: could not write {tmp_path / 's'}"):
        prepare(documents("newer", "text"), tokenizer, tmp_path / "s")
    monkeypatch.undo()
    assert contents(tmp_path / "s") == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("damage", ["line", "gz", "junk", "interrupt"])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, tokenizer, damage):
    good = tmp_path / "a.jsonl"
    good.write_text(json.dumps({"text": "good " * 1000}) + "\n")
    bad = tmp_path / {"line": "b.jsonl", "gz": "b.jsonl.gz", "junk": "b.txt", "interrupt": "b.txt"}[damage]
    data = {"line": b'{"text": ', "gz": gzip.compress(b'{"text": "x"}')[:-4], "junk": b"a\0", "interrupt": b"x"}[damage]
    bad.write_bytes(data)

    def stream():
        yield from read_documents([good, bad])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if damage == "interrupt" else DataError):
        prepare(stream(), tokenizer, tmp_path / "s")
    assert {path.name for path in tmp_path.iterdir()} == {good.name, bad.name}


def test_an_empty_corpus(tmp_path, tokenizer):
    with pytest.raises(DataError, match="empty corpus"):
        prepare([], tokenizer, tmp_path / "s")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no document in"):
        prepare(read_documents([tmp_path / "in"]), tokenizer, tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# With the real tokenizer ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few hundred kB of the shipped validation text, in four domains."""
    path = tmp_path_factory.mktemp("corpus") / "some.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(corpus_path("validation").iterdir()):
            for document in islice(read_documents([source]), 4):
                file.write(json.dumps({"text": document.text[:20_000], "domain": document.domain}) + "\n")
    return path


def test_text_to_tokenizer_to_shards_to_batches_and_back(tmp_path, corpus, capsys):
    trained = train_tokenizer_stage([corpus], out=tmp_path / "tokenizer", vocab_size=1024)
    assert {domain for domain, _ in trained.domains} == {"en", "zh", "code", "math"}
    assert all(compression.bytes_per_token > 1.2 for _, compression in trained.domains)

    report = run([corpus], tokenizer=tmp_path / "tokenizer", out=tmp_path / "shards", shard_tokens=5000)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    shards = TokenShards.open(tmp_path / "shards")
    shards.expect_tokenizer(tokenizer.fingerprint)
    measured = {domain: compression.bytes_per_token for domain, compression in trained.domains}
    assert {counts.domain: counts.bytes_per_token for counts in report.domains} == pytest.approx(measured)

    for domain in shards.domains:
        texts = [document.text for document in read_documents([corpus]) if document.domain == domain]
        pieces = [
            shard.tokens[start:end].tolist()
            for shard in shards.shards(domain)
            for start, end in zip(shard.document_starts[:-1], shard.document_starts[1:], strict=True)
        ]
        assert [tokenizer.decode(ids) for ids in pieces] == texts
        assert {(ids[0], ids[-1]) for ids in pieces} == {(tokenizer.bos_id, tokenizer.eos_id)}
        assert shards.num_bytes(domain) == sum(len(text.encode()) for text in texts)

    batch = Loader(Rows(shards, 64), seed=0).batch(0, 8)
    assert batch.tokens.shape == (8, 64)
    assert int(batch.tokens.max()) < tokenizer.num_tokens
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "bytes/token" in shown.err


def test_training_a_tokenizer_on_damaged_text_says_where_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=f"{path}:2: "):
        train_tokenizer_stage([path], out=tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_of_other_things_is_not_replaced_by_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="holds other things: a.txt"):
        train_tokenizer_stage([tmp_path / "a.txt"], out=tmp_path)
    assert (tmp_path / "a.txt").exists()
