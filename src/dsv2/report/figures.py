"""Drawings as inline SVG whose colours are the page's own, so that they follow light and dark; matplotlib is loaded by the first drawing.

Every function returns markup to be set into HTML as it is. Lines carry their names at their ends instead of a legend.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

WIDTH = 7.5  # inches of 96 CSS pixels; the page shows figures 720 pixels wide

# matplotlib draws with the colour on the left; the markup then says the CSS variable on the right.
INK, SOFT, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
HUES = ("#110101", "#120202", "#130303", "#140404", "#150505")
CSS_COLOURS = {INK: "--ink", SOFT: "--soft", RULE: "--rule", PAPER: "--paper"} | {hue: f"--c{i}" for i, hue in enumerate(HUES, start=1)}

# The two ends of the load map: fixed, since an image inside the drawing cannot follow the page. Readable on both papers.
IDLE_RGB, BUSY_RGB = (0.31, 0.55, 0.85), (0.93, 0.49, 0.22)

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsv2",
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
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
    """A named curve: ``y`` against ``x``, both [num_points]."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@contextmanager
def drawing(height: float) -> Iterator[tuple[Any, Any, list[str]]]:
    """Give (figure, axes, result) to draw on; the SVG is appended to ``result`` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    result: list[str] = []
    # A name in a script that the measuring font lacks is drawn by the browser's font all the same.
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDTH, height), dpi=96)
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        yield figure, axes, result
        buffer = StringIO()
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            bbox_inches="tight",
            pad_inches=0.05,
        )
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
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def loss_curves(train: Line, validation: Sequence[Line]) -> str:
    """Draw the training loss, raw and smoothed, and the validation loss of each domain, in nats per token against tokens."""
    with drawing(3.7) as (_, axes, result):
        raw_x, raw_y = thin(train, 1200)
        axes.plot(raw_x, raw_y, color=HUES[4], linewidth=0.7, alpha=0.45)
        smooth_x, smooth_y = smooth(train, 120)
        axes.plot(smooth_x, smooth_y, color=INK, linewidth=1.7)
        ends = [(smooth_y[-1], train.name, INK)]
        for index, line in enumerate(validation):
            hue = HUES[index % 4]
            axes.plot(line.x, line.y, color=hue, linewidth=1.5, marker="o", markersize=3.6)
            ends.append((line.y[-1], line.name, hue))
        # The plunge of the first steps runs out of the top, so that the part that takes long is not squeezed.
        start = 0.04 * train.x[-1]
        points = [*zip(raw_x, raw_y, strict=True), *(point for line in validation for point in zip(line.x, line.y, strict=True))]
        late = [y for x, y in points if x >= start] or [y for _, y in points]
        axes.set_ylim(min(late) - 0.1, max(late) + 0.1)
        name_ends(axes, ends)
        token_axis(axes, "loss, nats per token", train.x[-1])
    return result[0]


def compare_losses(lines: Sequence[Line]) -> str:
    """Draw the smoothed training losses of several runs, in nats per token against tokens."""
    with drawing(3.7) as (_, axes, result):
        ends = []
        for index, line in enumerate(lines):
            x, y = smooth(line, 120)
            hue = HUES[index % len(HUES)]
            axes.plot(x, y, color=hue, linewidth=1.7, linestyle=("-", "--", ":")[index // len(HUES) % 3])
            ends.append((y[-1], line.name, hue))
        name_ends(axes, ends)
        token_axis(axes, "training loss, nats per token", max(line.x[-1] for line in lines))
    return result[0]


def bits_per_byte_bars(values: Mapping[str, Mapping[str, float]]) -> str:
    """Draw bars of bits per byte: a group for each domain, a bar for each predictor, the first of them (the model) in colour.

    Args:
        values: domain -> predictor -> bits per byte; predictors may be missing in some domains.
    """
    num_bars = sum(len(group) for group in values.values())
    with drawing(0.55 + 0.235 * num_bars + 0.16 * len(values)) as (_, axes, result):
        axes.grid(False)
        place, ticks = 0.0, []
        longest = max(value for group in values.values() for value in group.values())
        for group in values.values():
            start = place
            for rank, (name, value) in enumerate(group.items()):
                axes.barh(place, value, height=0.82, color=HUES[0] if rank == 0 else HUES[4], alpha=1.0 if rank == 0 else 0.5)
                weight = "bold" if rank == 0 else "normal"
                text = axes.text(value + longest * 0.012, place, f"{value:.2f}", va="center", color=INK, fontweight=weight)
                axes.annotate(
                    name, (1, 0.5), xycoords=text, xytext=(5, 0), textcoords="offset points", va="center", color=SOFT, parse_math=False
                )
                place += 1
            ticks.append((start + place - 1) / 2)
            place += 0.7
        axes.set_yticks(ticks, list(values))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(place - 0.9, -0.6)
        axes.set_xlim(0, longest * 1.22)
        axes.set_xlabel("bits per byte of held-out text (less is better)")
    return result[0]


def expert_load_map(load: Sequence[Sequence[float]]) -> str:
    """Draw each expert's share of the assignments relative to a uniform share: a row for each MoE layer, a column for each expert.

    Args:
        load: [layers][experts]; every row sums to 1.
    """
    ratio = np.asarray(load, dtype=float) * len(load[0])
    layers, experts = ratio.shape
    # Doubled and halved load are equally strong: the colour follows the logarithm, and is full at a factor of 2.
    strength = np.clip(np.log(np.maximum(ratio, 1e-3)) / np.log(2.0), -1.0, 1.0)
    image = np.zeros((layers, experts, 4))
    image[..., :3] = np.where((strength > 0)[..., None], BUSY_RGB, IDLE_RGB)
    image[..., 3] = np.abs(strength) ** 0.8
    with drawing(min(6.5, 0.75 + max(1.1, 0.34 * layers))) as (_, axes, result):
        axes.grid(False)
        axes.imshow(image, aspect="auto", interpolation="nearest")
        for edge in np.arange(-0.5, layers):
            axes.axhline(edge, color=RULE, linewidth=0.6)
        if layers * experts <= 256 and experts <= 20:
            for layer, expert in np.ndindex(layers, experts):
                axes.text(expert, layer, f"{ratio[layer, expert]:.1f}", ha="center", va="center", fontsize=8, color=INK)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        step = max(1, layers // 12)
        axes.set_yticks(range(0, layers, step), [f"MoE layer {layer + 1}" for layer in range(0, layers, step)])
        axes.set_xticks(range(0, experts, max(1, experts // 16)))
        axes.set_xlabel("routed expert")
    return result[0]


def imbalance_curves(lines: Sequence[Line]) -> str:
    """Draw the busiest expert's load relative to the mean against tokens, a line for each MoE layer; 1 is perfect balance."""
    with drawing(2.7) as (_, axes, result):
        ends = []
        for index, line in enumerate(lines):
            x, y = smooth(line, 120)
            few = len(lines) <= len(HUES)
            hue = HUES[index] if few else HUES[0]
            axes.plot(x, y, color=hue, linewidth=1.5 if few else 0.9, alpha=1.0 if few else 0.25 + 0.75 * index / len(lines))
            if few or index in (0, len(lines) - 1):
                ends.append((y[-1], line.name, hue))
        axes.axhline(1.0, color=SOFT, linewidth=0.8)
        axes.set_ylim(bottom=0.9)
        name_ends(axes, ends)
        token_axis(axes, "busiest expert / mean", lines[0].x[-1])
    return result[0]


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


def token_axis(axes: Any, ylabel: str, last: float) -> None:
    """Label the axes; tokens are counted in thousands, millions or billions, up to ``last``."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.grid(False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, last * 1.01)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(ylabel)


def name_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, name, colour) at the right end of the curves, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    height = axes.figure.get_figheight() * 72 * 0.8  # points of the plot's height, about
    gap = (high - low) * 12 / height
    ordered = sorted(ends)
    places = spread([value for value, _, _ in ordered], gap)
    for place, (value, name, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            f"{name} {value:.2f}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            parse_math=False,
            annotation_clip=False,
        )


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
