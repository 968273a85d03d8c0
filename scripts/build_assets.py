"""Build the corpus that ships with dsv2 (src/dsv2/assets/corpus) from the large data folder; the same input gives the same bytes.

    python scripts/build_assets.py [DATA]        DATA: folder that holds pretrain/*.jsonl.gz; default: the variable DSV2_DATA

What is taken, and how much of each source, is the table ``PORTIONS``. A document is never cut: whole chapters, laws, files,
sections. Where more is there than wanted, the order of the SHA-256 of the text decides. A document whose text is close to a
validation document is left out of train.
"""

import gzip
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv2.files import atomic_folder

DESTINATION = Path(__file__).resolve().parent.parent / "src" / "dsv2" / "assets" / "corpus"
ALLOWED_LICENCES = ("CC0-1.0", "public domain", "not subject to copyright", "MIT", "PSF-2.0", "CC BY 4.0")
WHOLE = 1 << 40  # bytes: as much as there is


@dataclass(frozen=True, slots=True)
class Portion:
    """How much of one source is wanted.

    Args:
        source: key of pretrain/sources.jsonl.
        train_bytes, validation_bytes: UTF-8 bytes wanted in each split.
        book: for sources that hold books, the one meant, as the large corpus names it.
        book_title: its title in words.
        smallest, largest: UTF-8 bytes of the documents considered.
        unwanted: a pattern; documents in which it is found are left out.
    """

    domain: str
    source: str
    train_bytes: int
    validation_bytes: int
    book: str = ""
    book_title: str = ""
    smallest: int = 500
    largest: int = WHOLE
    unwanted: str = r"[\ue000-\uf8ff]"  # private-use characters: glyphs without a meaning outside the font they were made for


# Third-party notices inside the standard library, and tables of data that read like noise.
CODE_UNWANTED = r"(?i)copyright|[^\x00-\x7f]|(\\x[0-9a-f]{2}){8}|(0x[0-9a-f]+,\s*){8}"
# Stage directions, and traditional characters: the poems are wanted in one script.
POETRY_UNWANTED = r"[（(［《\ue000-\uf8ff]|[來風雲東無見時門話長]"

