"""The paper and pencils of every figure: inline SVG in the page's own colours, so that it follows light and dark.

Every function that draws returns markup to be set into HTML as it is. matplotlib is loaded by the first drawing.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

WIDTH = 7.4  # inches of 96 CSS pixels: the page shows figures 712 pixels wide, so that their letters have the page's size
LETTER = 0.076  # inches that a letter of a label takes, about

# matplotlib draws with the colour on the left; the markup then says the CSS variable on the right.
INK, SOFT, RULE, PAPER, GREY = "#010101", "#020202", "#030303", "#040404", "#050505"
HUES = ("#110101", "#120202", "#130303", "#140404", "#150505", "#160606")
CSS_COLOURS = {INK: "--ink", SOFT: "--soft", RULE: "--rule", PAPER: "--paper", GREY: "--grey"} | {
    hue: f"--c{i}" for i, hue in enumerate(HUES, start=1)
}
DASHES = ("-", "--", ":")

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsv2",
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve: ``y`` against ``x`` (tokens, or whatever the axis says), both [num_points]; ``times``, in seconds, where known."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    times: tuple[float, ...] = ()


@contextmanager
def drawing(
    height: float, *, rows: int = 1, columns: int = 1, left: float = 0.5, right: float = 0.15, top: float = 0.3, gap: float = 0.5
) -> Iterator[tuple[Any, list[str]]]:
    """Give (axes [rows][columns], result) to draw on; the SVG is appended to ``result`` when the block ends.

    Args:
        height: inches of one row's plot.
        rows: of panels.
        columns: of panels.
        left: margin for the tick labels, inches.
        right: margin for the names of curves, inches.
        top: margin for the first row's title, inches.
        gap: between two rows, inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    bottom = 0.5
    total = top + bottom + rows * height + (rows - 1) * gap
    result: list[str] = []
    # A name in a script that the measuring font lacks is drawn by the browser's font all the same.
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDTH, total), dpi=96)
        figure.patch.set_alpha(0.0)
        axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if columns > 1 else False)
        figure.subplots_adjust(
            left=left / WIDTH, right=1 - right / WIDTH, top=1 - top / total, bottom=bottom / total, wspace=0.17, hspace=gap / height
        )
        for panel in axes.flat:
            panel.patch.set_alpha(0.0)
        yield axes, result
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    result.append(inline(buffer.getvalue()))


def inline(svg: str) -> str:
    """Turn a stand-alone SVG document into markup for the inside of a page: no prologue, no metadata, no unused ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # its rule would hold for the whole page
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)  # a hundredth of a point is enough
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def smooth(line: Line, num_points: int) -> tuple[list[float], list[float]]:
    """Return the means of ``num_points`` equal stretches of a curve, its first point kept; a shorter curve as it is."""
    if len(line.x) <= num_points:
        return list(line.x), list(line.y)
    pairs = zip(np.array_split(line.x, num_points), np.array_split(line.y, num_points), strict=True)
    means = [(float(x.mean()), float(y.mean())) for x, y in pairs]
    return [line.x[0], *(x for x, _ in means)], [line.y[0], *(y for _, y in means)]


def thin(line: Line, num_points: int) -> tuple[Sequence[float], Sequence[float]]:
    """Return at most about ``num_points`` points of a curve, evenly taken."""
    step = max(1, len(line.x) // num_points)
    return line.x[::step], line.y[::step]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return ascending places at least ``gap`` apart, each group of close values centred on its mean."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and bottom(groups[-1], gap) < bottom(groups[-2], gap) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [bottom(group, gap) + gap * i for group in groups for i in range(len(group))]


def bottom(group: Sequence[float], gap: float) -> float:
    """Return the lowest place of a group that is centred on its mean."""
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def count(value: float) -> str:
    """Return a number of tokens or parameters in short: 950, 12k, 1.5M, 8.1T."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
