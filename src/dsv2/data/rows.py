"""Rows of conversations, preferences and prompts out of files: what may be read, what is refused and why, and a report of both."""

import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dsv2.data.cells import as_json
from dsv2.data.decompress import DECOMPRESS, import_extra, split_lines
from dsv2.data.documents import SourceFile, damaged, parse_row, source_files
from dsv2.errors import DataError

READABLE = ".jsonl (also with .gz or .zst) and .parquet"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Attributes:
        fields: those that are not null.
        domain: kind of what it holds, as of documents: its field ``domain``, else the name of its file or folder.
        place: file and row, for messages.
    """

    fields: Mapping[str, Any]
    domain: str
    place: str


@dataclass(slots=True)
class ReadingReport:
    """What became of the rows of some files; grows while they are read.

    Attributes:
        noun: what the rows are to be, in words.
        rest: what becomes of fields that the readers do not know, in words.
        rows: how many there were.
        read: rows that are, by form.
        refused: rows that are not or cannot be used, by reason.
        first_refused: place of the first row of each reason.
        other_fields: fields that the readers do not know, and in how many rows.
        foreign: values of parquet that JSON has not, by column and type (``data/cells.py``).
    """

    noun: str = "conversations"
    rest: str = "fields without a use here"
    rows: int = 0
    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: dict[str, str] = field(default_factory=dict)
    other_fields: Counter[str] = field(default_factory=Counter)
    foreign: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, place: str) -> None:
        """Count a row that is not used."""
        self.refused[reason] += 1
        self.first_refused.setdefault(reason, place)

    def require_few_refused(
        self, name: str, most: float, *, section: str = "data", room: str = "raise run.seq_len or set data.too_long=cut"
    ) -> None:
        """Refuse files of which too little can be used.

        Args:
            name: of the files, for the message.
            most: share of the rows that may be refused.
            section: of the recipe that says so, for the message.
            room: how rows that are too long are made to fit, for the hint.

        Raises:
            DataError: more are.
        """
        refused = self.refused.total()
        if refused > most * self.rows:
            raise DataError(
                f"{refused:,} of {self.rows:,} {name} rows are refused, more than {section}.max_refused = {most:g}:\n  "
                + "\n  ".join(self.lines()[1:]),
                hint=f"mend the rows, {room} where they are too long, or raise {section}.max_refused",
            )

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        forms = ", ".join(f"{count:,} as {form}" for form, count in self.read.most_common()) or "none"
        found = [f"{self.rows:,} rows, {self.read.total():,} of them {self.noun}: {forms}"]
        found += [f"{count:,} rows refused: {reason} (first: {self.first_refused[reason]})" for reason, count in self.refused.most_common()]
        foreign = "values that JSON has not, read as text or numbers or left out"
        for said, counts in ((self.rest, self.other_fields), (foreign, self.foreign)):
            if counts:
                found.append(f"{said}: " + ", ".join(f"{name} ({n:,})" for name, n in counts.most_common(8)))
        return found


class Refused(Exception):
    """A row is not what it should be; the text says why, in words that are equal for equal faults."""


def read_rows(
    paths: Sequence[str | Path], report: ReadingReport, read: Callable[[Row], tuple[str, Collection[str], T]], *, forms: str
) -> Iterator[T]:
    """Yield what the rows of files and folders hold, in order, and count in ``report`` what was read and refused.

    Args:
        paths: files and folders.
        report: also says what the rows are to be.
        read: told a row, returns the name of its form, the fields that the form knows, and what it holds; or raises Refused.
        forms: the page that shows the forms, for the hint.

    Raises:
        DataError: a path is missing, a file is damaged or of another kind, a line is no JSON object; or every row is refused.
        MissingExtra: .parquet without pyarrow, .zst without zstandard.
    """
    given = [str(path) for path in paths]
    for file in source_files(given)[0]:
        if file.layout == "text":
            raise DataError(f"{file} holds text, not {report.noun}", hint=f"readable are {READABLE}")
        for number, fields in _rows_of(file, report):
            domain = fields.get("domain")
            row = Row(
                {name: value for name, value in fields.items() if value is not None},
                domain if isinstance(domain, str) and domain else file.domain,
                f"{file}:{number}",
            )
            report.rows += 1
            try:
                form, known, found = read(row)
            except Refused as reason:
                report.refuse(str(reason), row.place)
                continue
            report.read[form] += 1
            report.other_fields.update(name for name in row.fields if name not in known)
            yield found
    if not report.read:
        seen = "; ".join(report.lines()[1:]) or "no rows"
        raise DataError(f"no {report.noun} in {', '.join(given) or 'no file'}: {seen}", hint=f"{forms} shows the forms that are read")


def _rows_of(file: SourceFile, report: ReadingReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the fields of each row; a blank line has a number and is left out."""
    if file.layout == "parquet":
        yield from enumerate(_parquet(file, report), 1)
        return
    try:
        with nullcontext(sys.stdin.buffer) if file.path is None else file.path.open("rb") as raw:
            for number, line in enumerate(split_lines(DECOMPRESS[file.compression](raw)), 1):
                row = parse_row(_decode(line, file, number), f"{file}:{number}")
                if row is not None:
                    yield number, row
    except (EOFError, OSError, zlib.error) as error:
        raise damaged(file, error) from error


def _decode(line: bytes, file: SourceFile, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}:{number}: invalid UTF-8 at byte {error.start} of the line", hint="convert the file to UTF-8") from None


def _parquet(file: SourceFile, report: ReadingReport) -> Iterator[dict[str, Any]]:
    pyarrow = import_extra("pyarrow", f"reading {file}")
    parquet = import_extra("pyarrow.parquet", f"reading {file}")
    try:
        with parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=256):
                for cells in batch.to_pylist():
                    yield {name: as_json(cell, name, report.foreign) for name, cell in cells.items()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(file, error) from error
