"""Curves: charts one above the other, against tokens and, beside it, against time. Lines carry their names or values at their ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2.report.drawing import DASHES, GREY, HUES, LETTER, SOFT, Line, count, drawing, smooth, spread, thin

POINTS = 120  # of a smoothed curve
RAW_POINTS = 1200  # of the thin curve behind it
UNEQUAL = 20.0  # times longer than the shortest line is the longest where the axis becomes logarithmic
EARLY = 0.04  # share of a run whose values do not set the height of a chart


@dataclass(frozen=True, slots=True)
class Curve:
    """A line and how it is drawn.

    Args:
        line: what is drawn.
        colour: one of ``drawing.py``.
        dash: of matplotlib.
        dots: a dot for each point, which are few and not smoothed.
        raw: the single points thin behind the smoothed curve.
        named: its end is labelled.
    """

    line: Line
    colour: str
    dash: str = "-"
    dots: bool = False
    raw: bool = False
    named: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves that share a scale.

    Args:
        title: what is drawn and its unit.
        curves: at least one.
        form: how the last value is written at a curve's end.
        names: write the curve's name there as well.
        log: a logarithmic scale where the values span a factor of 8.
        cut: the plunge of the first steps runs out of the top, so that the part that takes long is not squeezed.
        level: a horizontal line, such as perfect balance, and its name.
        marks: tokens where something happened; triangles at the top.
        whole: counts, ticks at whole numbers only.
    """

    title: str
    curves: tuple[Curve, ...]
    form: str = "{:.2f}"
    names: bool = True
    log: bool = False
    cut: bool = False
    level: tuple[float, str] | None = None
    marks: tuple[float, ...] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Horizontal:
    """What runs to the right.

    Args:
        label: what, and its unit.
        second: of the lines' times in that unit; 0: the axis is the lines' ``x``.
        ticks: how a tick is written; None: as it is.
    """

    label: str
    second: float = 0.0
    ticks: Callable[[float], str] | None = None


TOKENS = Horizontal("training tokens", ticks=count)
LAYERS = Horizontal("MoE layer")


def coloured(lines: Sequence[Line], *, dots: bool = False) -> tuple[Curve, ...]:
    """Give each line its colour, and a dash where the colours do not suffice."""
    return tuple(Curve(line, *style(index), dots=dots) for index, line in enumerate(lines))


