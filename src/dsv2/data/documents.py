"""Documents out of files, folders and stdin, one at a time.

A text file (.txt, .md) is one document; a .jsonl file holds one in each line and a .parquet file one in each row, both in the field
``text``. Text and .jsonl files may be compressed (.gz, .zst). Memory holds one document, whatever the size of the corpus. Nothing
is repaired in silence: damage is a DataError that says where, and what is replaced or skipped is counted.
"""

import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from dsv2.data.decompress import DECOMPRESS, import_extra, split_lines
from dsv2.errors import ConfigError, DataError

InvalidUtf8 = Literal["error", "replace"]
Layout = Literal["text", "jsonl", "parquet", "unknown"]

READABLE = ".txt, .md, .jsonl (each also with .gz or .zst) and .parquet"
REPLACEMENT = "\ufffd"
SHARD_NUMBER = re.compile(r"(?:^|[-_])\d+(?:(?:-of)?[-_]\d+)*$")  # of a file's name: en-00001, train-00000-of-00008
SURROGATES = re.compile("[\ud800-\udfff]")
REPLACE_HINT = "convert it to UTF-8, or let what is invalid be replaced and counted: --invalid-utf8 replace"
# All control characters but those that text uses: backspace, tab, line feed, vertical tab, form feed, carriage return, escape.
CONTROLS = bytes(byte for byte in (*range(32), 127) if byte not in b"\b\t\n\v\f\r\x1b")
MAX_JUNK_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from.

    Attributes:
        text: never blank, encodable as UTF-8.
        domain: kind of text, e.g. "en" or "code"; everything later is counted and validated by domain.
        source: the file, or "stdin".
        location: place in the file: "line 12", "row 12" or "whole file".
        path: name of the file that the text was, where a row tells it in its field ``path``: the kind of code goes by it.
    """

    text: str
    domain: str
    source: str
    location: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, what it holds, and the domain of those of its documents that do not name their own.

    Attributes:
        path: None is stdin.
        num_bytes: size on disk, 0 for stdin.
    """

    path: Path | None
    domain: str
    layout: Layout
    compression: str = ""
    num_bytes: int = 0

    def __str__(self) -> str:
        return "stdin" if self.path is None else str(self.path)


