"""A text read once into arrays: its characters' classes, its words and lines, and a hash of every word.

Everything that judges a text, the quality rules, the near-duplicates, the contamination, works on these arrays, so that a text is gone
through character by character only here, and in numpy. A *word* is a run of letters, digits and underscores with the vowel signs and
accents that stand on them; a Han character or kana is a word of its own, so that Chinese needs no segmenter. Some 60 bytes a character
while one text is read.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32, UInt64

from dsv2.data.order import mix

BLANK, LETTER, DIGIT, IDEOGRAPH, UNDERSCORE, MARK = 1, 2, 4, 8, 16, 32  # bits of a class; an ideograph is a letter, too
TABLE = 0x32400  # no letter lies above
_IDEOGRAPHS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_PLACES = 64  # letters of a word whose places count; those beyond count as if at place modulo 64


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A text as arrays.

    Attributes:
        text: as it was given.
        codes: code point of each character.
        classes: of each character, bits of BLANK, LETTER, DIGIT, IDEOGRAPH, UNDERSCORE, MARK.
        word_starts: place of each word's first character.
        word_lens: characters in each word.
        word_hashes: of each word, whatever its case.
        line_starts: place of each line's first character.
        line_ends: place after each line's last character, the line feed not counted.
    """

    text: str
    codes: UInt32[np.ndarray, "characters"]
    classes: UInt8[np.ndarray, "characters"]
    word_starts: Int64[np.ndarray, "words"]
    word_lens: Int64[np.ndarray, "words"]
    word_hashes: UInt64[np.ndarray, "words"]
    line_starts: Int64[np.ndarray, "lines"]
    line_ends: Int64[np.ndarray, "lines"]

    def count(self, kind: int) -> int:
        """Return how many characters are of one of the classes whose bits are set in ``kind``."""
        return int(np.count_nonzero(self.classes & kind))

    def ideograph_words(self) -> Bool[np.ndarray, "words"]:
        """Return which words are Han characters or kana."""
        return np.asarray((self.classes[self.word_starts] & IDEOGRAPH) > 0)

    def lines(self) -> list[str]:
        """Return the lines without their line feeds."""
        return [self.text[start:end] for start, end in zip(self.line_starts.tolist(), self.line_ends.tolist(), strict=True)]


def read(text: str) -> Reading:
    """Read a text; it holds no lone surrogate."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    classes_of, hash_of = _tables()
    clipped = np.minimum(codes, TABLE - 1)
    classes = classes_of[clipped]
    in_word = (classes & (LETTER | DIGIT | UNDERSCORE)) > 0
    marks = (classes & MARK) > 0
    if marks.any():  # a mark belongs to what it stands on
        in_word = in_word[np.maximum.accumulate(np.where(marks, 0, np.arange(len(codes))))]
    alone = (classes & IDEOGRAPH) > 0
    before_word, before_alone = np.zeros_like(in_word), np.zeros_like(alone)
    before_word[1:], before_alone[1:] = in_word[:-1], alone[:-1]
    first = in_word & ~(marks & before_word) & (~before_word | alone | before_alone)
    word_starts = np.flatnonzero(first)
    places = np.flatnonzero(in_word)
    offsets = np.flatnonzero(first[places])  # of each word among the characters of words
    word_lens = np.diff(offsets, append=len(places))
    if len(places):
        within = np.arange(len(places)) - np.repeat(offsets, word_lens)
        word_hashes = np.add.reduceat(hash_of[clipped[places]] * _powers()[within % _PLACES], offsets)
    else:
        word_hashes = np.zeros(0, dtype=np.uint64)
    feeds = np.flatnonzero(codes == 10)
    line_starts = np.concatenate([[0], feeds + 1]).astype(np.int64)
    line_ends = np.append(feeds, len(codes)).astype(np.int64)
    if len(codes) and codes[-1] == 10:  # a line feed ends a line, it does not begin one
        line_starts, line_ends = line_starts[:-1], line_ends[:-1]
    return Reading(text, codes, classes, word_starts, word_lens, word_hashes, line_starts, line_ends)


def gram_hashes(words: UInt64[np.ndarray, "words"], length: int) -> UInt64[np.ndarray, "grams"]:
    """Return a hash of each run of ``length`` words; none when there are fewer."""
    num_grams = len(words) - length + 1
    if num_grams < 1:
        return np.zeros(0, dtype=np.uint64)
    total = words[:num_grams].copy()
    for shift in range(1, length):
        total *= _MULTIPLIER
        total += words[shift : shift + num_grams]
    return mix(total)


@cache
def _tables() -> tuple[UInt8[np.ndarray, "codes"], UInt64[np.ndarray, "codes"]]:
    """Return the class and the hash of every code point below TABLE; a letter's hash is that of its lower case."""
    classes = np.zeros(TABLE, dtype=np.uint8)
    lower = np.arange(TABLE, dtype=np.uint64)
    for code in range(TABLE):
        character = chr(code)
        if character.isalpha():
            classes[code] = LETTER
            small = character.lower()
            if len(small) == 1:
                lower[code] = ord(small)
        elif unicodedata.category(character) in ("Mn", "Mc"):  # vowel signs and accents of their own: part of the word they stand in
            classes[code] = MARK
        elif character.isspace():
            classes[code] = BLANK
        elif character.isdigit():
            classes[code] = DIGIT
    classes[ord("_")] = UNDERSCORE
    for low, high in _IDEOGRAPHS:
        block = classes[low : high + 1]
        block[block == LETTER] |= IDEOGRAPH
    return classes, mix(lower + _MULTIPLIER)


@cache
def _powers() -> UInt64[np.ndarray, "places"]:
    return np.cumprod(np.full(_PLACES, _MULTIPLIER), dtype=np.uint64)
