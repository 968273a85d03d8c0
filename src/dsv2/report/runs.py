"""From run folders to reports: choose the sections, write the page; stage of ``dsv2 report``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from dsv2.errors import DataError
from dsv2.progress import console
from dsv2.report.balance import device_sections, domain_sections, load_sections
from dsv2.report.compare import comparison_sections, late, overall
from dsv2.report.drawing import count
from dsv2.report.learning import (
    bits_per_byte_section,
    loss_section,
    optimiser_section,
    predicts_section,
    sample_section,
    settings_section,
    spikes_section,
)
from dsv2.report.page import (
    ChapterSection,
    CommandSection,
    Leg,
    LegSection,
    Sample,
    SampleSection,
    Section,
    TableSection,
    duration,
    write_report,
)
from dsv2.report.preferences import preference_sections
from dsv2.report.record import Record, domain_name, in_order, load_record, load_records
from dsv2.report.reinforcement import reward_cards, reward_sections
from dsv2.report.rollouts import write_rollouts


def run(runs: list[Path], out: Path) -> None:
    """Write a report of one run, or a comparison of several.

    Args:
        runs: folders with a metrics.jsonl; recipe.toml and plan.json beside it are read where they are.
        out: the HTML file; of a run of GRPO, ``NAME-rollouts.html`` beside it lets its rollouts be browsed.

    Raises:
        DataError: a folder without metrics, or without a training step; or runs of GRPO beside others.
    """
    records = load_records(runs)
    reinforced = [record for record in records if record.grpo]
    if reinforced and len(reinforced) < len(records):
        others = ", ".join(record.name for record in records if not record.grpo)
        raise DataError(f"runs of GRPO have no curve in common with others: {others}", hint="write a report for each kind of run")
    if reinforced:
        title = f"Run {records[0].name}" if len(runs) == 1 else f"{len(runs)} runs of GRPO compared"
        write_report(out, title=title, summary=reward_cards(records), sections=reward_sections(records))
        if len(runs) == 1 and (runs[0] / "rollouts.jsonl").exists():
            page = out.with_name(f"{out.stem}-rollouts.html")
            write_rollouts(runs[0], page)
            console().print(f"wrote {page}: every rollout, to browse", markup=False, soft_wrap=True)
    elif len(runs) == 1:
        record = records[0]
        cards = [*summary_cards(record, record.baselines), *step_cards(record)]
        write_report(out, title=f"Run {record.name}", summary=cards, sections=sections_of(record, record.baselines))
    else:
        compare(runs, out)
    console().print(f"wrote {out}", markup=False, soft_wrap=True)


def compare(runs: Sequence[Path], out: Path) -> None:
    """Write a report that sets several runs beside each other."""
    records = load_records(runs)
    write_report(
        out,
        title=f"{len(records)} runs compared",
        summary=[("runs", str(len(records))), *best_cards(records)],
        sections=comparison_sections(records),
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
    alignment: Sequence[Section] = (),
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
        alignment: sections on fine-tuning and GRPO.

    """
    record = load_record(run_folder)
    baselines = record.baselines | dict(baselines or {})
    sections: list[Section] = [
        *sections_of(record, baselines, settings=False),
        *alignment,
        ChapterSection("The tour"),
        *([SampleSection("What the finished model writes", tuple(samples))] if samples else []),
        TableSection("The plan", (), tuple(plan)),
        LegSection("Where the time went", tuple(legs)),
    ]
    if next_commands:
        sections.append(CommandSection("What to type next", tuple(next_commands)))
    write_report(
        out,
        title="A DeepSeek-V2, from text to talk",
        subtitle="What dsv2 tour did on this machine: text, tokenizer, shards, pre-training, validation, samples, fine-tuning, GRPO.",
        summary=[*summary_cards(record, baselines), *summary],
        sections=sections,
    )


def run_sections(run_folder: Path, *, baselines: Mapping[str, Mapping[str, float]] | None = None) -> list[Section]:
    """Build the sections that a run's metrics give: what it learnt, its steps, its routing, samples; those without data are left out.

    Args:
        run_folder: folder with a metrics.jsonl.
        baselines: predictor -> domain -> bits per byte.

    Raises:
        DataError: no metrics, or no training step in them.
    """
    record = load_record(run_folder)
    return sections_of(record, record.baselines | dict(baselines or {}))


def sections_of(record: Record, baselines: Mapping[str, Mapping[str, float]], *, settings: bool = True) -> list[Section]:
    """Return the chapters of a run, those without data left out; ``settings``: its recipe at the end."""
    chapters: list[tuple[str, str, list[Section]]] = [
        (
            "Learning",
            "How well the model predicts text, and how it came to.",
            [*predicts_section(record, baselines), loss_section(record), *bits_per_byte_section(record)],
        ),
        ("Preferences", "How well the model tells the better answer.", preference_sections(record)),
        ("Text", "", sample_section(record)),
        ("Steps", "What the optimiser did.", [*optimiser_section(record), *spikes_section(record)]),
        (
            "Routing",
            "Every MoE layer sends a token to a few of its experts. Balanced, all of them learn; specialised, they learn different things.",
            [*load_sections(record), *device_sections(record), *domain_sections(record)],
        ),
        ("Recipe", "", settings_section(record) if settings else []),
    ]
    return [section for title, text, sections in chapters if sections for section in (ChapterSection(title, text), *sections)]


def summary_cards(record: Record, baselines: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Return the cards that the metrics of a run give; bits per byte of the first domain, English where it is there."""
    train, validation = record.train, record.validations
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


def step_cards(record: Record) -> list[tuple[str, str]]:
    """Return the cards on time and balance that the metrics give."""
    cards, last = [], record.train[-1]
    if last.get("elapsed_s") is not None:
        cards.append(("training time, steps only", duration(last["elapsed_s"])))
    busiest = overall(record, "max_over_mean", max)
    if busiest is not None:
        cards.append(("busiest expert / mean, worst layer, last tenth", f"{fmean(late(busiest)):.2f}"))
    return cards


def shown(value: float | None) -> str:
    """Return a loss in words; the metrics hold null for one that was not finite."""
    return "not finite" if value is None else f"{value:.2f}"


def best_cards(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the lowest last value of each domain and whose it is."""
    best: dict[str, tuple[float, str]] = {}
    for record in records:
        for domain, line in record.held_out("bits_per_byte").items():
            best[domain] = min(best.get(domain, (line.y[-1], record.name)), (line.y[-1], record.name))
    return [(f"best {domain_name(domain)}, bits per byte: {name}", f"{value:.3f}") for domain, (value, name) in in_order(best).items()]
