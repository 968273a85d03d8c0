"""Token shards: the ids of many documents in flat files that are memory-mapped, with document boundaries and a manifest.

A folder of shards holds, for each shard, ``NAME.bin`` (token ids, uint16 or uint32, little-endian) and ``NAME.idx`` (int64: where each
document begins, and one last entry where the shard ends), and ``manifest.json`` (counts and hashes). A document never spans two
shards. The manifest is written last and the folder appears at once, so a folder without one is no corpus.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv2.errors import ConfigError, DataError
from dsv2.files import atomic_folder, sha256_of

FORMAT = "dsv2-token-shards"
VERSION = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 26  # 128 or 256 MiB a file
REPORTS = ("report.json", "report.md")  # what may lie beside the shards
MAX_DOMAINS = 256  # each keeps a file open while shards are written
REMAKE_HINT = "make the shards again with `dsv2 prepare`"


class ShardEntry(BaseModel):
    """One shard in the manifest: its domain, its counts, the hashes of its two files.

    ``num_tokens`` counts BOS and EOS; ``num_bytes`` is the documents' length as UTF-8.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[^./\\][^/\\]*$")
    domain: str
    num_tokens: int = Field(gt=0)
    num_documents: int = Field(gt=0)
    num_bytes: int = Field(ge=0)
    sha256: str
    index_sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds; shards stand by domain and number, which is the order in which they are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT
    version: int = VERSION
    tokenizer_sha256: str
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)
    dtype: Literal["uint16", "uint32"]
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    files: tuple[str, ...] = ()  # further ones in the folder, such as a report; not part of the data, so without hashes


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One shard, memory-mapped.

    Attributes:
        entry: its line in the manifest.
        tokens: ids of its documents, one after the other.
        document_starts: index of each document's first token; the last entry is ``num_tokens``.
    """

    entry: ShardEntry
    tokens: UInt[np.ndarray, "tokens"]
    document_starts: Int64[np.ndarray, "documents_and_end"]


class TokenShards:
    """A folder of token shards, open for reading; made by :meth:`open`.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
        fingerprint: sha256 of the manifest, hence of everything: equal fingerprints are equal data.
    """

    def __init__(self, folder: Path, manifest: Manifest, fingerprint: str, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        self._shards = tuple(shards)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "TokenShards":
        """Open a folder that ``dsv2 prepare`` wrote.

        Sizes are always checked. A file that is cut off later, while it is mapped, ends the process (SIGBUS).

        Args:
            folder: holds manifest.json and the shards.
            verify: also compare the hashes, which reads every byte.

        Raises:
            DataError: no manifest, one of another version, or a shard that is missing, cut off or altered.
        """
        folder = Path(folder)
        manifest, fingerprint = _read_manifest(folder / MANIFEST)
        return cls(folder, manifest, fingerprint, [_open_shard(folder, entry, manifest.dtype, verify) for entry in manifest.shards])

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains, sorted."""
        return tuple(sorted({shard.entry.domain for shard in self._shards}))

    def shards(self, domain: str | None = None) -> tuple[Shard, ...]:
        """Return the shards of one domain, or of all, in reading order.

        Raises:
            DataError: there is no such domain.
        """
        if domain is not None and domain not in self.domains:
            raise DataError(f"{self.folder} has no domain {domain!r}; its domains are {', '.join(self.domains)}")
        return tuple(shard for shard in self._shards if domain in (None, shard.entry.domain))

    def tokens(self, domain: str | None = None) -> Iterator[UInt[np.ndarray, "tokens"]]:
        """Yield the memory-mapped ids of one shard after the other."""
        for shard in self.shards(domain):
            yield shard.tokens

    def num_tokens(self, domain: str | None = None) -> int:
        """Return how many tokens there are, BOS and EOS included."""
        return sum(shard.entry.num_tokens for shard in self.shards(domain))

    def num_documents(self, domain: str | None = None) -> int:
        """Return how many documents there are."""
        return sum(shard.entry.num_documents for shard in self.shards(domain))

    def num_bytes(self, domain: str | None = None) -> int:
        """Return the length of all documents as UTF-8: the denominator of bits per byte."""
        return sum(shard.entry.num_bytes for shard in self.shards(domain))

    def expect_tokenizer(self, fingerprint: str) -> None:
        """Refuse to go on when the shards were written with another tokenizer.

        Args:
            fingerprint: ``Tokenizer.fingerprint`` of the tokenizer about to be used.

        Raises:
            DataError: the ids would mean something else.
        """
        if fingerprint != self.manifest.tokenizer_sha256:
            raise DataError(
                f"{self.folder} was written with the tokenizer {self.manifest.tokenizer_sha256[:16]}, not with {fingerprint[:16]}",
                hint=f"use that tokenizer, or {REMAKE_HINT}",
            )


