"""How a run on preferences went: accuracy on held-out ones, how far its probabilities can be believed, and by how much it decides."""

from typing import Any

import numpy as np

from dsv2.report.curves import Chart, charts, coloured
from dsv2.report.drawing import GREY, HUES, drawing
from dsv2.report.page import FigureSection, Section, TableSection
from dsv2.report.record import Record, domain_name, line_of

_ACCURACY = ("accuracy", "rewards/accuracies")  # of a reward model, of DPO
_MARGIN = ("margin", "rewards/margins")


def preference_sections(record: Record) -> list[Section]:
    """Return the sections of a run on preferences; nothing for other runs."""
    lines = record.of_kind("evaluation")
    accuracy = next((name for name in _ACCURACY if lines and name in lines[-1]), None)
    if accuracy is None:
        return []
    margin = _MARGIN[_ACCURACY.index(accuracy)]
    return [_table(lines[-1], accuracy, margin), *_curves(record, lines, accuracy, margin), *_calibration(lines[-1])]


def _table(last: dict[str, Any], accuracy: str, margin: str) -> TableSection:
    shown = [("accuracy", accuracy), ("mean margin", margin), ("loss, nats", "loss"), ("calibration error", "calibration_error")]
    shown = [(title, name) for title, name in shown if name in last]
    rows = tuple((domain_name(domain), *(f"{last[name][domain]:.3f}" for _, name in shown)) for domain in last[accuracy])
    note = "Margin: reward of the chosen answer less that of the rejected one."
    return TableSection("Held-out preferences", ("source", *(title for title, _ in shown)), rows, note)


def _curves(record: Record, lines: list[dict[str, Any]], accuracy: str, margin: str) -> list[Section]:
    rows = []
    for title, name in (("accuracy", accuracy), ("margin", margin)):
        held = [line_of(domain_name(domain), [(line, line[name][domain]) for line in lines]) for domain in lines[-1][name]]
        curves = coloured([line for line in held if line is not None], dots=True)
        if len(lines) > 1:
            rows.append(Chart(f"{title} on held-out preferences", curves, level=(0.5, "guessing") if name == accuracy else None))
    if not rows:
        return []
    caption = "Held-out preferences while the model trains, by source; a dot for each evaluation."
    return [FigureSection("Accuracy and margin", charts(rows, height=1.9), caption)]


def _calibration(last: dict[str, Any]) -> list[Section]:
    if "calibration" not in last:
        return []
    believed = (
        "Held-out preferences in ten bins by the probability that the model gave to the answer that it prefers (point-wise: to the answer "
        "being right): across, the mean of a bin; up, how often it was so. On the grey line probabilities are what they say; below it the "
        "model is too sure of itself. The larger a dot, the more preferences are in its bin."
    )
    decided = "How far apart the rewards are. Right of 0 the model decides as the data does, left of it the other way."
    return [
        FigureSection("Calibration", reliability(last["calibration"]), believed),
        FigureSection("Margins", margin_histogram(last["margins"]), decided),
    ]


def reliability(domains: dict[str, Any]) -> str:
    """Draw (predicted, observed, counts) of each domain's bins against the line where both are equal."""
    low = min(0.5, *(min(predicted) for predicted, _, _ in domains.values())) if domains else 0.0
    with drawing(3.0, left=0.6, right=1.3) as (axes, result):
        panel = axes[0][0]
        panel.plot([low, 1], [low, 1], color=GREY, linewidth=1)
        for number, (domain, (predicted, observed, counts)) in enumerate(domains.items()):
            colour, share = HUES[number % len(HUES)], np.asarray(counts) / max(1, sum(counts))
            panel.plot(predicted, observed, color=colour, linewidth=1.4)
            panel.scatter(predicted, observed, s=12 + 260 * share, color=colour)
            panel.annotate(
                domain_name(domain), (predicted[-1], observed[-1]), xytext=(10, 0), textcoords="offset points", color=colour,
                va="center", annotation_clip=False,
            )  # fmt: skip
        panel.set_xlim(low, 1.0)
        panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel("predicted probability")
        panel.set_title("observed share")
    return result[0]


def margin_histogram(domains: dict[str, Any]) -> str:
    """Draw how the margins (edges, counts) of each domain are spread."""
    with drawing(1.9, left=0.6) as (axes, result):
        panel = axes[0][0]
        for number, (edges, counts) in enumerate(domains.values()):
            share = np.asarray(counts, dtype=float) / max(1, sum(counts))
            panel.stairs(share, edges, color=HUES[number % len(HUES)], linewidth=1.4)
        panel.axvline(0.0, color=GREY, linewidth=1)
        panel.set_xlabel("margin")
        panel.set_title("share of the held-out preferences")
    return result[0]
