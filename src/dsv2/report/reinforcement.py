"""What GRPO made of a policy: rewards, held-out answers, drift, length and health by step, of one run or several."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dsv2.report.curves import Chart, Curve, Horizontal, charts, style
from dsv2.report.drawing import Line
from dsv2.report.learning import settings_section
from dsv2.report.page import ChapterSection, FigureSection, Section
from dsv2.report.record import Record

STEPS = Horizontal("steps")

# Figure, its charts as (title, key of the metrics), and what to see.
_FIGURES: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...] = (
    (
        "Reward",
        (("reward, mean of a step's rollouts", "reward"), ("its deviation within a group", "reward_std")),
        "Thin: each step; thick: their mean. Where the deviation within groups goes to 0, all answers to a prompt earn the same, and there "
        "is nothing left to select.",
    ),
    (
        "Drift",
        (("KL to the reference, nats a token", "kl"), ("entropy of a token, nats", "entropy")),
        "How far the policy has gone from its reference (k3, whatever the loss has), and how much choice it has left. Without a KL in the "
        "loss it is not estimated.",
    ),
    (
        "Answers",
        (("tokens of an answer", "completions/mean_length"), ("share cut at the limit", "completions/clipped_ratio")),
        "Rewards that can be had by length alone show here first.",
    ),
    (
        "Health",
        (
            ("groups of equal rewards, share", "frac_reward_zero_std"),
            ("gradient norm, before clipping", "grad_norm"),
            ("largest difference of log-probabilities, engine and trainer, nats", "sampling/sampling_logp_difference/max"),
            ("importance weights cut at the cap, share", "sampling/importance_weight/capped"),
            ("rollouts per second of sampling", "rollouts_per_s"),
        ),
        "Groups of equal rewards teach nothing. Engine and trainer hold the same weights: a difference beyond rounding is a fault, and the "
        "run stops.",
    ),
)


def reward_sections(records: Sequence[Record], *, recipe: bool = True) -> list[Section]:
    """Return the sections of runs of GRPO: curves of all of them; of a single one its rewards by name and, if wanted, its recipe."""
    key = tuple((record.name, number) for number, record in enumerate(records)) if len(records) > 1 else ()
    sections: list[Section] = [ChapterSection("Learning"), *_held_out(records, key)]
    for title, rows, caption in _FIGURES:
        found = [chart for name, metric in rows if (chart := _chart(name, records, metric)) is not None]
        if found:
            sections.append(FigureSection(title, charts(found, over=STEPS), caption, key))
        if title == "Reward" and len(records) == 1:
            sections += _parts(records[0])
    if len(records) == 1 and recipe:
        settings = settings_section(records[0])
        sections += [ChapterSection("Recipe"), *settings] if settings else []
    return sections


def reward_cards(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the cards: reward and held-out answers, first and last; drift, speed, agreement of engine and trainer."""
    if len(records) > 1:
        return [(f"reward, last step: {record.name}", _shown(record.grpo[-1].get("reward"))) for record in records]
    record = records[0]
    steps, tests = record.grpo, record.of_kind("evaluation")
    cards = [("reward, first and last step", f"{_shown(steps[0].get('reward'))} \u2192 {_shown(steps[-1].get('reward'))}")]
    for metric in _held_out_keys(records):
        cards.append((f"{metric}, held-out prompts", f"{_shown(tests[0].get(metric))} \u2192 {_shown(tests[-1].get(metric))}"))
    cards += [("held-out answers without a score, at most", missing)] if (missing := _unscored(record)) else []
    speeds = [line["rollouts_per_s"] for line in steps if line.get("rollouts_per_s")]
    apart = [line[name] for line in steps if line.get(name := "sampling/sampling_logp_difference/max") is not None]
    cards += [("rollouts per second of sampling, median", f"{median(speeds):,.0f}")] if speeds else []
    cards += [("largest |\u0394 log p|, engine and trainer", f"{max(apart):.1e}")] if apart else []
    return cards


def _chart(title: str, records: Sequence[Record], metric: str) -> Chart | None:
    lines = [line for record in records if (line := _line(record.name, record.grpo, metric)) is not None]
    if not lines or not any(value for line in lines for value in line.y):
        return None
    single = len(records) == 1
    curves = tuple(Curve(line, *style(number), raw=single) for number, line in enumerate(lines))
    return Chart(title, curves, form="{:.3g}", names=False)


def _held_out(records: Sequence[Record], key: tuple[tuple[str, int], ...]) -> list[Section]:
    """Return how well held-out prompts were answered: pass@1 and pass@k of rewards that are right or wrong, else the reward."""
    rows = []
    for metric in _held_out_keys(records):
        lines = [(number, _line(record.name, record.of_kind("evaluation"), metric)) for number, record in enumerate(records)]
        curves = tuple(Curve(line, *style(number), dots=True) for number, line in lines if line is not None)
        rows.append(Chart(metric, curves, form="{:.3f}", names=False))
    if not rows:
        return []
    caption = (
        "Held-out prompts, sampled at temperature 1. pass@1: an answer is right; pass@k: at least one of k is. Selection raises pass@1 "
        "towards the pass@k of the beginning; a rising pass@k would be something new."
    )
    missing = [f"{record.name + ': ' if len(records) > 1 else ''}{text}" for record in records if (text := _unscored(record))]
    if missing:
        caption += f" Answers without a score are left out, at most {', '.join(missing)}."
    return [FigureSection("Held-out prompts", charts(rows, over=STEPS), caption, key)]


def _held_out_keys(records: Sequence[Record]) -> list[str]:
    """Return what of held-out answers is drawn: pass@k, and the reward where a run has no pass@k."""
    found = []
    for record in records:
        keys = dict.fromkeys(key for line in record.of_kind("evaluation") for key, value in line.items() if value is not None)
        passes = [key for key in keys if "/pass@" in key]
        found += passes or (["reward"] if "reward" in keys else [])
    return list(dict.fromkeys(found))


def _unscored(record: Record) -> str:
    """Return how many held-out answers had no score, in the evaluation where it was most; empty where all had one."""
    worst = max(record.of_kind("evaluation"), key=lambda line: line.get("unscored") or 0, default={})
    return f"{worst['unscored']} of {worst['answers']} after step {worst['step']}" if worst.get("unscored") else ""


def _parts(record: Record) -> list[Section]:
    """Return each reward by its name; nothing where there is one alone."""
    names = dict.fromkeys(key.split("/")[1] for line in record.grpo for key in line if key.startswith("rewards/") and key.endswith("/mean"))
    lines = [line for name in names if (line := _line(name, record.grpo, f"rewards/{name}/mean")) is not None]
    if len(lines) < 2:
        return []
    rows = [Chart(line.name, (Curve(line, *style(number), raw=True),), form="{:.3g}", names=False) for number, line in enumerate(lines)]
    return [FigureSection("Rewards by name", charts(rows, over=STEPS, height=1.5), "Before their weights.")]


def _line(name: str, lines: Sequence[Mapping[str, Any]], metric: str) -> Line | None:
    points = [(float(line["step"]), float(line[metric])) for line in lines if line.get(metric) is not None]
    return Line(name, tuple(x for x, _ in points), tuple(y for _, y in points)) if points else None


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