class ShardWriter:
    """Writes a folder of shards, whole or not at all.

    Use it in a ``with`` block: the folder appears, with its manifest, when the block ends well and replaces an older folder of shards;
    nothing is left of it otherwise.

    Args:
        folder: to be written; an existing one is replaced only if it holds nothing but shards.
        tokenizer_fingerprint: sha256 of tokenizer.json.
        vocab_size: size of the model's vocabulary; uint16 up to 65536, uint32 above.
        eos_id: id that ends documents and pads rows.
        shard_tokens: a shard is closed by the first document that brings it to so many tokens.

    Raises:
        ConfigError: a number is out of range.
        DataError: the folder holds something else, or the disk is full.
    """

    def __init__(
        self, folder: str | Path, tokenizer_fingerprint: str, vocab_size: int, *, eos_id: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        if shard_tokens < 1:
            raise ConfigError(f"shard_tokens = {shard_tokens}; a shard holds at least 1 token")
        if not 0 <= eos_id < vocab_size <= 1 << 32:
            raise ConfigError(f"eos_id = {eos_id} and vocab_size = {vocab_size}; needed is 0 <= eos_id < vocab_size <= 2**32")
        self.folder = Path(folder)
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._shard_tokens = shard_tokens
        self._open: dict[str, _OpenShard] = {}
        self._entries: list[ShardEntry] = []
        self._numbers: Counter[str] = Counter()
        self._files: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        refuse_foreign_files(self.folder, (MANIFEST, "*.bin", "*.idx", *REPORTS))
        self._temporary = self._stack.enter_context(atomic_folder(self.folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        if error is not None:
            return self._stack.__exit__(kind, error, trace)
        with self._stack:  # a failure of the last writes, too, leaves nothing
            self._finish()
        return None

    def add(self, domain: str, tokens: Sequence[int] | Int64[np.ndarray, "tokens"], num_bytes: int) -> None:
        """Append a document.

        Args:
            domain: which shard it goes to.
            tokens: its ids, with BOS and EOS.
            num_bytes: length of its text as UTF-8.

        Raises:
            DataError: an id is outside the vocabulary, there are too many domains, or the disk is full.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size == 0:
            raise ValueError("a document has at least one token")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"token id {wrong} is outside the vocabulary of {self._vocab_size} ids", hint="use the tokenizer of the model")
        if domain not in self._open:
            self._open[domain] = self._start(domain)
        shard = self._open[domain]
        shard.append(ids.astype(LITTLE_ENDIAN[self._dtype]).tobytes(), ids.size, num_bytes)
        if shard.starts[-1] >= self._shard_tokens:
            self._entries.append(self._open.pop(domain).close())

    def attach(self, name: str, content: str) -> None:
        """Put a file of :data:`REPORTS` beside the shards; the manifest names it, and its content is no part of the fingerprint."""
        if name not in REPORTS:
            raise ValueError(f"{name} is none of {', '.join(REPORTS)}")
        (self._temporary / name).write_bytes(content.encode())
        self._files.append(name)

    def _start(self, domain: str) -> "_OpenShard":
        if len(self._open) >= MAX_DOMAINS:
            raise DataError(
                f"more than {MAX_DOMAINS} domains, the last is {domain!r}",
                hint="a domain is a kind of text; give one for all with --domain, or drop the field domain of the rows",
            )
        # Domains come from data: their file names are made safe, and numbered so that two that look alike do not share a file.
        stem = re.sub(r"[^\w-]+", "_", domain).strip("_")[:48].lower() or "domain"
        name = f"{stem}-{self._numbers[stem]:05d}"
        self._numbers[stem] += 1
        shard = _OpenShard(self._temporary, name, domain)
        self._stack.callback(shard.file.close)
        return shard

    def _finish(self) -> None:
        self._entries += [self._open.pop(domain).close() for domain in list(self._open)]
        if not self._entries:
            raise DataError("an empty corpus: no document was written", hint="give at least one document")
        manifest = Manifest(
            tokenizer_sha256=self._tokenizer_fingerprint,
            vocab_size=self._vocab_size,
            eos_id=self._eos_id,
            dtype=self._dtype,
            shards=tuple(sorted(self._entries, key=lambda entry: entry.domain)),  # stable: within a domain as written
            files=tuple(self._files),
        )
        content = manifest.model_dump_json(indent=1, exclude=None if self._files else {"files"})
        (self._temporary / MANIFEST).write_bytes(content.encode() + b"\n")


LITTLE_ENDIAN = {"uint16": "<u2", "uint32": "<u4", "int64": "<i8"}


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, folder: Path, name: str, domain: str) -> None:
        self.name = name
        self.domain = domain
        self.starts = array("q", [0])
        self.num_bytes = 0
        self.hash = hashlib.sha256()
        self.index_path = folder / f"{name}.idx"
        self.file = (folder / f"{name}.bin").open("wb")

    def append(self, data: bytes, num_tokens: int, num_bytes: int) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.starts.append(self.starts[-1] + num_tokens)
        self.num_bytes += num_bytes

    def close(self) -> ShardEntry:
        self.file.close()
        index = np.asarray(self.starts).astype(LITTLE_ENDIAN["int64"]).tobytes()
        self.index_path.write_bytes(index)
        return ShardEntry(
            name=self.name,
            domain=self.domain,
            num_tokens=self.starts[-1],
            num_documents=len(self.starts) - 1,
            num_bytes=self.num_bytes,
            sha256=self.hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )


def refuse_foreign_files(folder: Path, ours: Sequence[str]) -> None:
    """Refuse to replace a folder that holds anything but files of the given name patterns.

    Raises:
        DataError: it does, or it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, and a folder is to be written there", hint="choose another folder with --out")
    foreign = [path.name for path in sorted(folder.iterdir()) if path.is_dir() or not any(path.match(pattern) for pattern in ours)]
    if foreign:
        raise DataError(
            f"{folder} exists and would be replaced, but holds other things: {', '.join(foreign[:5])}",
            hint="choose a new or empty folder with --out",
        )


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    if not path.is_file():
        raise DataError(f"{path.parent} is not a folder of token shards: it has no {path.name}", hint=REMAKE_HINT)
    data = path.read_bytes()
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}", hint=REMAKE_HINT) from None
    found = (fields.get("format"), fields.get("version")) if isinstance(fields, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DataError(f"{path} has format {found[0]!r}, version {found[1]!r}; {FORMAT!r}, version {VERSION} expected", hint=REMAKE_HINT)
    try:
        return Manifest.model_validate(fields), hashlib.sha256(data).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint=REMAKE_HINT) from None


def _open_shard(folder: Path, entry: ShardEntry, dtype: str, verify: bool) -> Shard:
    tokens_path, index_path = folder / f"{entry.name}.bin", folder / f"{entry.name}.idx"
    tokens = _open_array(tokens_path, LITTLE_ENDIAN[dtype], entry.num_tokens, entry.sha256 if verify else None)
    starts = _open_array(index_path, LITTLE_ENDIAN["int64"], entry.num_documents + 1, entry.index_sha256 if verify else None)
    return Shard(entry, tokens, starts)


def _open_array(path: Path, dtype: str, length: int, sha256: str | None) -> np.ndarray:
    """Memory-map a file after checking its size, and its hash unless that is None."""
    expected = length * np.dtype(dtype).itemsize
    if not path.is_file():
        raise DataError(f"{path} is missing; {expected} bytes expected", hint=REMAKE_HINT)
    size = path.stat().st_size
    if size != expected:
        raise DataError(f"{path} is {'cut off' if size < expected else 'too long'}: {size} bytes, {expected} expected", hint=REMAKE_HINT)
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise DataError(f"{path} was altered: its sha256 is {found[:16]}..., {sha256[:16]}... expected", hint=REMAKE_HINT)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,)).view(np.ndarray)  # plain: slicing a memmap object is slow
