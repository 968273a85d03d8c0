"""A piece, some megabytes of documents: what is done to it in any process, and kept in a file so that it is done once.

Two steps: clean (repair, mask, judge, sign) and, after the duplicates were decided in order, encode. A step's result lies in the work
folder under a name that is the hash of everything that it depends on: the documents, the rules, the tokenizer. So a run that was
interrupted finds what it had finished, and nothing that it finds can be stale.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from time import process_time
from typing import Any

import numpy as np
from jaxtyping import UInt32

from dsv2.data.clean import Drop, is_of, judge_code, judge_contentious, judge_general
from dsv2.data.contamination import Benchmarks, judge_contamination
from dsv2.data.documents import Document
from dsv2.data.duplicates import digest, signature
from dsv2.data.fim import turned
from dsv2.data.language import language_of
from dsv2.data.reading import Reading, read
from dsv2.data.recipe import PrepareRecipe
from dsv2.data.repair import mask, mend
from dsv2.files import atomic_write
from dsv2.tokenizer.tokenizer import Tokenizer

VERSION = b"dsv2-pieces-3"  # changes with what the steps do
EXCERPT = 160  # characters of a document that are kept for the report


@dataclass(frozen=True, slots=True)
class Job:
    """What every process must know.

    Attributes:
        recipe: the rules.
        tokenizer: its folder.
        work: folder of finished pieces.
        benchmarks: file of their grams, None for none.
        benchmarks_sha256: its hash.
    """

    recipe: PrepareRecipe
    tokenizer: Path
    work: Path
    benchmarks: Path | None = None
    benchmarks_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """A document that passed the rules; ``digest`` is 32 hex digits, ``excerpt`` what the report quotes should it be a duplicate."""

    domain: str
    place: str
    language: str
    digest: str
    num_bytes: int
    signed: bool
    excerpt: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that did not: the rule, what was seen, and the beginning of the text."""

    domain: str
    place: str
    rule: str
    why: str
    num_bytes: int
    excerpt: str


@dataclass(frozen=True, slots=True, eq=False)
class Cleaned:
    """What became of a piece.

    Attributes:
        key: name of its file.
        kept: documents that passed, in order.
        dropped: the others, in order.
        changed: documents in which something was mended, and items masked, by kind.
        seconds: of CPU time, by step.
        signatures: of the kept documents that have one, in order.
        reused: it was there already.
    """

    key: str
    kept: tuple[Kept, ...]
    dropped: tuple[Dropped, ...]
    changed: dict[str, int]
    seconds: dict[str, float]
    signatures: UInt32[np.ndarray, "signed hashes"]
    reused: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """The ids of a piece's documents.

    Attributes:
        lens: tokens in each document, BOS and EOS included.
        ids: of all documents, one after the other.
        num_turned: documents that were turned into fill-in-the-middle.
        seconds: of CPU time, by step.
    """

    lens: tuple[int, ...]
    ids: UInt32[np.ndarray, "tokens"]
    num_turned: int
    seconds: dict[str, float]


