"""Several runs beside each other: what differs in their recipes, the same quantities overlaid, and how they ended.

A run has one colour on the whole page. Runs that lack a quantity are left out of its chart, and a chart that no run fills is left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

from dsv2.report.balance import DIVERGENCE, EVEN, specialisation
from dsv2.report.curves import Chart, Curve, charts, style
from dsv2.report.drawing import Line, count
from dsv2.report.learning import TIMES
from dsv2.report.page import ChapterSection, FigureSection, Section, TableSection, TextSection, duration
from dsv2.report.record import Record, domain_name, in_order, over_layers

LOSS_ROWS = 5  # of END_ROWS; bits per byte follow them
ABSENT = "\u2013"
Key = tuple[tuple[str, int], ...]


def comparison_sections(records: Sequence[Record]) -> list[Section]:
    """Return the sections of a page about several runs."""
    key = tuple((record.name, index) for index, record in enumerate(records))
    return [
        ends_section(records),
        *differences_section(records),
        ChapterSection("Learning", "Runs differ in speed: what learns most from a token need not learn most in a second."),
        *learning_sections(records, key),
        ChapterSection("Steps", "The optimiser, step by step; thick lines are means."),
        *step_sections(records, key),
        *routing_sections(records, key),
    ]


def ends_section(records: Sequence[Record]) -> TableSection:
    """Return how each run ended: a row for each quantity, a column for each run; quantities that no run has are left out."""
    read_rows = [(title, [read(record) for record in records]) for title, read in END_ROWS]
    domains = in_order({domain: None for record in records for domain in record.held_out("bits_per_byte")})
    for place, domain in enumerate(domains, start=LOSS_ROWS):
        ends = [held_out(record, domain) for record in records]
        read_rows.insert(place, (f"{domain_name(domain)}, bits per byte", [None if line is None else f"{line.y[-1]:.3f}" for line in ends]))
    rows = [
        (title, *(ABSENT if value is None else value for value in cells))
        for title, cells in read_rows
        if any(value is not None for value in cells)
    ]
    note = "Training loss, mean norm, loads and drops: over the last tenth of the steps. "
    note += "Bits per byte: held-out text at the last validation, less is better." if domains else ""
    return TableSection("At the end", ("", *(record.name for record in records)), tuple(rows), note.strip(), runs=True)


def late(line: Line | None) -> tuple[float, ...]:
    """Return the last tenth of a line's values, one at least; nothing of no line."""
    return () if line is None else line.y[-max(1, len(line.y) // 10) :]


def cell(form: str, reduce: Callable[[Sequence[float]], float], values: Sequence[float]) -> str | None:
    """Return reduced values in words; None where there are none."""
    return form.format(reduce(values)) if values else None


def elapsed(record: Record) -> str | None:
    """Return how long a run's steps took."""
    seconds = record.train[-1].get("elapsed_s")
    return None if seconds is None else duration(seconds)


def loss_at_end(record: Record) -> str:
    """Return the mean training loss of the last tenth; the last step's may not have been finite."""
    return "not finite" if record.train[-1]["loss"] is None else f"{fmean(late(record.series('loss'))):.3f}"


def values_of(record: Record, key: str) -> tuple[float, ...]:
    """Return all values of a number of the training lines."""
    line = record.series(key)
    return () if line is None else line.y


END_ROWS: tuple[tuple[str, Callable[[Record], str | None]], ...] = (
    ("steps", lambda record: f"{record.train[-1]['step']:,}"),
    ("tokens", lambda record: count(record.train[-1]["tokens"])),
    ("training time", elapsed),
    ("tokens per second, median", lambda record: cell("{:,.0f}", median, values_of(record, "tokens_per_s"))),
    ("training loss, nats per token", loss_at_end),
    ("gradient norm, mean", lambda record: cell("{:.3f}", fmean, late(record.series("grad_norm")))),
    ("gradient norm, highest of all", lambda record: cell("{:.3g}", max, values_of(record, "grad_norm"))),
    ("spikes", lambda record: str(len(record.spikes)) if record.spikes else None),
    ("busiest expert / mean, worst layer", lambda record: cell("{:.2f}", fmean, late(overall(record, "max_over_mean", max)))),
    ("entropy of the load, lowest layer", lambda record: cell("{:.3f}", fmean, late(overall(record, "entropy", min)))),
    ("experts without a token, all layers", lambda record: cell("{:.1f}", fmean, late(overall(record, "dead_experts", sum)))),
    ("busiest device / mean, worst layer", lambda record: cell("{:.2f}", fmean, late(overall(record, "device_load", max)))),
    ("devices that a token is sent to", lambda record: cell("{:.2f}", fmean, late(overall(record, "sends_per_token", fmean)))),
    ("assignments dropped", lambda record: cell("{:.2%}", fmean, late(overall(record, "dropped_share", fmean)))),
    ("divergence of the domains' experts", lambda record: cell("{:.3f}", fmean, [line.y[-1] for line in specialisation(record)])),
)


def held_out(record: Record, domain: str) -> Line | None:
    """Return the bits per byte of one domain."""
    return record.held_out("bits_per_byte").get(domain)


def overall(record: Record, key: str, reduce: Any) -> Line | None:
    """Return a router figure of a run as one line, its layers reduced."""
    return over_layers(record.name, record.routers(key), reduce)


def differences_section(records: Sequence[Record]) -> list[Section]:
    """Return the settings whose values differ between the runs that recorded any; nothing where fewer than two did."""
    known = [record for record in records if record.settings]
    if len(known) < 2:
        return []
    keys = dict.fromkeys(key for record in known for key in record.settings)
    cells = {key: [ABSENT if record.settings.get(key) is None else str(record.settings[key]) for record in known] for key in keys}
    rows = tuple((key, *values) for key, values in cells.items() if len(set(values)) > 1)
    missing = ", ".join(record.name for record in records if not record.settings)
    note = f"Without a recipe.toml: {missing}. " if missing else ""
    if not rows:
        return [TextSection("What differs", (f"{note}The recipes are equal in all {len(keys)} keys; same data, same device.",))]
    note += f"Keys of recipe.toml and plan.json whose values differ; {len(keys) - len(rows)} are equal. {ABSENT}: not set."
    return [TableSection("What differs", ("", *(record.name for record in known)), rows, note, runs=True)]


def learning_sections(records: Sequence[Record], key: Key) -> list[Section]:
    """Return loss and bits per byte against tokens and time."""
    losses = overlaid(records, lambda record: record.series("loss"))
    chart = Chart("training loss, nats per token", losses, names=False, cut=True)
    caption = f"Mean training loss; numbers: the last means. Comparable between runs of one tokenizer only; bits per byte always. {TIMES}"
    sections: list[Section] = [FigureSection("Training loss", charts([chart], height=2.9, timed=True), caption, key)]
    rows = []
    for domain in in_order({domain: None for record in records for domain in record.held_out("bits_per_byte")}):
        curves = overlaid(records, partial(held_out, domain=domain), dots=True)
        rows.append(Chart(domain_name(domain), curves, names=False, cut=True, form="{:.3f}"))
    if rows:
        caption = "Bits per byte of held-out text, a row for each domain with a scale of its own; less is better. Only runs that have it."
        sections.append(FigureSection("Bits per byte by domain", charts(rows, height=1.55, timed=True), caption, key))
    return sections


def step_sections(records: Sequence[Record], key: Key) -> list[Section]:
    """Return gradient norm, learning rate and speed."""
    wanted = (
        ("grad_norm", "gradient norm, before clipping", "{:.2f}", True),
        ("lr", "learning rate", "{:.2g}", False),
        ("tokens_per_s", "tokens per second", "{:,.0f}", False),
    )
    rows = [
        Chart(title, curves, names=False, form=form, log=log)
        for name, title, form, log in wanted
        if (curves := overlaid(records, partial(Record.series, key=name)))
    ]
    caption = "Speeds are comparable between runs on the same machine only."
    return [FigureSection("Gradient norm, learning rate, speed", charts(rows, height=1.6), caption, key)] if rows else []


def routing_sections(records: Sequence[Record], key: Key) -> list[Section]:
    """Return how the tokens were spread over experts and devices; nothing where no run has MoE layers."""
    experts = overlaid_layers(
        records,
        ("max_over_mean", max, "busiest expert's load / mean load, worst layer", "{:.2f}", EVEN),
        ("entropy", min, "entropy of the load / its maximum, lowest layer", "{:.3f}", (1.0, "")),
        ("dead_experts", sum, "experts without a token in the step, all layers", "{:.1f}", None),
    )
    devices = overlaid_layers(
        records,
        ("device_load", max, "busiest device's load / mean load, worst layer", "{:.2f}", EVEN),
        ("computed_max", max, "the same after dropping", "{:.2f}", EVEN),
        ("sends_per_token", fmean, "devices that a token is sent to, mean of the layers", "{:.2f}", None),
        ("dropped_share", fmean, "share of the assignments that was dropped", "{:.3f}", None),
    )
    divergence = overlaid(records, lambda record: over_layers(record.name, specialisation(record), fmean), dots=True)
    sections: list[Section] = []
    if experts:
        caption = "The layer that is worst at each step. 1 is perfect balance in the upper two charts; 0 in the third: every expert learns."
        sections.append(FigureSection("Load of the experts", charts(experts, height=1.6), caption, key))
    if devices:
        caption = "Groups of experts that stand for a device; runs whose experts lie on one device are absent."
        sections.append(FigureSection("Load of the devices", charts(devices, height=1.6), caption, key))
    if divergence:
        chart = Chart("divergence of the domains' experts, mean of the layers", divergence, names=False, form="{:.3f}")
        sections.append(FigureSection("Specialisation", charts([chart], height=1.9), DIVERGENCE, key))
    chapter = ChapterSection("Routing", "Where the routers sent the tokens, and whether experts specialise in domains.")
    return [chapter, *sections] if sections else []


def overlaid_layers(records: Sequence[Record], *wanted: tuple[str, Any, str, str, tuple[float, str] | None]) -> list[Chart]:
    """Return a chart for each router figure that any run has, its layers reduced to one line for each run."""
    return [
        Chart(title, curves, names=False, form=form, level=level, whole=key == "dead_experts")
        for key, reduce, title, form, level in wanted
        if (curves := overlaid(records, partial(overall, key=key, reduce=reduce)))
    ]


def overlaid(records: Sequence[Record], read: Callable[[Record], Line | None], *, dots: bool = False) -> tuple[Curve, ...]:
    """Return a curve for each run that has the quantity, in the run's colour."""
    curves = []
    for index, record in enumerate(records):
        line = read(record)
        if line is not None:
            colour, dash = style(index)
            curves.append(Curve(line, colour, dash, dots=dots))
    return tuple(curves)
