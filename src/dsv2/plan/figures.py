"""Drawings as PNG; matplotlib is loaded by the first of them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from math import log2
from typing import Any

from dsv2.parallel.fit import GENERATED, RATIO, YARDSTICK_GENERATED
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.search import Found
from dsv2.parallel.simulate import COST, TrainPlan

INK, SOFT, RULE = "#1f2430", "#69707d", "#dfe2e8"
HUES = ("#2f6fde", "#d9622b", "#2a9d74", "#8a5cc2", "#c9a227", "#b0b6c2")
SETTINGS: dict[str, Any] = {
    "font.size": 10, "font.family": ["DejaVu Sans"], "text.color": INK, "axes.edgecolor": RULE, "axes.labelcolor": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


@contextmanager
def drawing(panels: Sequence[float], width: float, height: float, title: str) -> Iterator[tuple[list[Any], list[bytes]]]:
    """Give (axes, result) to draw on, one axes above the other; the PNG is appended to ``result`` when the block ends.

    Args:
        panels: their relative heights.
        width: inches.
        height: inches.
        title: above them all; a second line is written small.
    """
    import matplotlib
    from matplotlib.figure import Figure

    result: list[bytes] = []
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": list(panels)})
        head, _, foot = title.partition("\n")
        figure.suptitle(head, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
        axes = [row[0] for row in grid]
        axes[0].set_title(foot, color=SOFT, fontsize=9, pad=8)
        yield axes, result
        buffer = BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    result.append(buffer.getvalue())


def scaling(name: str, hardware: Hardware, plan: TrainPlan, points: Sequence[tuple[int, Found]]) -> bytes:
    """Draw the best layout of each number of GPUs: tokens/s, MFU, and where a step's time goes.

    Args:
        name: the model.
        hardware: where.
        plan: the layout that was asked for; drawn as a diamond.
        points: (GPUs, what a search found), rising.

    Returns:
        A PNG.
    """
    fitting = [(gpus, found.best[0]) for gpus, found in points if found.best]
    missing = [(gpus, found.smallest) for gpus, found in points if not found.best]
    layout = plan.layout
    sizes = f"{points[0][0]:,} to {points[-1][0]:,}"
    title = (
        f"Training {name} on {sizes} {hardware.name}\nthe best layout of each number of GPUs (pp x ep x dp); {layout.batch:,} sequences"
        f" of {layout.seq_len:,} tokens a step at every size, {layout.schedule if layout.pp > 1 else 'any schedule'}"
    )
    with drawing((1.25, 1.25, 1), 9.6, 9.2, title) as (axes, result):
        _rates(axes[0], fitting, plan)
        _utilisation(axes[1], fitting, plan)
        _parts(axes[2], fitting)
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_xlim(points[0][0] / 1.5, points[-1][0] * 1.5)
            _shade(axis, missing, axis is axes[0], hardware)
        axes[-1].set_xticks([gpus for gpus, _ in points], [f"{gpus:,}" for gpus, _ in points])
        axes[-1].minorticks_off()
        axes[-1].set_xlabel("GPUs")
    return result[0]


def _rates(axis: Any, fitting: Sequence[tuple[int, TrainPlan]], plan: TrainPlan) -> None:
    axis.set_ylabel("tokens/s")
    axis.set_yscale("log")
    if not fitting:
        return
    sizes, rates = [gpus for gpus, _ in fitting], [best.tokens_per_second for _, best in fitting]
    per_gpu = max(rate / gpus for gpus, rate in zip(sizes, rates, strict=True))
    axis.plot(sizes, [per_gpu * gpus for gpus in sizes], color=SOFT, linestyle=":", linewidth=1.2, label="in proportion to the best")
    axis.plot(sizes, rates, color=HUES[0], marker="o", markersize=5, linewidth=2, label="best layout")
    if plan.fits:
        axis.plot([plan.layout.gpus], [plan.tokens_per_second], "D", color=HUES[1], markersize=8, label=plan.layout.label)
    axis.legend(loc="upper left")  # the curve rises; what does not fit or divide is written at the bottom


def _utilisation(axis: Any, fitting: Sequence[tuple[int, TrainPlan]], plan: TrainPlan) -> None:
    axis.set_ylabel("MFU with attention, %")
    if not fitting:
        return
    values = [100 * best.mfu[1] for _, best in fitting]
    axis.plot([gpus for gpus, _ in fitting], values, color=HUES[0], marker="o", markersize=5, linewidth=2)
    axis.set_ylim(0, max([*values, 100 * plan.mfu[1] if plan.fits else 0.0]) * 1.4)
    for (gpus, best), value in zip(fitting, values, strict=True):  # in a row above the curve, where no line runs
        text = f"{value:.1f}\n{best.layout.pp}x{best.layout.ep}x{best.layout.dp}\nZeRO-{best.layout.zero}"
        axis.annotate(text, (gpus, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
    if plan.fits:
        axis.plot([plan.layout.gpus], [100 * plan.mfu[1]], "D", color=HUES[1], markersize=8)


def _parts(axis: Any, fitting: Sequence[tuple[int, TrainPlan]]) -> None:
    axis.set_ylabel("share of a step, %")
    axis.set_ylim(0, 100)
    axis.grid(False)
    sizes = [gpus for gpus, _ in fitting]
    bottoms = [0.0] * len(fitting)
    for part, hue in zip(COST, HUES, strict=True):
        shares = [100 * best.cost[part] / best.step_seconds for _, best in fitting]
        axis.bar(sizes, shares, bottom=bottoms, width=[0.5 * gpus for gpus in sizes], color=hue, label=part)
        bottoms = [low + share for low, share in zip(bottoms, shares, strict=True)]
    if fitting:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(COST))


def _shade(axis: Any, missing: Sequence[tuple[int, TrainPlan | None]], says: bool, hardware: Hardware) -> None:
    for gpus, nearest in missing:
        axis.axvspan(gpus / 2**0.5, gpus * 2**0.5, color=RULE, alpha=0.55, linewidth=0)
        if says:
            reason = (
                "does not\ndivide"
                if nearest is None
                else f"does not fit\n{nearest.needed / 1e9:,.0f} of {hardware.memory_bytes / 1e9:.0f} GB"
            )
            axis.annotate(reason, (gpus, 0.04), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7.5, color=SOFT)


def contexts(
    name: str,
    hardware: Hardware,
    gpus: int,
    resident: float,
    utilisation: float,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    published: bool,
) -> bytes:
    """Draw generated tokens/s against the cached tokens of a request.

    Args:
        name: the model.
        hardware: where.
        gpus: how many.
        resident: cached tokens of a request in the planned traffic.
        utilisation: of all curves.
        curves: name -> points (cached tokens, tokens/s); the first is the model as asked.
        published: draw the published rates at the planned traffic; the last curve is then the yardstick.

    Returns:
        A PNG.
    """
    title = (
        f"Serving {name} on {gpus} {hardware.name}\ngenerated tokens/s by roofline at utilisation {utilisation:g}, as many requests as the"
        " cache holds"
    )
    with drawing((2.0, 1.0) if published else (1.0,), 9.0, 7.4 if published else 5.0, title) as (axes, result):
        for index, (label, points) in enumerate(curves.items()):
            axes[0].plot([x for x, _ in points], [y for _, y in points], color=HUES[index], linewidth=2.2, label=label)
        axes[0].axvline(resident, color=SOFT, linestyle=":", linewidth=1.2)
        longest = max([resident, *(x for points in curves.values() for x, _ in points)])
        rates = [y for points in curves.values() for _, y in points]
        left = resident > longest / 4
        axes[0].annotate(
            f"planned traffic, {resident:,.0f}", (resident, 0.02), (-4 if left else 4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right" if left else "left", color=SOFT, fontsize=8.5,
        )  # fmt: skip
        if published:
            for rate, text, place in (
                (GENERATED, "55.5K, read off figure 1(b)", (9, 4)),
                (YARDSTICK_GENERATED, "9.65K", (-9, -14)),
            ):
                axes[0].plot([resident], [rate], "D", color=INK, markersize=7)
                axes[0].annotate(
                    text, (resident, rate), place, textcoords="offset points", ha="left" if place[0] > 0 else "right", fontsize=9
                )
            _ratio(axes[1], resident, curves)
        wide = bool(rates) and max(rates) > 10 * min(rates)
        if wide:
            axes[0].set_yscale("log")
        else:  # within a decade a log axis may have no tick
            axes[0].set_ylim(0, None)
        axes[0].legend(loc="upper right" if wide else "lower left")
        axes[0].set_ylabel("generated tokens/s")
        axes[-1].set_xscale("log", base=2)
        ticks = [2**power for power in range(int(log2(longest)) - 7, int(log2(longest)) + 2) if power >= 0]
        axes[-1].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes[-1].minorticks_off()
        axes[-1].set_xlabel("cached tokens of a request: prompt + answer / 2")
    return result[0]


def _ratio(axis: Any, resident: float, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    names = list(curves)
    base = dict(curves[names[-1]])
    for index, name in enumerate(names[:-1]):
        points = [(x, y / base[x]) for x, y in curves[name] if x in base]
        axis.plot([x for x, _ in points], [y for _, y in points], color=HUES[index], linewidth=2.2)
    axis.axhspan(0.75 * RATIO, 1.25 * RATIO, color=HUES[0], alpha=0.1, linewidth=0)
    axis.axhline(RATIO, color=INK, linewidth=1)
    axis.annotate(
        f"published {RATIO} x, within 25 %", (0.01, RATIO), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=8.5, color=INK,
    )  # fmt: skip
    axis.axvline(resident, color=SOFT, linestyle=":", linewidth=1.2)
    axis.set_ylim(0, None)
    axis.set_ylabel(f"ratio to {names[-1]}")
