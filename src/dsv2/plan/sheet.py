"""What an answer is made of: tables whose last column says how a number comes about, the same values for JSON, and a drawing."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from shutil import get_terminal_size
from textwrap import fill
from typing import Any

from dsv2.errors import ConfigError
from dsv2.progress import table


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table.

    Args:
        title: line above it.
        columns: their names; those but the first and a last one named "how" or "why" are numbers and stand to the right.
        rows: cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """All that is said to one question.

    Args:
        sheets: tables, in the order they are printed.
        words: sentences after them.
        assumptions: pairs (what is assumed, why), printed last.
        values: the numbers, for JSON.
        draw: makes the PNG.
        problem: raised after printing; None where all is well.
    """

    sheets: Sequence[Sheet]
    words: Sequence[str]
    assumptions: Sequence[tuple[str, str]]
    values: dict[str, Any]
    draw: Callable[[], bytes]
    problem: ConfigError | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """Return all that is said as one object: the values, the sentences, what is assumed."""
        assumed = [{"what": what, "why": why} for what, why in self.assumptions]
        return self.values | {"words": list(self.words), "assumptions": assumed}


def show(answer: Answer) -> None:
    """Print an answer on stdout; on a terminal its sentences are wrapped, else each is one line.

    Args:
        answer: what to print.
    """
    sheets = [*answer.sheets]
    for index, sheet in enumerate(sheets):
        if index:
            print()
        numbers = sheet.columns[1:-1] if sheet.columns[-1] in ("how", "why") else sheet.columns[1:]
        table(sheet.title, sheet.columns, sheet.rows, right=numbers, stdout=True)
    if answer.words:
        print()
        width = get_terminal_size().columns if sys.stdout.isatty() else 0
        print("\n".join(fill(sentence, width) if width else sentence for sentence in answer.words))
    print()
    table("Assumptions", ("what", "why"), answer.assumptions, stdout=True)


def gb(num_bytes: float) -> str:
    """Write bytes as GB of 1e9, the unit of data sheets.

    Args:
        num_bytes: how many.

    Returns:
        Two decimals below 10, else one.
    """
    value = num_bytes / 1e9
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}"


def count(number: float) -> str:
    """Write a large number in three digits with K, M, G or T.

    Args:
        number: which.

    Returns:
        Such as "172.8K", "15.6M".
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            value = number / size
            return f"{value:.2f}{unit}" if value < 10 else f"{value:.1f}{unit}"
    return f"{number:.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def percent(share: float) -> str:
    """Write a share as a percentage with one decimal.

    Args:
        share: 0 to 1.

    Returns:
        Such as "20.8 %".
    """
    return f"{100 * share:.1f} %"


def clock(seconds: float) -> str:
    """Write seconds in the unit that reads best.

    Args:
        seconds: how many.

    Returns:
        Such as "2.40 ms" or "11.60 s"; "0 s" for none.
    """
    if seconds == 0:
        return "0 s"
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
