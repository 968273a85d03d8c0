"""From run folders to reports: read the metrics, build the sections, write the page; stage of ``dsv2 report``."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv2.errors import DataError
from dsv2.progress import console, read_metrics
from dsv2.report import figures
from dsv2.report.figures import Line, count
from dsv2.report.page import (
    CommandSection,
    FigureSection,
    Leg,
    LegSection,
    Sample,
    SampleSection,
    Section,
    TableSection,
    duration,
    write_report,
)

DOMAIN_NAMES = {"en": "English", "zh": "Chinese", "code": "Code", "math": "Maths"}
MOST_SAMPLES = 6  # steps shown of a run that sampled more often
MAP_STEPS = 20  # training lines averaged for the load map

Metrics = list[dict[str, Any]]


def run(runs: list[Path], out: Path) -> None:
    """Write a report of one run, or a comparison of several.

    Args:
        runs: folders with a metrics.jsonl.
        out: the HTML file.

    Raises:
        DataError: a folder without metrics, or without a training step.
    """
    if len(runs) == 1:
        metrics = load_metrics(runs[0])
        baselines = recorded_baselines(metrics)
        title = f"Run {runs[0].resolve().name}"
        write_report(out, title=title, summary=summary_cards(metrics, baselines), sections=sections_of(metrics, baselines))
    else:
        compare(runs, out)
    console().print(f"wrote {out}", markup=False, soft_wrap=True)


def compare(runs: Sequence[Path], out: Path) -> None:
    """Write a report that sets several runs beside each other."""
    names = run_names(runs)
    write_report(
        out,
        title=f"{len(runs)} runs compared",
        summary=[("runs", str(len(runs))), ("best English, bits per byte", best_english(names))],
        sections=comparison_sections(names),
    )


def write_tour_report(
    out: Path,
    *,
    run_folder: Path,
    summary: Sequence[tuple[str, str]],
    plan: Sequence[tuple[str, str]],
    legs: Sequence[Leg],
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    samples: Sequence[Sample] = (),
    next_commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of a tour: cards, what was learnt, the plan, where the time went, what to type next.

    Args:
        out: the HTML file.
        run_folder: the pre-training run, with its metrics.jsonl.
        summary: (label, value) cards that follow those read from the metrics (bits per byte, loss, tokens, speed).
        plan: (name, value) rows, as printed at the start.
        legs: in order, with their seconds.
        baselines: predictor -> domain -> bits per byte, e.g. {"bigram": {"en": 1.9}}; fitted on the same training text; drawn
            beside the model.
        samples: what the finished model wrote.
        next_commands: (command, what it does).

    Raises:
        DataError: the run has no metrics.
    """
    metrics = load_metrics(run_folder)
    baselines = recorded_baselines(metrics) | dict(baselines or {})
    sections: list[Section] = [
        *sections_of(metrics, baselines),
        *([SampleSection("What the finished model writes", tuple(samples))] if samples else []),
        TableSection("The plan", (), tuple(plan)),
        LegSection("Where the time went", tuple(legs)),
    ]
    if next_commands:
        sections.append(CommandSection("What to type next", tuple(next_commands)))
    write_report(
        out,
        title="A DeepSeek-V2, from text to talk",
        subtitle="What dsv2 tour did on this machine: text, tokenizer, shards, pre-training, validation, samples.",
        summary=[*summary_cards(metrics, baselines), *summary],
        sections=sections,
    )


def run_sections(run_folder: Path, *, baselines: Mapping[str, Mapping[str, float]] | None = None) -> list[Section]:
    """Build the sections that a run's metrics give: loss, bits per byte, expert load, samples; those without data are left out.

    Args:
        run_folder: folder with a metrics.jsonl.
        baselines: predictor -> domain -> bits per byte.

    Raises:
        DataError: no metrics, or no training step in them.
    """
    metrics = load_metrics(run_folder)
    return sections_of(metrics, recorded_baselines(metrics) | dict(baselines or {}))


def load_metrics(run_folder: Path) -> Metrics:
    """Return a run's metrics.

    Raises:
        DataError: there are none, or no training step is among them.
    """
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(
            f"{run_folder} has no metrics.jsonl", hint="name the folder of a run (the --out of dsv2 pretrain, or the run of a tour)"
        )
    metrics = read_metrics(path)
    if not any(line.get("loss") is not None for line in of_kind(metrics, "train")):
        raise DataError(
            f"{path} holds {len(metrics)} lines and no training step with a finite loss", hint="let the run make at least one step"
        )
    return metrics


