import json
import re

import pytest
from tokenizer_samples import CORPUS, Published

from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.pretokenize import base_alphabet
from dsv2.tokenizer.specials import FLAGGED_SPECIAL, MARKERS
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import Compression, report, train_tokenizer


def test_ids_are_base_symbols_then_merges_then_markers(tokenizer: Tokenizer) -> None:
    document = json.loads(tokenizer._saved_json)
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    order = sorted(vocab, key=vocab.get)
    assert order[:243] == base_alphabet()
    assert order[243:] == ["".join(pair) for pair in merges]
    assert len(order) == 1024 - 18 == tokenizer.num_tokens - 18
    assert list(tokenizer.special_ids) == list(MARKERS)
    assert list(tokenizer.special_ids.values()) == list(range(1024 - 18, 1024))
    assert [entry["content"] for entry in document["added_tokens"] if entry["special"]] == [m for m in MARKERS if m in FLAGGED_SPECIAL]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1006, 1007, 1007)


def test_no_merge_holds_two_digits_or_a_newline_with_anything(tokenizer: Tokenizer) -> None:
    learnt = [tokenizer.token_bytes(i) for i in range(tokenizer.bos_id)]
    assert not [token for token in learnt if re.search(rb"\d", token) and len(token) > 1]
    assert not [token for token in learnt if re.search(rb"[\r\n]", token) and len(token) > 1]
    # and never a blank in front of Han
    assert not [token for token in learnt if token[:1] == b" " and len(token) > 1 and token[1] >= 0xE4]


def test_same_texts_give_the_same_file(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(CORPUS), vocab_size=1024).fingerprint == tokenizer.fingerprint


def test_a_small_corpus_leaves_ids_unused() -> None:
    small = train_tokenizer(["aaaa bbbb aaaa bbbb"], vocab_size=1024)
    assert small.vocab_size == 1024
    assert small.bos_id < 260 and small.num_tokens == small.bos_id + 18


@pytest.mark.parametrize("vocab_size", [0, 256, 1000, -128])
def test_vocab_size_is_a_multiple_of_128_that_holds_base_and_markers(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size = {vocab_size} is not a multiple of 128 from 384 up"):
        train_tokenizer(CORPUS, vocab_size=vocab_size)


def test_empty_or_broken_corpus_is_refused() -> None:
    for empty in ([], [""], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(empty, vocab_size=384)
    with pytest.raises(DataError, match=r"document 1 holds a lone surrogate U\+D800 at character 2"):
        train_tokenizer(["fine", "ab\ud800"], vocab_size=384)


def test_report_counts_bytes_per_token(tokenizer: Tokenizer) -> None:
    measured = report(tokenizer, ["12345", "\u4e2d"])
    assert (measured.num_texts, measured.num_bytes) == (2, 8)
    assert measured.bytes_per_token == 8 / len(tokenizer.encode("12345\u4e2d", add_bos=False))
    assert Compression(0, 0, 0).bytes_per_token == 0.0


def test_published_base_symbols_have_our_ids(tokenizer: Tokenizer, published: Published) -> None:
    theirs = published.document["model"]["vocab"]
    assert [theirs[symbol] for symbol in base_alphabet()] == list(range(243))
    names = [entry["content"] for entry in published.configs["deepseek-v2.5"]["added_tokens"]]
    flags = {entry["content"] for entry in published.configs["deepseek-v2.5"]["added_tokens"] if entry["special"]}
    assert (names, flags) == (list(MARKERS), set(FLAGGED_SPECIAL))