PORTIONS = (
    Portion("en", "books_en", WHOLE, 18_000, "jane-austen_pride-and-prejudice", "Pride and Prejudice"),
    Portion("en", "books_en", WHOLE, 15_000, "arthur-conan-doyle_the-adventures-of-sherlock-holmes", "The Adventures of Sherlock Holmes"),
    Portion("en", "books_en", WHOLE, 26_000, "charles-dickens_great-expectations", "Great Expectations"),
    Portion("en", "python_docs", 200_000, 6_000, smallest=3_000, largest=30_000, unwanted=r"What's New in|\.\. include::|distutils"),
    Portion("zh", "classics_zh", 400_000, 17_000, "红楼梦"),
    Portion("zh", "laws_zh", 170_000, 8_000, smallest=3_000, largest=12_000),
    Portion("zh", "rust_book_zh", 80_000, 5_000, smallest=3_000, largest=14_000),
    Portion("zh", "chinese_poetry", 60_000, 4_000, largest=10_000, unwanted=POETRY_UNWANTED),
    Portion("code", "cpython_stdlib", 300_000, 16_000, smallest=1_500, largest=24_000, unwanted=CODE_UNWANTED),
    Portion("code", "thealgorithms_python", 200_000, 14_000, largest=12_000, unwanted=CODE_UNWANTED),
    Portion("math", "open_logic", 300_000, 30_000, largest=12_000, unwanted=r"\\iftag|\\clearpage|\\begin\{editorial\}"),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One cleaned document; ``held_out`` says that the large corpus keeps it for validation too."""

    text: str
    title: str
    path: str
    held_out: bool

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @property
    def order(self) -> tuple[bool, str]:
        """Held-out documents first, then by hash: an order that does not depend on the order of the files."""
        return not self.held_out, hashlib.sha256(self.text.encode()).hexdigest()


def clean(text: str) -> str:
    """Plain characters for the invisible ones of typesetting, LF line ends, no trailing blanks, at most one empty line in a row."""
    text = re.sub(r"[\u2060\u200a\u200b\ufeff\u00ad]", "", text)
    text = text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u2011", "-")
    text = re.sub(r"</?(strong|b|i)>", "", text)
    text = re.sub(r"^\[[\w.-]+\.md\]\(https://[^)]*\)$", "", text, flags=re.MULTILINE)  # the Rust book's links to its English source
    text = re.sub(r"[ \t\u3000]+$", "", re.sub(r"\r\n?", "\n", text), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_source(folder: Path, portion: Portion) -> Iterator[Candidate]:
    """Yield the cleaned documents of a portion's source that fit its limits; a story in numbered parts becomes its parts."""
    for split in ("train", "val"):
        with gzip.open(folder / f"{portion.domain}_{split}.jsonl.gz", "rt", encoding="utf8") as file:
            rows = [row for row in map(json.loads, file) if row["source"] == portion.source and row.get("book", "") == portion.book]
        for row in rows:
            text = clean(row["text"])
            heading = text.split("\n", 1)[0]
            for number, part in enumerate(re.split(r"\n\n(?=[IVX]+\n\n)", text)):
                part = part.strip() + "\n"
                title = heading if number == 0 else f"{heading}, {part.split(chr(10), 1)[0]}"
                candidate = Candidate(part, title[:80], row.get("path", ""), split == "val")
                if portion.smallest <= candidate.num_bytes <= portion.largest and not re.search(portion.unwanted, part):
                    yield candidate


def windows(text: str, domain: str) -> set[int]:
    """Hashes of all runs of 13 words (Chinese: of 20 characters) of a text."""
    units, length = (re.sub(r"\s", "", text), 20) if domain == "zh" else (text.split(), 13)
    return {hash(tuple(units[i : i + length])) for i in range(len(units) - length + 1)}


def choose(candidates: list[Candidate], wanted: int) -> list[Candidate]:
    """Take documents in order while they fit into ``wanted`` bytes; one that does not fit is passed over."""
    chosen, size = [], 0
    for candidate in candidates:
        if size + candidate.num_bytes <= wanted:
            chosen.append(candidate)
            size += candidate.num_bytes
    return chosen


def check_licence(folder: Path, source: str) -> None:
    """Refuse a source whose licence is not on the list of those that may be passed on freely."""
    lines = (folder / "sources.jsonl").read_text(encoding="utf8").splitlines()
    licence = next(row["license"] for row in map(json.loads, lines) if row["source"] == source)
    if not licence.startswith(ALLOWED_LICENCES):
        raise SystemExit(f"{source}: licence {licence!r} is not one of {', '.join(ALLOWED_LICENCES)}")


def rows_of(portion: Portion, documents: list[Candidate]) -> list[dict[str, str]]:
    """JSON rows of the chosen documents of a portion."""
    rows = []
    for document in documents:
        row = {"text": document.text, "domain": portion.domain, "source": portion.source}
        if document.path:
            row["path"] = document.path
        elif portion.domain != "math":  # sections of Open Logic come without their titles
            row["title"] = f"{portion.book_title}: {document.title}" if portion.book_title else document.title.lstrip("# ")
        rows.append(row)
    return rows


def select(folder: Path) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Return the rows of every (split, domain)."""
    picked: dict[tuple[str, str], list[dict[str, str]]] = {}
    for portion in PORTIONS:
        check_licence(folder, portion.source)
        # A text can lie in the source twice; a dict keeps the first.
        candidates = sorted({c.text: c for c in read_source(folder, portion)}.values(), key=lambda c: c.order)
        held_out = choose(candidates, portion.validation_bytes)
        known = set().union(*(windows(c.text, portion.domain) for c in held_out))
        texts = {c.text for c in held_out}
        rest = [c for c in candidates if c.text not in texts and not is_close(windows(c.text, portion.domain), known)]
        chosen = choose(rest, portion.train_bytes)
        for split, documents in (("train", chosen), ("validation", held_out)):
            picked.setdefault((split, portion.domain), []).extend(rows_of(portion, documents))
            size = sum(document.num_bytes for document in documents)
            print(f"{split:10} {portion.domain:4} {portion.source:20} {len(documents):4} documents {size:9,} bytes")
    return picked


def is_close(own: set[int], known: set[int]) -> bool:
    """Whether more than 2 % of a document's windows stand in validation."""
    return len(own & known) > 0.02 * max(1, len(own))


def main() -> None:
    """Build all files or none."""
    data = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DSV2_DATA")
    if not data:
        raise SystemExit(__doc__)
    picked = select(Path(data) / "pretrain")
    with atomic_folder(DESTINATION) as folder:
        for (split, domain), rows in picked.items():
            rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            packed = gzip.compress(lines.encode(), compresslevel=9, mtime=0)
            (folder / split).mkdir(exist_ok=True)
            (folder / split / f"{domain}.jsonl.gz").write_bytes(packed)
            print(f"{split}/{domain}.jsonl.gz: {len(rows)} documents, {len(lines.encode()):,} bytes, packed {len(packed):,}")


if __name__ == "__main__":
    main()
