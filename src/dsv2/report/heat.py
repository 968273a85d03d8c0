"""Maps and bars: which experts work, for whom, and how well each domain is predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv2.report.drawing import GREY, HUES, INK, LETTER, RULE, SOFT, drawing

# The two ends of a map: fixed, since an image inside the drawing cannot follow the page. Readable on both papers.
IDLE_RGB, BUSY_RGB = (0.31, 0.55, 0.85), (0.93, 0.49, 0.22)
WRITTEN_COLUMNS = 20  # columns of a map whose cells are wide enough for a number
CELL = 0.3  # inches of a row


@dataclass(frozen=True, slots=True)
class Heat:
    """Shares as a map.

    Args:
        title: above it.
        rows: their names.
        columns: their names, written where there is room.
        shares: [rows][columns]; every row sums to 1.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]


def heat_maps(maps: Sequence[Heat], xlabel: str) -> str:
    """Draw shares relative to an even share, one map above the other; colour follows the logarithm and is full at a factor of 2."""
    num_rows = max(len(heat.rows) for heat in maps)
    height = max(0.55, min(6.0, CELL * num_rows if num_rows <= 12 else 1.2 + 0.06 * num_rows))
    left = 0.25 + LETTER * max(len(name) for heat in maps for name in heat.rows)
    with drawing(height, rows=len(maps), left=left, top=0.3 if maps[0].title else 0.05, gap=0.55) as (axes, result):
        for panel, heat in zip(axes[:, 0], maps, strict=True):
            draw_map(panel, heat)
            if heat.title:
                panel.set_title(heat.title)
        axes[-1][0].set_xlabel(xlabel)
    return result[0]


def draw_map(panel: Any, heat: Heat) -> None:
    """Draw one map."""
    ratio = np.asarray(heat.shares, dtype=float) * len(heat.columns)
    rows, columns = ratio.shape
    # Doubled and halved load are equally strong.
    strength = np.clip(np.log(np.maximum(ratio, 1e-3)) / np.log(2.0), -1.0, 1.0)
    image = np.zeros((rows, columns, 4))
    image[..., :3] = np.where((strength > 0)[..., None], BUSY_RGB, IDLE_RGB)
    image[..., 3] = np.abs(strength) ** 0.8
    panel.grid(False)
    panel.imshow(image, aspect="auto", interpolation="nearest")
    for edge in np.arange(-0.5, rows if rows <= 30 else 0):
        panel.axhline(edge, color=RULE, linewidth=0.6)
    if columns <= WRITTEN_COLUMNS and rows <= 16:
        for row, column in np.ndindex(rows, columns):
            panel.text(column, row, f"{ratio[row, column]:.1f}", ha="center", va="center", fontsize=8, color=INK)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    step = max(1, rows // 12)
    panel.set_yticks(range(0, rows, step), heat.rows[::step])
    step = 1 if columns <= WRITTEN_COLUMNS else max(1, columns // 16)
    panel.set_xticks(range(0, columns, step), heat.columns[::step])


def bits_per_byte_bars(values: Mapping[str, Mapping[str, float]]) -> str:
    """Draw bars of bits per byte: a group for each domain, a bar for each predictor, the first of them (the model) in colour.

    Args:
        values: domain -> predictor -> bits per byte; predictors may be missing in some domains.
    """
    num_bars = sum(len(group) for group in values.values())
    left = 0.2 + LETTER * max(len(name) for name in values)
    with drawing(0.235 * num_bars + 0.16 * len(values), left=left, top=0.05) as (grid, result):
        axes = grid[0][0]
        axes.grid(False)
        place, ticks = 0.0, []
        longest = max(value for group in values.values() for value in group.values())
        for group in values.values():
            start = place
            for rank, (name, value) in enumerate(group.items()):
                axes.barh(place, value, height=0.82, color=HUES[0] if rank == 0 else GREY, alpha=1.0 if rank == 0 else 0.5)
                weight = "bold" if rank == 0 else "normal"
                text = axes.text(value + longest * 0.012, place, f"{value:.2f}", va="center", color=INK, fontweight=weight)
                if num_bars > len(values):
                    axes.annotate(name, (1, 0.5), xycoords=text, xytext=(5, 0), textcoords="offset points", va="center", color=SOFT)
                place += 1
            ticks.append((start + place - 1) / 2)
            place += 0.7
        axes.set_yticks(ticks, list(values))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(place - 0.9, -0.6)
        axes.set_xlim(0, longest * 1.22)
        axes.set_xlabel("bits per byte of held-out text (less is better)")
    return result[0]