class Workbench:
    """Does the two steps; each process has one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._benchmarks = Benchmarks.load(job.benchmarks) if job.benchmarks else None
        self._tokenizer = Tokenizer.load(job.tokenizer)
        recipe = job.recipe
        rules = recipe.model_dump_json(exclude={"fim"}).encode()
        self._clean_rules = VERSION + hashlib.sha256(rules + job.benchmarks_sha256.encode()).digest()
        self._encode_rules = VERSION + (recipe.fim.model_dump_json() + self._tokenizer.fingerprint).encode()
        self._width = recipe.duplicates.bands * recipe.duplicates.rows if recipe.duplicates.near else 0

    def clean(self, documents: Sequence[Document]) -> Cleaned:
        """Repair, mask, judge and sign the documents of a piece, or find that it was done."""
        key = _key(self._clean_rules, *(part for document in documents for part in asdict(document).values()))
        path = self.job.work / f"{key}.clean"
        found = _load(path)
        if found is not None:
            header, body = found
            signatures = np.frombuffer(body, dtype="<u4", count=header["signatures"] * self._width).reshape(-1, max(self._width, 1))
            kept, dropped = tuple(Kept(**row) for row in header["kept"]), tuple(Dropped(**row) for row in header["dropped"])
            return Cleaned(key, kept, dropped, header["changed"], {}, signatures, reused=True)
        done, texts = self._clean(key, documents)
        with _timed(done.seconds, "keep the piece"):
            rows = {"kept": [asdict(item) for item in done.kept], "dropped": [asdict(item) for item in done.dropped]}
            header = {**rows, "changed": done.changed, "signatures": len(done.signatures)}
            _save(path, header, done.signatures.tobytes() + b"".join(texts))
        return done

    def _clean(self, key: str, documents: Sequence[Document]) -> tuple[Cleaned, list[bytes]]:
        recipe, seconds, changed = self.job.recipe, dict[str, float](), Counter[str]()
        kept, dropped, texts, signatures = list[Kept](), list[Dropped](), list[bytes](), list[UInt32[np.ndarray, "hashes"]]()
        for document in documents:
            text, drop, language, reading = document.text, None, "", None
            place = f"{document.source}: {document.location}"
            if recipe.encoding.enabled:
                with _timed(seconds, "mend encodings"):
                    text, mended, drop = mend(text, recipe.encoding)
                    changed.update(mended.keys())
                if drop is None and (not text or text.isspace()):
                    drop = Drop("encoding.blank", "nothing but control characters")
            if drop is None and recipe.personal.enabled:
                with _timed(seconds, "mask personal data"):
                    text, masked = mask(text, recipe.personal)
                    changed.update(masked)
            if drop is None and self._needs_reading:
                with _timed(seconds, "read words and lines"):
                    reading = read(text)
                drop, language = self._judge(document, reading, seconds)
            data = text.encode()
            if drop is not None:
                dropped.append(Dropped(document.domain, place, drop.rule, drop.why, len(data), text[:EXCERPT]))
                continue
            with _timed(seconds, "digests and signatures"):
                signed = signature(reading, recipe.duplicates) if recipe.duplicates.near and reading is not None else None
                hexed = digest(text).hex() if recipe.duplicates.exact else ""
            if signed is not None:
                signatures.append(signed)
            kept.append(Kept(document.domain, place, language, hexed, len(data), signed is not None, text[:EXCERPT]))
            texts.append(data)
        stacked = np.stack(signatures) if signatures else np.zeros((0, max(self._width, 1)), dtype=np.uint32)
        return Cleaned(key, tuple(kept), tuple(dropped), dict(changed), seconds, stacked), texts

    @property
    def _needs_reading(self) -> bool:
        recipe = self.job.recipe
        rules = (recipe.general, recipe.code, recipe.language, recipe.contentious)
        return self._benchmarks is not None or recipe.duplicates.near or any(rule.enabled for rule in rules)

    def _judge(self, document: Document, reading: Reading, seconds: dict[str, float]) -> tuple[Drop | None, str]:
        """Return why a document is dropped, if it is, and its language tag."""
        recipe, drop, language = self.job.recipe, None, ""
        is_code = is_of(document.domain, recipe.code.domains)
        with _timed(seconds, "quality rules"):
            if is_code and recipe.code.enabled:
                drop = judge_code(reading, recipe.code, document.path)
            elif not is_code and recipe.general.enabled:
                drop = judge_general(reading, recipe.general)
            if drop is None and recipe.contentious.enabled:
                drop = judge_contentious(reading, recipe.contentious)
        if drop is None and recipe.language.enabled:
            with _timed(seconds, "language tags"):
                language = (PurePosixPath(document.path).suffix.lower() or "code") if is_code else language_of(reading)
            if recipe.language.keep and not is_code and language not in recipe.language.keep:
                drop = Drop("language.keep", f"{language}; kept are {', '.join(recipe.language.keep)}")
        if drop is None and self._benchmarks is not None:
            with _timed(seconds, "contamination"):
                drop = judge_contamination(reading, self._benchmarks, recipe.contamination)
        return drop, language

    def encode(self, key: str, domains: Sequence[str], stays: Sequence[bool]) -> Encoded:
        """Encode the documents of a cleaned piece that stay, or find that it was done.

        Args:
            key: of the cleaned piece.
            domains: of its kept documents.
            stays: which of them are no duplicates.
        """
        path = self.job.work / f"{_key(self._encode_rules, key, bytes(stays))}.ids"
        found = _load(path)
        if found is not None:
            return Encoded(tuple(found[0]["lens"]), np.frombuffer(found[1], dtype="<u4"), found[0]["turned"], {})
        seconds: dict[str, float] = {}
        with _timed(seconds, "keep the piece"):
            texts = [text for text, stay in zip(self._texts(key), stays, strict=True) if stay]
        with _timed(seconds, "encode"):
            fim, eos = self.job.recipe.fim, self._tokenizer.eos_id
            named = [domain for domain, stay in zip(domains, stays, strict=True) if stay]
            rows = [
                turned(self._tokenizer, text, fim) if is_of(domain, fim.domains) else None
                for text, domain in zip(texts, named, strict=True)
            ]
            plain = iter(self._tokenizer.encode_batch([text for text, row in zip(texts, rows, strict=True) if row is None]))
            arrays = [np.array(row if row is not None else [*next(plain), eos], dtype="<u4") for row in rows]
        lens, ids = tuple(map(len, arrays)), np.concatenate([np.zeros(0, dtype="<u4"), *arrays])
        num_turned = sum(row is not None for row in rows)
        with _timed(seconds, "keep the piece"):
            _save(path, {"lens": lens, "turned": num_turned}, ids.tobytes())
        return Encoded(lens, ids, num_turned, seconds)

    def _texts(self, key: str) -> Iterator[str]:
        found = _load(self.job.work / f"{key}.clean")
        if found is None:
            raise RuntimeError(f"{self.job.work / key}.clean was there a moment ago; does another process use the folder?")
        header, body = found
        at = header["signatures"] * self._width * 4
        for row in header["kept"]:
            yield body[at : at + row["num_bytes"]].decode()
            at += row["num_bytes"]


def _key(*parts: str | bytes) -> str:
    """Return the hash of parts whose borders count."""
    key = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        key.update(len(data).to_bytes(8, "little") + data)
    return key.hexdigest()


def _save(path: Path, header: dict[str, Any], body: bytes) -> None:
    content = json.dumps(header).encode() + b"\n" + body
    atomic_write(path, hashlib.sha256(content).digest() + content)


def _load(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """Return what was saved; None when there is nothing, or it is damaged and has to be made again."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    header, _, body = data[32:].partition(b"\n")
    return json.loads(header), body


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = process_time()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + process_time() - start