class DocumentStream(Iterator[Document]):
    """All documents of some files, in order; made by :func:`read_documents`.

    The counts grow while it is read and are final at its end.

    Attributes:
        replaced: replacement characters put in place of invalid UTF-8 and lone surrogates, by domain.
        skipped: blank documents and empty files left out, by domain.
        ignored_files: files found in folders whose kind is not readable.
        total_bytes: size of all files on disk; None when stdin is among them.
        bytes_read: how much of it has been read, for a progress bar.
    """

    def __init__(self, files: Sequence[SourceFile], *, given: Sequence[str], invalid_utf8: InvalidUtf8, ignored_files: int) -> None:
        self.replaced: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.ignored_files = ignored_files
        self.total_bytes = None if any(file.path is None for file in files) else sum(file.num_bytes for file in files)
        self.bytes_read = 0
        self._files = files
        self._given = given  # by the caller, for messages
        self._invalid_utf8 = invalid_utf8
        self._documents = self._read_all()

    def __next__(self) -> Document:
        return next(self._documents)

    def _read_all(self) -> Iterator[Document]:
        empty = True
        before = 0
        for file in self._files:
            for document in self._read(file, before):
                empty = False
                yield document
            before += file.num_bytes
            self.bytes_read = before
        if empty:
            raise DataError(
                f"no document in {', '.join(self._given[:5]) or 'no file'}: "
                f"{len(self._files)} files read, {self.skipped.total()} blank documents skipped, "
                f"{self.ignored_files} files of other kinds ignored",
                hint=f"give at least one file with text; readable are {READABLE}",
            )

    def _read(self, file: SourceFile, before: int) -> Iterator[Document]:
        if file.layout == "parquet":
            return self._parquet(file, before)
        chunks = self._chunks(file, before)
        layout, chunks = _guess_layout(chunks) if file.layout == "unknown" else (file.layout, chunks)
        return self._jsonl(file, chunks) if layout == "jsonl" else self._text(file, chunks)

    def _chunks(self, file: SourceFile, before: int) -> Iterator[bytes]:
        """Yield a file's decompressed bytes and keep ``bytes_read`` up to date."""
        try:
            with nullcontext(sys.stdin.buffer) if file.path is None else file.path.open("rb") as raw:
                for chunk in DECOMPRESS[file.compression](raw):
                    if file.path is not None:
                        self.bytes_read = before + raw.tell()
                    yield chunk
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged(file, error) from error
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error

    def _text(self, file: SourceFile, chunks: Iterable[bytes]) -> Iterator[Document]:
        data = b"".join(chunks)
        _refuse_controls(data, file)
        text, replaced = self._decode(data, str(file))
        if replaced > MAX_JUNK_SHARE * len(text):
            first = len(text[: text.index(REPLACEMENT)].encode())
            raise DataError(
                f"{file} is not UTF-8 text: {replaced} of {len(text)} characters had to be replaced, the first at byte offset {first}",
                hint="convert it to UTF-8 or leave it out",
            )
        yield from self._document(file, text.removeprefix("\ufeff"), file.domain, "whole file", replaced)

    def _jsonl(self, file: SourceFile, chunks: Iterable[bytes]) -> Iterator[Document]:
        offset = 0
        for number, line in enumerate(split_lines(chunks), 1):
            place = f"{file}:{number}"
            text, replaced = self._decode(line, place, offset)
            row = parse_row(text.removeprefix("\ufeff") if number == 1 else text, place)
            if row is not None:
                yield from self._row(file, row, place, f"line {number}", replaced)
            offset += len(line) + 1

    def _parquet(self, file: SourceFile, before: int) -> Iterator[Document]:
        pyarrow = import_extra("pyarrow", f"reading {file}")
        parquet = import_extra("pyarrow.parquet", f"reading {file}")
        number = 0
        try:
            with parquet.ParquetFile(file.path) as table:
                columns = _text_columns(pyarrow, table.schema_arrow, file)
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    # As bytes: pyarrow's own decoding of a damaged string names neither row nor offset.
                    values = [batch.column(name).cast(pyarrow.large_binary()).to_pylist() for name in columns]
                    for cells in zip(*values, strict=True):
                        number += 1
                        yield from self._cells(file, dict(zip(columns, cells, strict=True)), number)
                    self.bytes_read = before + file.num_bytes * number // table.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(file, error) from error

    def _cells(self, file: SourceFile, cells: dict[str, bytes | None], number: int) -> Iterator[Document]:
        place = f"{file}: row {number}"
        decoded = {name: (None, 0) if cell is None else self._decode(cell, f"{place}, field {name}") for name, cell in cells.items()}
        row = {name: text for name, (text, _) in decoded.items()}
        yield from self._row(file, row, place, f"row {number}", sum(count for _, count in decoded.values()))

    def _row(self, file: SourceFile, row: dict[str, Any], place: str, location: str, replaced: int) -> Iterator[Document]:
        """Turn a line of .jsonl or a row of .parquet into a document."""
        if "text" not in row:
            seen = ", ".join(map(repr, list(row)[:12])) or "none"
            raise DataError(f'{place}: no field "text"; fields seen: {seen}', hint='every row needs its text in the field "text"')
        domain = file.domain if row.get("domain") in (None, "") else row["domain"]
        for name, value in (("text", row["text"]), ("domain", domain)):
            if not isinstance(value, str):
                raise DataError(f'{place}: the field "{name}" holds {type(value).__name__}, not a string')
        text, in_text = self._without_surrogates(row["text"], place)
        domain, in_domain = self._without_surrogates(domain, place)
        path = row.get("path")
        path = path.encode(errors="replace").decode() if isinstance(path, str) else ""
        yield from self._document(file, text, domain, location, replaced + in_text + in_domain, path)

    def _document(self, file: SourceFile, text: str, domain: str, location: str, replaced: int, path: str = "") -> Iterator[Document]:
        if replaced:
            self.replaced[domain] += replaced
        if not text or text.isspace():
            self.skipped[domain] += 1
        else:
            yield Document(text, domain, str(file), location, path)

    def _decode(self, data: bytes, place: str, offset: int = 0) -> tuple[str, int]:
        """Return the text and how many of its characters are replacements; ``offset`` is where ``data`` begins in its file."""
        try:
            return data.decode(), 0
        except UnicodeDecodeError as error:
            if self._invalid_utf8 == "replace":
                text = data.decode(errors="replace")
                return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
            wrong = f"invalid UTF-8 at byte offset {offset + error.start} (byte 0x{data[error.start]:02x})"
            raise DataError(f"{place}: {wrong}", hint=REPLACE_HINT) from None

    def _without_surrogates(self, text: str, place: str) -> tuple[str, int]:
        """Return the text and how many were replaced: JSON can spell half a surrogate pair, which has no UTF-8."""
        try:
            text.encode()
            return text, 0
        except UnicodeEncodeError as error:
            if self._invalid_utf8 == "replace":
                return SURROGATES.subn(REPLACEMENT, text)
            wrong = f"lone surrogate \\u{ord(text[error.start]):04x} at character {error.start} of the string"
            raise DataError(f"{place}: {wrong}", hint=REPLACE_HINT) from None


