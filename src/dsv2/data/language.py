"""The language of a text: by its script where that tells, else by py3langid on its beginning; works offline."""

from functools import cache
from typing import Any

import numpy as np

from dsv2.data.decompress import import_extra
from dsv2.data.reading import IDEOGRAPH, LETTER, Reading

BEGINNING = 500  # characters that are looked at
MIN_LETTERS = 10
UNKNOWN = "unknown"
# First and last code point; scripts that are written by one large language, or nearly.
SCRIPTS = {
    "ko": (0xAC00, 0xD7A3), "th": (0x0E00, 0x0E7F), "el": (0x0370, 0x03FF), "he": (0x0590, 0x05FF), "hi": (0x0900, 0x097F),
}  # fmt: skip
CHINESE = ("wuu", "yue")  # what py3langid also calls it
KANA = (0x3040, 0x30FF)


def language_of(reading: Reading) -> str:
    """Return the ISO 639-1 code of a text's language, ``"unknown"`` where there are too few letters to tell.

    Raises:
        MissingExtra: py3langid is needed and not installed.
    """
    codes, classes = reading.codes[:BEGINNING], reading.classes[:BEGINNING]
    letters = int(np.count_nonzero(classes & LETTER))
    if letters < MIN_LETTERS:
        return UNKNOWN
    ideographs = int(np.count_nonzero(classes & IDEOGRAPH))
    if ideographs > 0.2 * letters:  # a Chinese text may hold many English names
        return "ja" if _count(codes, KANA) > 0.1 * ideographs else "zh"
    for language, block in SCRIPTS.items():
        if _count(codes, block) > 0.3 * letters:
            return language
    found = str(_identifier().classify(reading.text[:BEGINNING])[0])
    return "zh" if found in CHINESE else found


def _count(codes: Any, block: tuple[int, int]) -> int:
    return int(np.count_nonzero((codes >= block[0]) & (codes <= block[1])))


@cache
def _identifier() -> Any:
    return import_extra("py3langid", "telling languages")
