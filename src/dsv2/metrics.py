"""The metrics of a run: JSON lines beside its checkpoints, which grow, are cut back where a run goes on, and are read one by one."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2.errors import DataError, MissingExtra
from dsv2.files import disk_errors
from dsv2.progress import is_main_rank

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WIDEST_CHARTED = 8  # numbers a layer, such as loads of devices, that TensorBoard gets a curve each of; of more, nobody looks at them


class MetricsLog:
    """The metrics of a run, one JSON object a line: ``{"step": 12, "kind": "train", "loss": 4.21, ...}``.

    Every line is flushed, so a killed process loses at most the line that it was writing; a torn last line is removed when the log is
    opened again. A value that is NaN or infinite is written as null, since JSON knows neither. Ranks other than 0 write nothing.

    Args:
        path: the file, made when the first line is written.
        tensorboard: write numbers and texts to a folder ``tensorboard`` beside it as well, each under kind, name and what it is of:
            ``train/loss``, ``validation/bits_per_byte/en``, ``train/router/entropy/layer_2``.

    Raises:
        MissingExtra: ``tensorboard`` is wanted and not installed.
    """

    def __init__(self, path: Path, *, tensorboard: bool = False) -> None:
        if tensorboard and find_spec("tensorboard") is None:
            raise MissingExtra("tensorboard", "tensorboard", "writing TensorBoard metrics")
        self.path = path
        self._file: FileIO | None = None
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        if is_main_rank() and path.exists():
            _truncate(path, lambda content: content.rfind(b"\n") + 1)  # the next line would be glued to a torn one

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append one line.

        Args:
            step: optimiser steps done.
            kind: what the line holds, such as "train", "validation" or "sample".
            **values: plain Python: numbers, texts, dicts of them, and lists: a number, or a list of numbers, for each layer.

        Raises:
            DataError: the disk is full or may not be written.
        """
        if not is_main_rank():
            return
        line = json.dumps({"step": step, "kind": kind} | _finite(values), ensure_ascii=False, allow_nan=False)
        with disk_errors(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            rest = line.encode() + b"\n"
            while rest:  # a disk that fills up takes a part first and complains the next time
                rest = rest[self._file.write(rest) :]
            if self._tensorboard:
                self._write_tensorboard(step, kind, values)

    def cut_back(self, step: int) -> None:
        """Drop the lines after ``step``, and a torn last line, at one stroke: a resumed run writes them again.

        Steps ascend, so of a file of any size the lines that go are read, and the one before them.

        Raises:
            DataError: one of these lines is damaged, and not the last; or the file may not be written.
        """
        self._close_files()
        self._purge_step = step + 1
        if is_main_rank() and self.path.exists():
            _truncate(self.path, lambda content: _end_of(content, step, self.path))

    def close(self) -> None:
        """Close the files; a later ``write`` opens them again."""
        self._close_files()

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_tensorboard(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self._purge_step)
        for tag, value in _tagged(kind, values):
            if isinstance(value, str):
                self._writer.add_text(tag, value, step)
            else:
                self._writer.add_scalar(tag, value, step)


def _tagged(tag: str, value: Any) -> Iterator[tuple[str, float | str]]:
    """Yield every number and text in a value under its TensorBoard tag: ``train/loss``, ``train/router/entropy/layer_2``."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _tagged(f"{tag}/{name}", item)
    elif isinstance(value, list):
        for number, item in enumerate(value, start=1):
            if not isinstance(item, list):
                yield from _tagged(f"{tag}/layer_{number}", item)
            elif len(item) <= WIDEST_CHARTED:
                yield from ((f"{tag}/layer_{number}/{place}", entry) for place, entry in enumerate(item))
    elif isinstance(value, int | float | str):
        yield tag, value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, leaving out a torn last line; errors as of ``stream_metrics``."""
    return list(stream_metrics(path))


def stream_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file one at a time, leaving out a torn last line.

    Raises:
        DataError: there is no such file, or a line before the last is damaged.
    """
    if not path.is_file():
        raise DataError(f"there are no metrics at {path}", hint="give the folder of a training run")
    damaged = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if damaged:
                raise damaged
            row = _row(line)
            if row is None:
                damaged = _no_metrics(f"{path}:{number}", line)
            else:
                yield row


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the object of a whole line with its newline; None: it is torn or damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _no_metrics(place: str, line: bytes) -> DataError:
    return DataError(f"{place}: not a line of metrics: {line[:60]!r}", hint="remove that line")


def _truncate(path: Path, end_of: Callable[[mmap | bytes], int]) -> None:
    """Cut a file where ``end_of`` says that it is to end; it is told the content, mapped, which is read where it is looked at."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap(file.fileno(), 0, access=ACCESS_READ) if size else nullcontext(b"") as content:
            end = end_of(content)
    if end < size:
        with disk_errors(path):
            os.truncate(path, end)


def _end_of(content: mmap | bytes, step: int, path: Path) -> int:
    """Return the end of the last line that belongs to ``step`` or an earlier one; 0: there is none."""
    newest = end = content.rfind(b"\n") + 1
    while end:
        begin = content.rfind(b"\n", 0, end - 1) + 1
        row = _row(content[begin:end])
        if row is None and end < newest:
            raise _no_metrics(f"{path}, byte {begin:,}", content[begin:end])
        if row is not None and row["step"] <= step:
            break
        end = begin
    return end


def _finite(value: Any) -> Any:
    """Return the value with null for every NaN and infinity in it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