def read_documents(paths: Sequence[str | Path], *, domain: str | None = None, invalid_utf8: InvalidUtf8 = "error") -> DocumentStream:
    """Return the documents of files and folders as a stream that reads lazily.

    A folder is read recursively in sorted order; hidden files are left out and files of another kind are counted as ignored. A
    document's domain is its row's field ``domain``, else the argument, else the name of the file. In a folder it is the name of the
    first sub-folder, or of the folder itself; but the .jsonl and .parquet files that lie in the folder itself go by their own names
    where these differ in more than the number of a shard: en-0.jsonl, en-1.jsonl and zh.jsonl are en and zh.

    Args:
        paths: files, folders, or "-" for stdin, which is .jsonl when its first character is "{" and one text otherwise.
        domain: domain of the documents that do not name their own.
        invalid_utf8: "error" refuses the file and names the place; "replace" puts U+FFFD there and counts.

    Raises:
        ConfigError: ``invalid_utf8`` is neither.
        DataError: a path is missing or of another kind. While reading: damaged, binary or truncated files; rows without ``text``;
            no document at all.
        MissingExtra: while reading .zst without zstandard, or .parquet without pyarrow.
    """
    if invalid_utf8 not in get_args(InvalidUtf8):
        raise ConfigError(f'invalid_utf8 = {invalid_utf8!r}; it can be "error" or "replace"')
    given = [str(path) for path in paths]
    files, ignored = source_files(given, domain)
    return DocumentStream(files, given=given, invalid_utf8=invalid_utf8, ignored_files=ignored)


def source_files(paths: Sequence[str], domain: str | None = None) -> tuple[list[SourceFile], int]:
    """Return the readable files that the paths mean, in order, and how many of other kinds lie beside them; see :func:`read_documents`.

    Raises:
        DataError: a path is missing or of another kind.
    """
    files: list[SourceFile] = []
    ignored = 0
    for path in paths:
        if path == "-":
            files.append(SourceFile(None, domain or "stdin", "unknown"))
        elif os.path.isdir(path):
            found, others = _files_of(Path(path), domain)
            files += found
            ignored += others
        else:
            files.append(_single_file(Path(path), domain))
    return files, ignored


def _single_file(path: Path, domain: str | None) -> SourceFile:
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    file = _source_file(path, domain or path.name.split(".")[0] or path.name)
    if file is None:
        raise DataError(f"{path}: cannot read files of this kind ({path.suffix or 'no extension'})", hint=f"readable are {READABLE}")
    return file


