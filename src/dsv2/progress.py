"""What a run says while it works: tables and progress bars on stderr.

Rank-aware through the environment variable RANK, which torchrun sets: only rank 0 speaks. Data belongs on stdout and does not
go through here, but for the tables of a verb whose answer they are.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    pass

LINE_INTERVAL_S = 10.0  # between two plain progress lines where stderr is no terminal
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