def sections_of(metrics: Metrics, baselines: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """Return the sections for metrics that hold at least one training step."""
    sections: list[Section] = [loss_section(metrics)]
    if validations(metrics):
        sections.insert(0, bits_per_byte_section(metrics, baselines))
    samples = of_kind(metrics, "sample")
    if samples:
        sections.append(sample_section(metrics))
    if any(line.get("load") for line in of_kind(metrics, "train")):
        sections.extend(load_sections(metrics))
    return sections


def of_kind(metrics: Metrics, kind: str) -> Metrics:
    """Return the lines of one kind, in order."""
    return [line for line in metrics if line["kind"] == kind]


def validations(metrics: Metrics) -> Metrics:
    """Return the validation lines that hold a finite value, without the domains that do not; known domains first, English before all."""
    lines, known = [], list(DOMAIN_NAMES)
    for line in of_kind(metrics, "validation"):
        finite = {key: {d: v for d, v in line.get(key, {}).items() if v is not None} for key in ("bits_per_byte", "loss")}
        for key, values in finite.items():
            finite[key] = dict(sorted(values.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))
        if finite["bits_per_byte"]:
            lines.append(line | finite)
    return lines


def recorded_baselines(metrics: Metrics) -> dict[str, Mapping[str, float]]:
    """Return predictor -> domain -> bits per byte from lines ``{"kind": "baseline", "name": "bigram", "bits_per_byte": {"en": 1.9}}``."""
    return {line["name"]: line["bits_per_byte"] for line in of_kind(metrics, "baseline")}


def domain_name(domain: str) -> str:
    """Return a domain as a reader calls it."""
    return DOMAIN_NAMES.get(domain, domain)


def train_line(metrics: Metrics, name: str) -> Line:
    """Return the training loss as a curve; steps whose loss was not finite are gaps."""
    train = [line for line in of_kind(metrics, "train") if line["loss"] is not None]
    return Line(name, tuple(line["tokens"] for line in train), tuple(line["loss"] for line in train))


def loss_section(metrics: Metrics) -> FigureSection:
    """Return the loss curves."""
    by_domain: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in validations(metrics):
        for domain, loss in line["loss"].items():
            by_domain[domain].append((line["tokens"], loss))
    validation = [Line(domain_name(domain), *zip(*points, strict=True)) for domain, points in by_domain.items()]
    caption = "Training loss of each step (thin) and its mean (thick), first steps cut off at the top"
    caption += "; dots: loss on held-out documents, by domain." if validation else "."
    return FigureSection("Loss", figures.loss_curves(train_line(metrics, "training"), validation), caption)


def bits_per_byte_section(metrics: Metrics, baselines: Mapping[str, Mapping[str, float]]) -> FigureSection:
    """Return the bars of the last validation beside the baselines."""
    last = validations(metrics)[-1]
    values = {
        domain_name(domain): {"this model": value} | {name: known[domain] for name, known in baselines.items() if domain in known}
        for domain, value in last["bits_per_byte"].items()
    }
    caption = f"Held-out documents after {count(last['tokens'])} tokens of training."
    if baselines:
        caption += " Grey: baselines that were given the same training text."
    return FigureSection("How well it predicts", figures.bits_per_byte_bars(values), caption)


def load_sections(metrics: Metrics) -> list[Section]:
    """Return the load of the experts at the end, and how uneven it was on the way."""
    train = [line for line in of_kind(metrics, "train") if line.get("load")]
    recent = [line["load"] for line in train[-MAP_STEPS:]]
    layers, experts = len(recent[0]), len(recent[0][0])
    mean = [[sum(load[layer][expert] for load in recent) / len(recent) for expert in range(experts)] for layer in range(layers)]
    tokens = tuple(line["tokens"] for line in train)
    curves = [
        Line(f"MoE layer {layer + 1}", tokens, tuple(max(line["load"][layer]) * experts for line in train)) for layer in range(layers)
    ]
    return [
        FigureSection(
            "Which experts work",
            figures.expert_load_map(mean),
            f"Tokens sent to each expert, relative to an even share (1.0); mean of the last {len(recent)} steps. "
            "Orange: busier; blue: idler.",
        ),
        FigureSection(
            "Balance on the way",
            figures.imbalance_curves(curves),
            "Load of the busiest expert of each MoE layer relative to the mean. 1 is perfect balance.",
        ),
    ]


def sample_section(metrics: Metrics) -> SampleSection:
    """Return samples of evenly chosen steps, the first and the last among them."""
    tokens_at = {line["step"]: line["tokens"] for line in metrics if "tokens" in line}
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in of_kind(metrics, "sample"):
        by_step[line["step"]].append(line)
    steps = evenly(sorted(by_step), MOST_SAMPLES)
    samples = []
    for step in steps:
        label = f"step {step}" + (f"\n{count(tokens_at[step])} tokens" if step in tokens_at else "")
        for line in by_step[step]:
            samples.append(Sample(label, line["prompt"], line["text"].removeprefix(line["prompt"])))
    return SampleSection("Learning to write", tuple(samples), "The same prompt at different moments of training; the prompt is grey.")


def evenly(values: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the values, evenly spaced, first and last kept."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def summary_cards(metrics: Metrics, baselines: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Return the cards that the metrics of a run give; bits per byte of the first domain, English where it is there."""
    train, validation = of_kind(metrics, "train"), validations(metrics)
    cards = []
    if validation:
        domain, value = next(iter(validation[-1]["bits_per_byte"].items()))
        beside = "".join(f"; {name}: {known[domain]:.2f}" for name, known in baselines.items() if domain in known)
        cards.append((f"{domain_name(domain)}, bits per byte{beside}", f"{value:.2f}"))
    cards += [("last training loss, nats per token", shown(train[-1]["loss"])), ("training tokens", count(train[-1]["tokens"]))]
    rates = sorted(line["tokens_per_s"] for line in train if line.get("tokens_per_s"))
    if rates:
        cards.append(("tokens per second, median", f"{rates[len(rates) // 2]:,.0f}"))
    return cards


def shown(value: float | None) -> str:
    """Return a loss in words; the metrics hold null for one that was not finite."""
    return "not finite" if value is None else f"{value:.2f}"


def run_names(runs: Sequence[Path]) -> dict[str, Metrics]:
    """Return metrics by a short name of each run; runs of equal folder names are told apart by their paths."""
    short = [path.resolve().name for path in runs]
    names = [str(path) if short.count(name) > 1 else name for path, name in zip(runs, short, strict=True)]
    return {name: load_metrics(path) for name, path in zip(names, runs, strict=True)}


def best_english(names: Mapping[str, Metrics]) -> str:
    """Return the lowest last value on English and whose it is."""
    values = [(validation[-1]["bits_per_byte"].get("en"), name) for name, m in names.items() if (validation := validations(m))]
    known = sorted((value, name) for value, name in values if value is not None)
    return f"{known[0][0]:.3f} ({known[0][1]})" if known else "-"


def comparison_sections(names: Mapping[str, Metrics]) -> list[Section]:
    """Return a table and curves of several runs."""
    domains = list(dict.fromkeys(d for m in names.values() for line in validations(m) for d in line["bits_per_byte"]))
    rows = []
    for name, metrics in names.items():
        train, validation = of_kind(metrics, "train"), validations(metrics)
        last = validation[-1]["bits_per_byte"] if validation else {}
        elapsed = train[-1].get("elapsed_s")
        rows.append(
            (
                name,
                str(train[-1]["step"]),
                count(train[-1]["tokens"]),
                shown(train[-1]["loss"]),
                *(f"{last[domain]:.3f}" if domain in last else "-" for domain in domains),
                duration(elapsed) if elapsed is not None else "-",
            )
        )
    columns = ("run", "steps", "tokens", "training loss", *(domain_name(domain) for domain in domains), "time")
    note = "Domains: bits per byte of held-out text at the last validation; less is better." if domains else ""
    return [
        TableSection("At the end", columns, tuple(rows), note),
        FigureSection(
            "Training loss",
            figures.compare_losses([train_line(metrics, name) for name, metrics in names.items()]),
            "Mean training loss; the number is the last mean. Comparable between runs of one tokenizer only; bits per byte always.",
        ),
    ]