def style(index: int) -> tuple[str, str]:
    """Return (colour, dash) of the line of that number; of a run, the same in every figure of a page."""
    return HUES[index % len(HUES)], DASHES[index // len(HUES) % len(DASHES)]


def charts(rows: Sequence[Chart], *, height: float = 1.9, timed: bool = False, over: Horizontal = TOKENS) -> str:
    """Draw charts one above the other.

    Args:
        rows: from the top; all run over the same.
        height: of one, inches.
        timed: draw each against time as well, beside it; lines without times are left out there.
        over: what the left column runs over.
    """
    columns = [over]
    seconds = max((curve.line.times[-1] for chart in rows for curve in chart.curves if curve.line.times), default=0.0)
    if timed and seconds > 0:
        columns.append(time_axis(seconds))
    longest = max((len(end_label(chart, curve)) for chart in rows for curve in chart.curves if curve.named), default=0)
    levels = [len(chart.level[1]) for chart in rows if chart.level]
    with drawing(height, rows=len(rows), columns=len(columns), right=min(2.4, 0.2 + LETTER * max([longest, *levels]))) as (axes, result):
        for row, chart in enumerate(rows):
            for place, horizontal in enumerate(columns):
                panel = axes[row][place]
                prepare(panel, horizontal, [curve.line for chart in rows for curve in chart.curves], labelled=row == len(rows) - 1)
                draw_curves(panel, chart, horizontal)
            axes[row][0].set_title(chart.title)
            scale(axes[row][0], chart)
        axes[0][0].figure.canvas.draw()  # the places of the labels need the final scales
        for row, chart in enumerate(rows):
            name_ends(axes[row][-1], chart, columns[-1])
    return result[0]


def time_axis(seconds: float) -> Horizontal:
    """Return the axis of training time in the unit that fits its end."""
    size, unit = next(((size, unit) for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")) if seconds >= 2 * size), (1, "s"))
    return Horizontal(f"training time, {unit}", second=1 / size)


def places(line: Line, horizontal: Horizontal) -> tuple[float, ...]:
    """Return where a line's points lie on an axis; nowhere if it has no times and the axis is of time."""
    return tuple(time * horizontal.second for time in line.times) if horizontal.second else line.x


def prepare(panel: Any, horizontal: Horizontal, lines: Sequence[Line], *, labelled: bool) -> None:
    """Set up the horizontal axis of a panel for all lines of the figure; ticks of the lowest row are labelled.

    Lines of very unequal length, as runs of different sizes have, get a logarithmic axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    spans = [span for line in lines if (span := places(line, horizontal))]
    first, last = min(span[0] for span in spans), max(span[-1] for span in spans)
    if first > 0 and last > UNEQUAL * min(span[-1] for span in spans):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlim(first, last * 1.05)
    else:
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=horizontal is LAYERS))
        margin = 0.15 if horizontal is LAYERS else 0.0
        panel.set_xlim((first if horizontal is LAYERS else 0.0) - margin, last * 1.01 + margin)
    ticks = horizontal.ticks or "{:g}".format
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: ticks(value)))
    panel.grid(False, axis="x")
    panel.spines["left"].set_visible(False)
    panel.tick_params(labelbottom=labelled)
    if labelled:
        panel.set_xlabel(horizontal.label)


def draw_curves(panel: Any, chart: Chart, horizontal: Horizontal) -> None:
    """Draw what a chart holds into one panel."""
    for curve in chart.curves:
        line = curve.line
        if not places(line, horizontal):
            continue
        line = Line(line.name, places(line, horizontal), line.y)
        if curve.raw:
            panel.plot(*thin(line, RAW_POINTS), color=GREY, linewidth=0.7, alpha=0.5)
        x, y = (line.x, line.y) if curve.dots else smooth(line, POINTS)
        marker = {"marker": "o", "markersize": 3.2} if curve.dots else {}
        panel.plot(x, y, color=curve.colour, linestyle=curve.dash, linewidth=1.5, **marker)
    if chart.level is not None:
        panel.axhline(chart.level[0], color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)))
    if chart.marks and not horizontal.second:
        panel.plot(
            chart.marks, [0.97] * len(chart.marks), transform=panel.get_xaxis_transform(), linestyle="", marker="v", markersize=5,
            color=HUES[1], clip_on=False,
        )  # fmt: skip


def scale(panel: Any, chart: Chart) -> None:
    """Set the vertical scale of a row from its values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    points = [(x >= EARLY * curve.line.x[-1], y) for curve in chart.curves for x, y in zip(*shown_points(curve), strict=True)]
    late = [y for is_late, y in points if is_late or not chart.cut]
    values = late + ([chart.level[0]] if chart.level else [])
    low, high = min(values), max(values)
    if chart.log and low > 0 and high > 8 * low:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_ylim(low / 1.1, high * 1.1)
        return
    panel.yaxis.set_major_locator(MaxNLocator(5, integer=chart.whole, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if abs(value) >= 1000 else f"{value:.6g}"))
    high = max(high, low + 1) if chart.whole else high
    room = 0.06 * (high - low) if high - low > 1e-3 * abs(high) else max(0.05 * abs(high), 1e-12)
    panel.set_ylim(low - room, high + room)


def shown_points(curve: Curve) -> tuple[Sequence[float], Sequence[float]]:
    """Return the points of a curve that a reader sees, raw ones where they are drawn."""
    return thin(curve.line, RAW_POINTS) if curve.raw else (curve.line.x, curve.line.y) if curve.dots else smooth(curve.line, POINTS)


def end_label(chart: Chart, curve: Curve) -> str:
    """Return what is written at the end of a curve."""
    value = chart.form.format(last_value(curve))
    return f"{curve.line.name} {value}" if chart.names else value


def last_value(curve: Curve) -> float:
    """Return the height at which a curve ends."""
    return float(curve.line.y[-1] if curve.dots else smooth(curve.line, POINTS)[1][-1])


def name_ends(panel: Any, chart: Chart, horizontal: Horizontal) -> None:
    """Write the labels at the right of the last panel, pushed apart where they would overlap."""
    labels = [
        (last_value(curve), end_label(chart, curve), curve.colour)
        for curve in chart.curves
        if curve.named and places(curve.line, horizontal)
    ]
    if chart.level is not None and chart.level[1]:
        labels.append((chart.level[0], chart.level[1], SOFT))
    to_fraction = panel.transAxes.inverted().transform
    ordered = sorted((min(1.0, max(0.0, float(to_fraction(panel.transData.transform((1.0, value)))[1]))), n, c) for value, n, c in labels)
    height = panel.get_position().height * panel.figure.get_figheight() * 72
    heights = spread([fraction for fraction, _, _ in ordered], 12 / height)
    lift = max(0.0, -min(heights, default=0.0))  # below the axis lie the labels of its ticks
    for place, (_, name, colour) in zip(heights, ordered, strict=True):
        panel.annotate(
            name, (1, place + lift), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points", va="center", color=colour,
            annotation_clip=False,
        )  # fmt: skip
