"""The corpus that ships with dsv2: readable, licensed, and validation is really held out."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv2.assets import DOMAINS, SPLITS, corpus_path
from dsv2.errors import ConfigError

Row = dict[str, str]


def read(split: str, domain: str) -> list[Row]:
    with gzip.open(corpus_path(split) / f"{domain}.jsonl.gz", "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]


def rows() -> Iterator[tuple[str, Row]]:
    for split in SPLITS:
        for domain in DOMAINS:
            yield from ((split, row) for row in read(split, domain))


def windows(text: str, domain: str) -> set[tuple[str, ...]]:
    """All runs of 13 words; Chinese has no blanks between words: runs of 20 characters."""
    units: list[str] = list(re.sub(r"\s", "", text)) if domain == "zh" else text.split()
    length = 20 if domain == "zh" else 13
    return {tuple(units[i : i + length]) for i in range(len(units) - length + 1)}


def test_every_row_has_clean_text_and_belongs_to_its_file() -> None:
    for split in SPLITS:
        assert {file.name for file in corpus_path(split).iterdir()} == {f"{domain}.jsonl.gz" for domain in DOMAINS}
        for domain in DOMAINS:
            for row in read(split, domain):
                assert row["domain"] == domain
                assert row["text"].strip()
                assert not re.search(r"[\ufeff\u2060\u200a\u200b\u00a0\r\ufffd]|[ \t]\n|\n{4}", row["text"]), row["source"]


def test_sizes_are_those_the_tour_is_tuned_for() -> None:
    size = {(split, domain): sum(len(row["text"].encode()) for row in read(split, domain)) for split in SPLITS for domain in DOMAINS}
    assert 2_200_000 < size["train", "en"] < 2_800_000
    assert 50_000 < size["validation", "en"] < 70_000
    for domain, wanted in {"zh": 700_000, "code": 500_000, "math": 300_000}.items():
        assert wanted * 0.9 < size["train", domain] < wanted * 1.1
        assert 25_000 < size["validation", domain] < 35_000
    assert sum(file.stat().st_size for split in SPLITS for file in corpus_path(split).iterdir()) < 2_500_000
    docs = sum(len(row["text"].encode()) for row in read("train", "en") if row["source"] == "python_docs")
    assert docs < 0.1 * size["train", "en"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_validation_shares_no_document_and_few_runs_of_words_with_train(domain: str) -> None:
    train, validation = read("train", domain), read("validation", domain)
    texts = [row["text"] for row in train + validation]
    assert len(set(texts)) == len(texts)
    held_out = set().union(*(windows(row["text"], domain) for row in validation))
    seen = set().union(*(windows(row["text"], domain) & held_out for row in train))
    assert len(seen) < 0.02 * len(held_out)


def test_english_validation_comes_from_the_books_that_train_holds() -> None:
    def books(split: str) -> set[str]:
        return {row["title"].split(":")[0] for row in read(split, "en") if row["source"] == "books_en"}

    assert books("train") == books("validation")
    assert len(books("train")) == 3


def test_every_source_and_book_is_named_in_the_licences() -> None:
    licences = (Path(corpus_path("train")).parent.parent / "LICENSES.md").read_text(encoding="utf8")
    for _, row in rows():
        assert f"| `{row['source']}` | {row['domain']} |" in licences
        if row["source"] == "books_en":
            assert f"*{row['title'].split(':')[0]}*" in licences
    counts = {
        source: sum(row["source"] == source for _, row in rows()) for source in ("python_docs", "laws_zh", "cpython_stdlib", "open_logic")
    }
    for source, count in counts.items():
        assert re.search(rf"\| `{source}` \| \w+ \| {count} ", licences), f"{source}: the table does not say {count}"


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="no split 'test'"):
        corpus_path("test")