def _files_of(folder: Path, domain: str | None) -> tuple[list[SourceFile], int]:
    """Return the readable files below a folder and the number of the others."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    files: list[SourceFile] = []
    others = 0
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(here).relative_to(folder).parts
        default = domain or (inner[0] if inner else folder.resolve().name)
        read = [_source_file(Path(here, name), default) for name in sorted(names) if not name.startswith(".")]
        found = [file for file in read if file is not None]
        files += found if inner or domain else _by_their_names(found)
        others += len(read) - len(found)
    return files, others


def _by_their_names(files: list[SourceFile]) -> list[SourceFile]:
    """Return the files of one folder, those of rows with the domains that their names tell, if the names tell several."""
    names = [SHARD_NUMBER.sub("", file.path.name.split(".")[0]) if file.path and file.layout != "text" else None for file in files]
    if len(set(names) - {None}) < 2:
        return files
    return [replace(file, domain=name or file.domain) for file, name in zip(files, names, strict=True)]


def _source_file(path: Path, domain: str) -> SourceFile | None:
    """Return what can be read from ``path`` going by its name, None for other kinds of file."""
    if not path.is_file():
        return None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    kinds: dict[str, Layout] = {".txt": "text", ".md": "text", ".jsonl": "jsonl"}
    if not compression:
        kinds[".parquet"] = "parquet"
    layout = kinds.get(suffixes[-1]) if suffixes else None
    return None if layout is None else SourceFile(path, domain, layout, compression, path.stat().st_size)


def _guess_layout(chunks: Iterator[bytes]) -> tuple[Layout, Iterator[bytes]]:
    head: list[bytes] = []
    for chunk in chunks:
        head.append(chunk)
        if start := chunk.lstrip(b"\xef\xbb\xbf \t\r\n"):
            return "jsonl" if start.startswith(b"{") else "text", chain(head, chunks)
    return "text", iter(head)


def parse_row(line: str, place: str) -> dict[str, Any] | None:
    """Return the object of a line, None for a blank line."""
    if not line or line.isspace():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: invalid JSON, {error.msg} at column {error.colno}", hint="each line holds one JSON object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise DataError(f"{place}: unreadable JSON, {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(row).__name__}", hint='each line looks like {"text": "..."}')
    return row


def _refuse_controls(data: bytes, file: SourceFile) -> None:
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(f"{file} is not text: NUL byte at byte offset {nul}", hint="leave it out, or convert it to UTF-8 if it is UTF-16")
    controls = len(data) - len(data.translate(None, CONTROLS))
    if controls > MAX_JUNK_SHARE * len(data):
        first = next(at for at, byte in enumerate(data) if byte in CONTROLS)
        raise DataError(
            f"{file} is not text: {controls} of its {len(data)} bytes are control characters, the first at byte offset {first}",
            hint="leave it out",
        )


def _text_columns(pyarrow: Any, schema: Any, file: SourceFile) -> list[str]:
    """Return which of the columns text, domain and path a parquet file has, all of strings."""
    if "text" not in schema.names:
        seen = ", ".join(map(repr, schema.names[:12])) or "none"
        raise DataError(f'{file}: no column "text"; columns seen: {seen}', hint='every row needs its text in the column "text"')
    columns = []
    for column in ("text", "domain", "path"):
        if column not in schema.names:
            continue
        kind = schema.field(column).type
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if pyarrow.types.is_string(values) or pyarrow.types.is_large_string(values) or pyarrow.types.is_null(values):
            columns.append(column)
        elif column != "path":  # which is of use where it is a name, and no harm elsewhere
            raise DataError(f'{file}: the column "{column}" holds {kind}, not strings')
    return columns


def damaged(file: SourceFile, error: Exception) -> DataError:
    """Return the error that says a file is damaged, and how."""
    return DataError(f"{file} is damaged or cut off: {error}", hint="fetch or make the file again")


def in_pieces(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Cut a stream into runs of whole documents; each but the last has at least so many characters."""
    piece: list[Document] = []
    size = 0
    for document in documents:
        piece.append(document)
        size += len(document.text)
        if size >= characters:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
