"""What a run says while it works: tables and progress bars on stderr, metrics as JSON lines beside the checkpoints.

Rank-aware through the environment variable RANK, which torchrun sets: only rank 0 speaks and writes. Data belongs on stdout and does not
go through here, but for the tables of a verb whose answer they are.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dsv2.errors import DataError, MissingExtra
from dsv2.files import disk_errors

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LINE_INTERVAL_S = 10.0  # between two plain progress lines where stderr is no terminal
WIDEST_CHARTED = 8  # numbers a layer, such as loads of devices, that TensorBoard gets a curve each of; of more, nobody looks at them
PIPE_WIDTH = 100  # of a table on stdout that is no terminal, in characters


def is_main_rank() -> bool:
    """Tell whether this process is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """Return the console on stderr; silent on ranks other than 0."""
    return _console(is_main_rank())


@cache
def _console(speaks: bool) -> Console:
    # One object per process: a line printed while a bar is live goes above the bar only when both use the same console.
    return Console(stderr=True, quiet=not speaks, highlight=False)


def say(text: str) -> None:
    """Print a message on stderr as it is, ``[`` without meaning."""
    console().print(text, markup=False, highlight=False, soft_wrap=True, style="dim")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = (), stdout: bool = False) -> None:
    """Print a table on stderr; cells are shown as ``str`` gives them, numbers to the right, ``[`` without meaning.

    Args:
        title: line above it.
        columns: their names.
        rows: as many cells each as there are columns.
        right: columns of texts that read as numbers.
        stdout: the table is what was asked for, data and no message; 100 characters wide where that is no terminal.
    """
    shown = Table(title_justify="left", show_edge=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[place], int | float) for row in rows)
        shown.add_column(Text(column), justify="right" if numeric or column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    if stdout:
        _print_data(title, shown)
    else:
        shown.title = Text(title)
        console().print(shown)


def _print_data(title: str, shown: Table) -> None:
    """Print a table on stdout, indented below its title, without blanks at the ends of lines."""
    data = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with data.capture() as captured:
        data.print(Text(title, style="bold"))
        data.print(Padding(shown, (0, 0, 0, 2)))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


# Progress ---------------------------------------------------------------------------------------------------------------------------


@runtime_checkable
class Bar(Protocol):
    """What ``bar`` gives: tell it how much is done, and what to show beside it."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more units as done; a field stays on show until it is given again."""


_showing = False  # a bar is on show in this process


@contextmanager
def bar(total: int | None, description: str, *, unit: str, done: int = 0) -> Iterator[Bar]:
    """Show progress on stderr with the remaining time; a plain line every 10 s at most where that is no terminal; nothing off rank 0.

    A bar inside another, such as a checkpoint being written during training, shows nothing: the outer one is what its reader waits for.

    Args:
        total: units in all; None when that is not known.
        description: what is going on, one or two words.
        unit: plural of what is counted, such as "steps".
        done: units done before this process started, when it resumes; they do not count for the speed.
    """
    global _showing
    if not is_main_rank() or _showing:
        yield _SilentBar()
        return
    _showing = True
    try:
        if console().is_terminal:
            yield from _live(total, description, unit, done)
        else:
            lines = _LineBar(total, description, unit, done)
            try:
                yield lines
            finally:
                lines.finish()
    finally:
        _showing = False


@contextmanager
def transfer_bar(total_bytes: int, description: str) -> Iterator[Callable[[int], None]]:
    """Show bytes being moved, with their speed in GB/s; the block is given a function to tell how many more were.

    A transfer of less than a gigabyte is over before anybody asks, and shows nothing.
    """
    if total_bytes < 10**9:
        yield lambda num_bytes: None
        return
    started, done = monotonic(), 0
    with bar(total_bytes // 10**6, description, unit="MB") as shown:

        def advance(num_bytes: int) -> None:
            nonlocal done
            before, done = done, done + num_bytes
            shown.advance(done // 10**6 - before // 10**6, GB_per_s=done / 1e9 / max(monotonic() - started, 1e-3))

        yield advance


class _SilentBar:
    def advance(self, n: int = 1, **fields: object) -> None:
        pass


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID, total: int | None, unit: str, done: int) -> None:
        self._progress, self._task, self._total, self._unit, self._done = progress, task, total, unit, done
        self._fields: dict[str, object] = {}

    def advance(self, n: int = 1, **fields: object) -> None:
        self._done += n
        self._fields |= fields
        count = _count(self._done, self._total, self._unit)
        self._progress.update(self._task, advance=n, count=count, fields=_show(self._fields))


def _live(total: int | None, description: str, unit: str, done: int) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[fields]}", markup=False),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console(), refresh_per_second=4) as progress:  # 4: the cores are for the work
        task = progress.add_task(description, total=total, completed=done, count=_count(done, total, unit), fields="")
        yield _LiveBar(progress, task, total, unit, done)


class _LineBar:
    def __init__(self, total: int | None, description: str, unit: str, done: int) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done = self._done_before = done
        self._fields: dict[str, object] = {}
        self._started = self._printed = monotonic()
        self._fresh = False  # something was counted since the last line

    def advance(self, n: int = 1, **fields: object) -> None:
        self._done += n
        self._fields |= fields
        self._fresh = True
        if monotonic() - self._printed >= LINE_INTERVAL_S:
            self._print()

    def finish(self) -> None:
        if self._fresh:
            self._print()

    def _print(self) -> None:
        self._printed, self._fresh = monotonic(), False
        elapsed, worked = self._printed - self._started, self._done - self._done_before
        parts = [f"{self._description}: {_count(self._done, self._total, self._unit)}", _show(self._fields)]
        if self._total and worked and self._done < self._total:
            parts.append(f"ETA {_clock(elapsed * (self._total - self._done) / worked)}")
        else:
            parts.append(f"in {_clock(elapsed)}")
        console().print(", ".join(filter(None, parts)), markup=False, soft_wrap=True)


def _count(done: int, total: int | None, unit: str) -> str:
    return f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit} ({100 * done // max(total, 1)}%)"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _show(fields: dict[str, object]) -> str:
    """Write fields for reading: ``loss=4.20691, tokens_per_s=4100.2`` becomes ``loss 4.207, 4,100 tokens/s``."""
    shown = []
    for name, value in fields.items():
        number = (
            f"{value:,.4g}"
            if isinstance(value, float) and abs(value) < 1000
            else f"{value:,.0f}"
            if isinstance(value, int | float)
            else str(value)
        )
        shown.append(
            f"{number} {name.removesuffix('_per_s').replace('_', ' ')}/s"
            if name.endswith("_per_s")
            else f"{name.replace('_', ' ')} {number}"
        )
    return ", ".join(shown)


# Metrics ----------------------------------------------------------------------------------------------------------------------------


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
