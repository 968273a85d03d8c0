"""Equal and nearly equal documents: digests and MinHash signatures, made anywhere, and the index that decides in order.

A signature depends on its document alone, so that any number of processes may make them; which of two duplicates stays is decided
in one place, by the order of the sources: the first. A document is compared with those that stayed, not with those dropped. The
index holds 7.5 kB for each document that stays.
"""

import hashlib
import unicodedata
from typing import Any

import numpy as np
from jaxtyping import UInt32

from dsv2.data.clean import Drop
from dsv2.data.decompress import import_extra
from dsv2.data.reading import Reading, gram_hashes
from dsv2.data.recipe import DuplicateRules

PURPOSE = "finding near-duplicates"
SCHEME = "affine32"  # of datasketch: 32-bit arithmetic that wraps around, 3 times as fast as its older one
BATCH = 4096  # hashes permuted at once: what stays in the cache
MIN_RUNS = 8  # of words; of a shorter text only equality is told


def digest(text: str) -> bytes:
    """Return 16 bytes that are equal for texts which differ in blanks and Unicode form alone."""
    normal = text if text.isascii() else unicodedata.normalize("NFC", text)
    return hashlib.blake2b(" ".join(normal.split()).encode(), digest_size=16).digest()


def signature(reading: Reading, rules: DuplicateRules) -> UInt32[np.ndarray, "hashes"] | None:
    """Return the MinHash of a text's runs of words, whatever their case and punctuation; None when there are too few.

    Raises:
        MissingExtra: datasketch is not installed.
    """
    runs = np.unique(gram_hashes(reading.word_hashes, rules.words) >> np.uint64(32))
    if len(runs) < MIN_RUNS:
        return None
    sketch = import_extra("datasketch", PURPOSE).MinHash(num_perm=rules.bands * rules.rows, seed=1, hashfunc=int, scheme=SCHEME)
    for start in range(0, len(runs), BATCH):
        sketch.update_batch(runs[start : start + BATCH].tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


class Index:
    """The documents that stayed; asked and told in the order of the sources.

    Args:
        rules: which kinds of duplicates are looked for.

    Raises:
        MissingExtra: near-duplicates are looked for and datasketch is not installed.
    """

    def __init__(self, rules: DuplicateRules) -> None:
        self._rules = rules
        self._exact: dict[bytes, str] = {}
        self._near: Any = None
        self._kept: list[tuple[np.ndarray, str]] = []  # signature and place
        if rules.near:
            library = import_extra("datasketch", PURPOSE)
            self._sketch = library.MinHash(num_perm=rules.bands * rules.rows, seed=1, scheme=SCHEME)
            self._near = library.MinHashLSH(num_perm=rules.bands * rules.rows, params=(rules.bands, rules.rows))

    def add(self, place: str, text_digest: bytes, text_signature: UInt32[np.ndarray, "hashes"] | None) -> Drop | None:
        """Say why a document is a duplicate; or remember it and return None.

        Args:
            place: what the document is called in the reasons of later ones.
            text_digest: of :func:`digest`.
            text_signature: of :func:`signature`.
        """
        if self._rules.exact and (first := self._exact.get(text_digest)) is not None:
            return Drop("duplicates.exact", f"equal to {first}")
        if self._near is not None and text_signature is not None:
            self._sketch.hashvalues = text_signature
            for key in sorted(self._near.query(self._sketch)):
                other, first = self._kept[key]
                similarity = float(np.count_nonzero(other == text_signature)) / len(other)
                if similarity >= self._rules.threshold:
                    return Drop("duplicates.near", f"similarity {similarity:.2f} to {first}; below {self._rules.threshold} is allowed")
            self._near.insert(len(self._kept), self._sketch, check_duplication=False)
            self._kept.append((text_signature, place))
        if self._rules.exact:
            self._exact[text_digest] = place
        return None
