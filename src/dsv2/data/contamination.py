"""Text of benchmarks in documents: shared runs of 13 words, or of 20 Han characters.

The grams of a folder of benchmarks are hashed once into a sorted file, which every process maps. A bitmap in front of it turns away
nearly all grams of a document at one memory access each; what passes is looked up exactly. So the false positives are those of a 64-bit
hash. A benchmark text that is shorter than the run is not found, since it would be found everywhere; how many those are is counted.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8, UInt64

from dsv2.data.clean import Drop
from dsv2.data.decompress import DECOMPRESS, split_lines
from dsv2.data.reading import Reading, gram_hashes, read
from dsv2.data.recipe import ContaminationRules
from dsv2.errors import DataError

BITMAP_BITS = 27  # 16 MiB
BATCH_TEXTS = 2000  # of benchmarks, read at once
BITS = np.uint8(1) << np.arange(8, dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Benchmarks:
    """The grams of all benchmarks.

    Attributes:
        grams: their hashes, sorted.
        bitmap: a bit for each value that the lower bits of a hash can have.
    """

    grams: UInt64[np.ndarray, "grams"]
    bitmap: UInt8[np.ndarray, "bytes"]

    def contain(self, hashes: UInt64[np.ndarray, "hashes"]) -> Bool[np.ndarray, "hashes"]:
        """Return which of the hashes are a benchmark's."""
        slots = hashes & np.uint64((1 << BITMAP_BITS) - 1)
        found = (self.bitmap[slots >> np.uint64(3)] & BITS[slots & np.uint64(7)]) > 0
        likely = hashes[found]
        if len(likely):
            places = np.minimum(np.searchsorted(self.grams, likely), len(self.grams) - 1)
            found[found] = self.grams[places] == likely
        return np.asarray(found)

    def save(self, path: Path) -> None:
        """Write the grams to a file that :meth:`load` maps."""
        with path.open("wb") as file:
            np.save(file, self.grams)

    @classmethod
    def load(cls, path: Path) -> "Benchmarks":
        """Map a file of grams."""
        return cls.of(np.load(path, mmap_mode="r"))

    @classmethod
    def of(cls, grams: UInt64[np.ndarray, "grams"]) -> "Benchmarks":
        """Return sorted grams with their bitmap."""
        bitmap = np.zeros(1 << (BITMAP_BITS - 3), dtype=np.uint8)
        slots = np.asarray(grams) & np.uint64((1 << BITMAP_BITS) - 1)
        np.bitwise_or.at(bitmap, slots >> np.uint64(3), BITS[slots & np.uint64(7)])
        return cls(grams, bitmap)


@dataclass(frozen=True, slots=True, eq=False)
class HashedTexts:
    """What the strings of the benchmarks gave, labels and names among them.

    Attributes:
        grams: hashes of their runs, sorted.
        num_texts: strings, each once a file.
        num_short: of them those without a run: no document can be found by them.
    """

    grams: UInt64[np.ndarray, "grams"]
    num_texts: int
    num_short: int


def benchmark_files(folder: Path) -> list[Path]:
    """Return the .jsonl files of a folder, also with .gz or .zst, sorted.

    Raises:
        DataError: there is none.
    """
    files = sorted(
        path for path in folder.rglob("*.jsonl*") if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
    )
    if not files:
        raise DataError(f"no .jsonl file in {folder}", hint="--decontaminate takes a folder with benchmarks, one JSON object a line")
    return files


def benchmark_grams(files: Sequence[Path], rules: ContaminationRules) -> HashedTexts:
    """Hash all runs in the strings of all rows.

    Raises:
        DataError: a file is damaged.
    """
    grams, num_texts, num_long = [np.zeros(0, dtype=np.uint64)], 0, 0
    for file in files:
        with file.open("rb") as raw:
            compression = file.suffix if file.suffix in DECOMPRESS else ""
            try:
                rows = [json.loads(line) for line in split_lines(DECOMPRESS[compression](raw)) if line.strip()]
            except (EOFError, OSError, ValueError) as error:
                raise DataError(f"{file} is damaged: {error}", hint="fetch the benchmark again or leave it out") from error
        texts = {text for row in rows for text in _strings(row)}
        num_texts += len(texts)
        for batch in _batches(sorted(text for text in texts if len(text) >= min(rules.words, rules.ideographs))):
            found, with_runs = _grams_of_many(batch, rules)
            grams.append(found)
            num_long += with_runs
    return HashedTexts(np.unique(np.concatenate(grams)), num_texts, num_texts - num_long)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) >= BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _grams_of_many(texts: Sequence[str], rules: ContaminationRules) -> tuple[UInt64[np.ndarray, "grams"], int]:
    """Return the distinct runs of short texts, and how many texts have one: read as one, but no run goes from one text to the next."""
    reading = read("\n".join(texts))
    grams, firsts, lengths = _grams(reading, rules)
    if len(grams) == 0:
        return grams, 0
    begins = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    owner = np.searchsorted(begins, reading.word_starts, side="right")
    within = owner[firsts] == owner[firsts + lengths - 1]
    return np.unique(grams[within]), len(np.unique(owner[firsts[within]]))


def judge_contamination(reading: Reading, benchmarks: Benchmarks, rules: ContaminationRules) -> Drop | None:
    """Drop a text that shares a run with a benchmark; the reason quotes the first."""
    grams, first_words, length = _grams(reading, rules)
    found = np.flatnonzero(benchmarks.contain(grams))
    if len(found) == 0:
        return None
    at = found[0]
    word = first_words[at]
    last = word + length[at] - 1
    quoted = reading.text[reading.word_starts[word] : reading.word_starts[last] + reading.word_lens[last]]
    return Drop("contamination.run", f"{len(found)} runs of a benchmark, the first: {quoted}")


def _grams(reading: Reading, rules: ContaminationRules) -> tuple[UInt64[np.ndarray, "grams"], Any, Any]:
    """Return the hashes of the runs that count, the first word of each and its length.

    A run of ``words`` counts where fewer than half of them are Han characters, a run of ``ideographs`` elsewhere.
    """
    ideographs = np.concatenate([[0], np.cumsum(reading.ideograph_words())])
    hashes, firsts, lengths = [], [], []
    for length, wanted in ((rules.words, False), (rules.ideographs, True)):
        grams = gram_hashes(reading.word_hashes, length)
        if len(grams):
            counts = ideographs[length:] - ideographs[:-length]
            first = np.flatnonzero((2 * counts >= length) == wanted)
            hashes.append(grams[first])
            firsts.append(first)
            lengths.append(np.full(len(first), length))
    if not hashes:
        return np.zeros(0, dtype=np.uint64), (), ()
    return np.concatenate(hashes), np.concatenate(firsts), np.concatenate(lengths)


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a row, however deep."""
    if isinstance(value, str):
        yield value.encode(errors="replace").decode()  # half a surrogate pair, which JSON can spell, has no code point
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
