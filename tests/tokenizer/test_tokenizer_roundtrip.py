import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_samples import steady

from dsv2.errors import DataError
from dsv2.tokenizer import tokenizer as module
from dsv2.tokenizer.specials import BOS, MARKERS
from dsv2.tokenizer.tokenizer import Tokenizer

# Text as users write it, with markers spelt out now and then.
TEXT = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=5))).map("".join))
IDS = st.lists(st.integers(0, 1023))


@steady
@given(text=TEXT)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.bos_id
    # No user text is ever a marker: neither the flagged ones nor FIM, roles and tools.
    assert not set(ids[1:]) & set(tokenizer.special_ids.values())


@steady
@given(texts=st.lists(TEXT), add_bos=st.booleans())
def test_batch_equals_one_by_one(tokenizer: Tokenizer, texts: list[str], add_bos: bool) -> None:
    assert tokenizer.encode_batch(texts, add_bos=add_bos) == [tokenizer.encode(text, add_bos=add_bos) for text in texts]


def test_a_large_batch_is_cut_and_loses_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 7)
    texts = ["abc", "", "a text that is longer", "x", "12345", "6", ""]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@steady
@given(ids=IDS, skip_special=st.booleans())
def test_stream_equals_decode_equals_bytes(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    markers = set(tokenizer.special_ids.values()) if skip_special else set()
    expected = b"".join(tokenizer.token_bytes(i) for i in ids if i not in markers).decode(errors="replace")
    stream = tokenizer.stream(skip_special=skip_special)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == expected
    assert tokenizer.decode(ids, skip_special=skip_special) == expected


@steady
@given(text=TEXT)
def test_stream_never_emits_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    seen = ""
    for token_id in tokenizer.encode(text):
        seen += stream.push(token_id)
        assert text.startswith(seen)
    assert seen == text and stream.finish() == ""


def test_stream_holds_back_a_cut_character(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode(chr(0x1F600), add_bos=False)
    stream = tokenizer.stream()
    assert stream.push(first) == "" and stream.finish() == "\ufffd"
    assert stream.finish() == ""  # afresh
    assert "".join(stream.push(i) for i in (first, *rest)) == chr(0x1F600)


@steady
@given(
    parts=st.lists(st.one_of(st.sampled_from(MARKERS), st.text(st.characters(blacklist_characters="<|>\uff5c", codec="utf-8"), max_size=5)))
)
def test_markers_are_parsed_on_request_only(tokenizer: Tokenizer, parts: list[str]) -> None:
    ids = tokenizer.encode("".join(parts), parse_special=True, add_bos=False)
    assert [i for i in ids if i in tokenizer.special_ids.values()] == [tokenizer.special_ids[part] for part in parts if part in MARKERS]
    assert tokenizer.decode(ids, skip_special=False) == "".join(parts)
    assert tokenizer.decode(ids) == "".join(part for part in parts if part not in MARKERS)


def test_bos_is_there_once(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("a").count(tokenizer.bos_id) == 1
    parsed = tokenizer.encode(f"{BOS}a", parse_special=True)
    assert parsed == tokenizer.encode("a")
    assert tokenizer.encode(f"{BOS}a", parse_special=False).count(tokenizer.bos_id) == 1
    assert tokenizer.encode_batch(["a", f"{BOS}a"])[0] == parsed


def test_ids_without_a_token_are_refused(tokenizer: Tokenizer) -> None:
    for token_id in (-1, 1024):
        with pytest.raises(DataError, match=rf"no token has id {token_id}: this tokenizer's ids are 0 to 1023"):
            tokenizer.decode([5, token_id])
        with pytest.raises(DataError, match="no token has id"):
            tokenizer.stream().push(token_id)


def test_lone_surrogates_are_refused_with_their_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"the text holds a lone surrogate U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(DataError, match=r"text 1 of the batch holds a lone surrogate U\+DE00 at character 0"):
        tokenizer.encode_batch(["fine", "\ude00"])
