import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_samples import Published, steady
from tokenizers import Tokenizer as LibraryTokenizer

from dsv2.errors import DataError
from dsv2.tokenizer.pretokenize import CASED_LETTERS, base_alphabet, byte_characters, code_points, deepseek_pre_tokenizer, require_unicode

# Section 4.4: taken out of Lu, Ll and Lt of Unicode 14.
LEFT_OUT = (
    "0560-0588 10C7 10CD 10D0-10FA 10FD-10FF 1C80-1C88 2D00-2D25 2D27 2D2D A790-A7CA A7D0-A7D1 A7D3 A7D5-A7D9 A7F5-A7F6 A7FA "
    "AB30-AB5A AB60-AB68 10570-105BC 16E40-16E7F 1D400-1D7CB 1DF00-1DF1E"
)
PRE_TOKENIZER = deepseek_pre_tokenizer()
TRICKY = st.text(
    st.sampled_from(
        " \t\r\n\u00a0\u3000\u2028abZ\u00e9\u03a9\u0436\u0561\U0001d400019\u0661\u00bd\u2460,.;(}~"
        "\u2019\uff0c\u3002\u4e2d\u3042\uac00\u0e01\u05d0\u0301"
    )
)
CHARACTERS = byte_characters()
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def pieces(text: str) -> list[str]:
    return [bytes(BYTES[c] for c in piece).decode() for piece, _ in PRE_TOKENIZER.pre_tokenize_str(text)]


def test_cased_letters_are_those_of_the_specification() -> None:
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("this Python's unicodedata is not Unicode 14")
    cased = {c for c in range(0x110000) if unicodedata.category(chr(c)) in ("Lu", "Ll", "Lt")}
    assert code_points(CASED_LETTERS) == cased - code_points(LEFT_OUT)
    assert len(code_points(CASED_LETTERS)) == 2729


def test_base_alphabet_leaves_out_the_bytes_that_utf8_never_uses() -> None:
    alphabet = base_alphabet()
    used = {byte for c in range(0x110000) if not 0xD800 <= c < 0xE000 for byte in chr(c).encode()}
    assert alphabet == sorted(alphabet) and {BYTES[c] for c in alphabet} == used
    assert (len(alphabet), len(CHARACTERS)) == (243, 256)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world 12345", ["Hello", " world", " ", "1", "2", "3", "4", "5"]),
        ("a\n\n\r\nb", ["a", "\n", "\n", "\r", "\n", "b"]),
        ("x ,, y", ["x", " ,,", " y"]),
        ("\u4e2d \u4e2d\u6587abc", ["\u4e2d", " ", "\u4e2d\u6587", "abc"]),
        ("end  ", ["end", "  "]),
        ("a   b", ["a", "  ", " b"]),
        ("\u05d0  ", ["\u05d0", "  "]),  # Hebrew is matched by no step, a trailing blank is
        ("\u05d0\u4e2d\u05d0", ["\u05d0", "\u4e2d", "\u05d0"]),
        ("don't", ["don", "'", "t"]),
        ("\u00bd\u0661", ["\u00bd", "\u0661"]),
    ],
)
def test_pieces(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@steady
@given(st.one_of(TRICKY, st.text()))
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(piece for piece, _ in PRE_TOKENIZER.pre_tokenize_str(text)) == "".join(CHARACTERS[byte] for byte in text.encode())


def test_splits_equal_the_published_file(published: Published) -> None:
    theirs = LibraryTokenizer.from_str(json.dumps(published.document)).pre_tokenizer
    for vector in published.vectors:
        assert PRE_TOKENIZER.pre_tokenize_str(vector["text"]) == theirs.pre_tokenize_str(vector["text"])

    @steady
    @given(st.one_of(TRICKY, st.text()))
    def compare(text: str) -> None:
        assert PRE_TOKENIZER.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)

    compare()


def test_lone_surrogate_is_named_with_its_offset() -> None:
    with pytest.raises(DataError, match=r"document 3 holds a lone surrogate U\+DC80 at character 5"):
        require_unicode("abcde\udc80", "document 3")
    with pytest.raises(DataError, match="of type bytes"):
        require_unicode(b"abc", "document 3")
