"""What a run learnt and how its steps went: sections on loss, bits per byte, the optimiser, spikes and samples of one run."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dsv2.report.curves import Chart, Curve, charts, coloured
from dsv2.report.drawing import HUES, INK, count
from dsv2.report.heat import bits_per_byte_bars
from dsv2.report.page import FigureSection, Sample, SampleSection, Section, TableSection
from dsv2.report.record import Record, domain_name

MOST_SAMPLES = 6  # steps shown of a run that sampled more often
MOST_SPIKES = 20  # rows of the table of spikes

TIMES = "Right: the same against the time spent in training steps; validation, samples and checkpoints are not counted."


def predicts_section(record: Record, baselines: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """Return the bars of the last validation beside the baselines."""
    if not record.validations:
        return []
    last = record.validations[-1]
    values = {
        domain_name(domain): {"this model": value} | {name: known[domain] for name, known in baselines.items() if domain in known}
        for domain, value in last["bits_per_byte"].items()
    }
    caption = f"Held-out documents after {count(last['tokens'])} tokens of training: the bits that the model needs for a byte of new text."
    if baselines:
        caption += " Grey: baselines that were given the same training text."
    return [FigureSection("How well it predicts", bits_per_byte_bars(values), caption)]


def loss_section(record: Record) -> FigureSection:
    """Return the loss curves, against tokens and against time."""
    train = record.series("loss", "training")
    assert train is not None  # load_record refuses others
    held_out = coloured(list(record.held_out("loss").values()), dots=True)
    what = "loss, nats per comparison" if record.of_kind("evaluation") else "loss, nats per token"
    chart = Chart(what, (Curve(train, INK, raw=True), *held_out), cut=True, marks=tuple(line_tokens(record, record.spikes)))
    caption = "Training loss of each step (thin) and its mean (thick), first steps cut off at the top"
    caption += "; dots: loss on held-out documents, by domain." if held_out else "."
    caption += " Triangles: spikes that the guard caught." if chart.marks else ""
    return FigureSection("Loss", charts([chart], height=3.1, timed=True), f"{caption} {TIMES}" if train.times else caption)


def bits_per_byte_section(record: Record) -> list[Section]:
    """Return the curves of bits per byte by domain; nothing before the second validation."""
    lines = list(record.held_out("bits_per_byte").values())
    if not lines or max(len(line.x) for line in lines) < 2:
        return []
    chart = Chart("bits per byte of held-out text", coloured(lines, dots=True), cut=True)
    caption = (
        "Loss per byte of text instead of per token: comparable between tokenizers. Domains differ since a Chinese character takes three "
        "bytes and code repeats itself; compare a domain with itself."
    )
    return [FigureSection("Bits per byte by domain", charts([chart], height=2.6, timed=True), caption)]


def optimiser_section(record: Record) -> list[Section]:
    """Return gradient norm, learning rate and speed, one above the other; what the metrics lack is left out."""
    rows = []
    norm, rate, speed = record.series("grad_norm", "norm"), record.series("lr", "rate"), record.series("tokens_per_s", "speed")
    clip = record.settings.get("optimizer.clip_norm")
    if norm is not None:
        level = (float(clip), f"clipped at {clip:g}") if clip and max(norm.y) > clip else None
        marks = tuple(line_tokens(record, [line for line in record.train if line.get("skipped")]))
        rows.append(
            Chart("gradient norm, before clipping", (Curve(norm, HUES[1], raw=True),), names=False, log=True, level=level, marks=marks)
        )
    if rate is not None:
        rows.append(Chart("learning rate", (Curve(rate, HUES[0]),), names=False, form="{:.2g}"))
    if speed is not None:
        rows.append(Chart("tokens per second", (Curve(speed, HUES[2], raw=True),), names=False, form="{:,.0f}"))
    if not rows:
        return []
    caption = "Thick lines are means, numbers the last means. A gradient norm that climbs while the loss does not fall announces trouble."
    caption += " Triangles: steps whose update was skipped." if rows[0].marks else ""
    return [FigureSection("Gradient norm, learning rate, speed", charts(rows, height=1.6), caption)]


def spikes_section(record: Record) -> list[Section]:
    """Return a table of what the guard caught; nothing where it caught nothing."""
    spikes = record.spikes
    if not spikes:
        return []
    rows = tuple(
        (
            str(line["step"]),
            line["what"].replace("grad_norm", "gradient norm"),
            f"{line['value']:.4g}",
            f"{line['limit']:.4g}",
            line["action"],
        )
        for line in spikes[:MOST_SPIKES]
    )
    note = f"{len(spikes)} in all" + (f"; the first {MOST_SPIKES} are shown." if len(spikes) > MOST_SPIKES else ".")
    return [TableSection("Spikes", ("step", "what", "value", "limit", "answer"), rows, note)]


def line_tokens(record: Record, lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the tokens at which metrics lines were written, by their steps."""
    tokens = {line["step"]: float(line["tokens"]) for line in record.train}
    return [tokens[line["step"]] for line in lines if line["step"] in tokens]


def sample_section(record: Record) -> list[Section]:
    """Return samples of evenly chosen steps, the first and the last among them; nothing where none were written."""
    tokens_at = {line["step"]: line["tokens"] for line in record.metrics if "tokens" in line}
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in record.of_kind("sample"):
        by_step[line["step"]].append(line)
    samples = []
    for step in evenly(sorted(by_step), MOST_SAMPLES):
        label = f"step {step}" + (f"\n{count(tokens_at[step])} tokens" if step in tokens_at else "")
        for line in by_step[step]:
            samples.append(Sample(label, line["prompt"], line["text"].removeprefix(line["prompt"])))
    note = "The same prompt at different moments of training; the prompt is grey."
    return [SampleSection("Learning to write", tuple(samples), note)] if samples else []


def evenly(values: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the values, evenly spaced, first and last kept."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def settings_section(record: Record) -> list[Section]:
    """Return the run's recipe, and what it depends on besides, as a folded table."""
    rows = tuple((key, str(value)) for key, value in record.settings.items())
    note = "From recipe.toml and plan.json of the run's folder; data is the fingerprint of shards and tokenizer."
    return [TableSection("All settings", ("key", "value"), rows, note, folded=True)] if rows else []
