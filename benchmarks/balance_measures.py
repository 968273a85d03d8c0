"""From the metrics of the runs of the balance study to its figures: plain arithmetic, no run and no drawing.

Figures are of the last fifth of a run's steps. "Busiest over mean" is taken within each step and then averaged: what a step waits for.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

WINDOW = 0.2  # share of the steps, at the end, that figures are taken of
BINS = 40  # points of a curve

Line = Mapping[str, Any]
Figures = dict[str, float]


def figures_of(lines: Sequence[Line], *, limit: int, assigned: int, domain_bytes: Mapping[str, int]) -> Figures:
    """Return the figures of one run.

    Args:
        lines: its metrics.
        limit: M; no token may have reached more devices at any step.
        assigned: assignments of one layer in one step.
        domain_bytes: of the held-out text of each domain.

    Returns:
        held_out: bits per byte of all held-out text; loss: of training, nats per token; expert, device, received: the busiest over the
        mean, averaged over layers, and with _worst of the worst layer; expert_lasting: the same of the window's sums, worst layer;
        dead: experts that received nothing in a step, per layer; dead_lasting: in the whole window, all layers; sends: devices per token;
        most_sends: the most of any token at any step of the run; where assignments are dropped: dropped, their share, and computed, the
        busiest device after dropping over the mean.
    """
    train = [line for line in lines if line["kind"] == "train"]
    most_sends = max(max(line["router"]["most_sends"]) for line in train)
    if most_sends > limit:
        raise AssertionError(f"a token reached {most_sends} devices; the limit is M = {limit}")
    window = train[-max(1, round(WINDOW * len(train))) :]
    last = [line for line in lines if line["kind"] == "validation"][-1]["bits_per_byte"]
    held_out = sum(last[domain] * size for domain, size in domain_bytes.items()) / sum(domain_bytes.values())
    sums = [[sum(column) for column in zip(*layer, strict=True)] for layer in zip(*(line["load"] for line in window), strict=True)]
    figures: Figures = {
        "held_out": held_out,
        "loss": fmean(line["loss"] for line in window),
        **{
            name + suffix: value
            for name in ("expert", "device", "received")
            for suffix, value in zip(("", "_worst"), mean_and_worst([busiest(line, name) for line in window]), strict=True)
        },
        "expert_lasting": max(max(layer) / fmean(layer) for layer in sums),
        "dead": fmean(fmean(line["router"]["dead_experts"]) for line in window),
        "dead_lasting": float(sum(share == 0 for layer in sums for share in layer)),
        "sends": fmean(fmean(line["router"]["sends_per_token"]) for line in window),
        "most_sends": float(most_sends),
        "seconds": train[-1]["elapsed_s"],
    }
    if "dropped" in train[0]["router"]:
        figures["dropped"] = fmean(dropped_share(line, assigned) for line in window)
        figures["dropped_all"] = fmean(dropped_share(line, assigned) for line in train)
        figures["computed"], figures["computed_worst"] = mean_and_worst([line["router"]["computed_max"] for line in window])
    return figures


def chance_of(lines: Sequence[Line]) -> Figures:
    """Return the figures of steps of one layer whose routing followed chance alone."""
    figures = {name: mean_and_worst([busiest(line, name) for line in lines])[0] for name in ("expert", "device", "received")}
    return figures | {
        "dead": fmean(fmean(line["router"]["dead_experts"]) for line in lines),
        "sends": fmean(fmean(line["router"]["sends_per_token"]) for line in lines),
    }


def busiest(line: Line, what: str) -> list[float]:
    """Return the busiest expert's or device's load over the mean of each layer, in one step."""
    router: Mapping[str, Any] = line["router"]
    if what == "device":
        return [max(layer) * len(layer) for layer in router["device_load"]]
    return list(router["max_over_mean" if what == "expert" else "received_max"])


def mean_and_worst(by_step: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Average [steps][layers] over steps; return the mean and the highest of the layers."""
    layers = [fmean(layer) for layer in zip(*by_step, strict=True)]
    return fmean(layers), max(layers)


def dropped_share(line: Line, assigned: int) -> float:
    """Return the share of a step's assignments that were dropped, in all layers."""
    dropped: list[int] = line["router"]["dropped"]
    return sum(dropped) / (assigned * len(dropped))


def course_of(lines: Sequence[Line], *, assigned: int) -> dict[str, list[float]]:
    """Return curves of a run over its steps, averaged over layers and over equal stretches of steps."""
    train = [line for line in lines if line["kind"] == "train"]
    values = {name: [fmean(busiest(line, name)) for line in train] for name in ("expert", "device", "received")}
    if "dropped" in train[0]["router"]:
        values["dropped"] = [dropped_share(line, assigned) for line in train]
        values["computed"] = [fmean(line["router"]["computed_max"]) for line in train]
    return {"tokens": stretches([line["tokens"] for line in train])} | {name: stretches(each) for name, each in values.items()}


def stretches(values: Sequence[float]) -> list[float]:
    """Return the means of at most ``BINS`` equal stretches."""
    count = min(BINS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [fmean(values[low:high]) for low, high in zip(edges, edges[1:], strict=False)]


def merge_courses(courses: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Return [mean, lowest, highest] over seeds at each point of each curve; tokens as they are."""
    merged: dict[str, Any] = {"tokens": [round(value) for value in courses[0]["tokens"]]}
    for name in courses[0]:
        if name != "tokens":
            points = zip(*(course[name] for course in courses), strict=True)
            merged[name] = [[fmean(point), min(point), max(point)] for point in points]
    return merged


def values_of(results: Mapping[str, Any], arm: str, figure: str) -> list[float]:
    """Return a figure of all seeds of an arm; nothing where the arm has no such figure."""
    return [seed[figure] for seed in results["arms"][arm]["seeds"] if figure in seed]


def side(one: Sequence[float], other: Sequence[float]) -> int:
    """Return 1 where every value of ``one`` is above all of ``other``, -1 where below, 0 where the two overlap: inside the noise.

    One value has no range, so it never is outside.
    """
    if min(len(one), len(other)) < 2:
        return 0
    return (min(one) > max(other)) - (max(one) < min(other))


def to_json(results: Mapping[str, Any]) -> str:
    """Write results with a line for each seed and each curve, numbers to five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list) else value

    def lines(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict | list) or not value:
            return json.dumps(value, ensure_ascii=False)
        pad = " " * (5 - depth)
        if isinstance(value, dict):
            parts = [f"{pad}{json.dumps(key)}: {lines(each, depth - 1)}" for key, each in value.items()]
            return "{\n" + ",\n".join(parts) + "\n" + pad[1:] + "}"
        return "[\n" + ",\n".join(f"{pad}{lines(each, depth - 1)}" for each in value) + "\n" + pad[1:] + "]"

    return lines(short(results), 4) + "\n"
