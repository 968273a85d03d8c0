"""Where the tokens go: sections on load, devices, and what the experts specialise in."""

from collections.abc import Sequence
from statistics import median

import numpy as np

from dsv2.report.curves import LAYERS, Chart, Curve, charts, coloured
from dsv2.report.drawing import HUES, Line
from dsv2.report.heat import WRITTEN_COLUMNS, Heat, heat_maps
from dsv2.report.page import FigureSection, Section
from dsv2.report.record import Record, domain_name, in_order, line_of, over_layers

MAP_STEPS = 20  # training lines averaged for the load maps
MOST_LAYERS = 6  # drawn as a line each
MOST_MAPS = 4  # layers whose experts are drawn by domain

EVEN = (1.0, "even")
DIVERGENCE = (
    "Jensen-Shannon divergence between the domains' distributions over experts, as a share of its maximum: 0 means that all domains use "
    "the experts alike, 1 that no expert serves two domains."
)


def jensen_shannon(shares: Sequence[Sequence[float]]) -> float:
    """Return the Jensen-Shannon divergence of n distributions with equal weights, over its largest value ln n (Lin 1991).

    Args:
        shares: [n][E] each domain's share of a layer's assignments by expert.

    Returns:
        0 where all domains use the experts alike, 1 where no expert serves two domains; 0 for a single domain.
    """
    p = np.asarray(shares, dtype=float)
    if len(p) < 2:
        return 0.0
    p = p / p.sum(axis=1, keepdims=True)
    return max(0.0, float((entropy(p.mean(axis=0)) - entropy(p).mean()) / np.log(len(p))))


def entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy of each distribution along the last axis, in nats."""
    return np.asarray(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1))


def specialisation(record: Record) -> list[Line]:
    """Return the divergence of the domains' experts as a line for each MoE layer; empty where validation did not count them."""
    rows = [(line, line["experts"]) for line in record.of_kind("validation") if len(line.get("experts", {})) > 1]
    times = {line["step"]: line.get("elapsed_s") for line in record.validations}
    rows = [({**line, "elapsed_s": times.get(line["step"])}, experts) for line, experts in rows]
    layers = min((len(shares) for _, experts in rows for shares in experts.values()), default=0)
    found = [
        line_of(f"layer {layer + 1}", [(line, jensen_shannon([shares[layer] for shares in experts.values()])) for line, experts in rows])
        for layer in range(layers)
    ]
    return [line for line in found if line is not None]


def layer_curves(lines: Sequence[Line], *, dots: bool = False) -> tuple[Curve, ...]:
    """Return a curve for each layer; of many layers their highest, median and lowest value at each point."""
    if len(lines) <= MOST_LAYERS:
        return coloured(lines, dots=dots)
    bounds = [over_layers(name, lines, reduce) for name, reduce in (("highest", max), ("median", median), ("lowest", min))]
    return coloured([line for line in bounds if line is not None], dots=dots)


def which_layers(layers: int) -> str:
    """Say what the curves of ``layer_curves`` are."""
    return "A line for each MoE layer." if layers <= MOST_LAYERS else f"Highest, median and lowest value of the {layers} MoE layers."


def load_sections(record: Record) -> list[Section]:
    """Return the load of the experts at the end, and how uneven it was on the way; nothing without MoE layers."""
    recent = [line["load"] for line in record.train if line.get("load")][-MAP_STEPS:]
    if not recent:
        return []
    mean = np.mean(recent, axis=0)
    heat = Heat(
        "", tuple(f"MoE layer {layer + 1}" for layer in range(len(mean))), tuple(map(str, range(mean.shape[1]))), tuple(map(tuple, mean))
    )
    rows = [Chart("busiest expert's load / mean load", layer_curves(record.routers("max_over_mean")), level=EVEN)]
    rows.append(Chart("entropy of the load / its maximum", layer_curves(record.routers("entropy")), level=(1.0, ""), form="{:.3f}"))
    dead = record.routers("dead_experts")
    if dead:
        rows.append(Chart("experts without a token in the step", layer_curves(dead), form="{:.1f}", whole=True))
    return [
        FigureSection(
            "Which experts work",
            heat_maps([heat], "routed expert"),
            f"Tokens sent to each expert, relative to an even share (1.0); mean of the last {len(recent)} steps. Orange: busier; "
            "blue: idler. A row with one strong orange cell and much blue has collapsed onto an expert.",
        ),
        FigureSection(
            "Balance on the way",
            charts(rows),
            f"{which_layers(len(mean))} All lie at 1 in the upper two charts when every expert gets the same number of tokens. "
            "The first chart sees one overloaded expert, the second the whole distribution"
            + ("; an expert that stays without tokens learns nothing." if dead else "."),
        ),
    ]


def device_sections(record: Record) -> list[Section]:
    """Return the load of the devices, what tokens cost in sends, and what was dropped; nothing where the experts are of one device."""
    loads = [line["router"]["device_load"] for line in record.train if line.get("router", {}).get("device_load")][-MAP_STEPS:]
    rows = [
        Chart(title, layer_curves(lines), form=form, level=level)
        for key, title, form, level in (
            ("device_load", "busiest device's load / mean load, before dropping", "{:.2f}", EVEN),
            ("computed_max", "busiest device's load / mean load, after dropping", "{:.2f}", EVEN),
            ("sends_per_token", "devices that a token is sent to", "{:.2f}", None),
            ("dropped_share", "share of the assignments that was dropped", "{:.3f}", None),
        )
        if (lines := record.routers(key))
    ]
    if not loads or not rows:
        return []
    mean = np.mean(loads, axis=0)
    layers, devices = mean.shape
    names = tuple(f"device {device}" for device in range(devices))
    heat = Heat("", tuple(f"MoE layer {layer + 1}" for layer in range(layers)), names, tuple(map(tuple, mean)))
    dropped = any("dropped" in line.get("router", {}) for line in record.train)
    return [
        FigureSection(
            "Which devices work",
            heat_maps([heat], "group of experts that lies on one device"),
            f"Assignments that each device received before any dropping, relative to an even share; mean of the last {len(loads)} steps. "
            "A step waits for its busiest device.",
        ),
        FigureSection(
            "Devices on the way",
            charts(rows),
            f"{which_layers(layers)} The busiest device sets the time of a step, the number of sends sets the traffic between devices"
            + ("; dropping bounds the first at the price of assignments that no expert computes." if dropped else "."),
        ),
    ]


def domain_sections(record: Record) -> list[Section]:
    """Return the map of experts by domain at the last validation that counted them, and how the domains grew apart."""
    counted = [line for line in record.of_kind("validation") if line.get("experts")]
    if not counted:
        return []
    experts = in_order(counted[-1]["experts"])
    divergence = specialisation(record)
    shown = chosen_layers([line.y[-1] for line in divergence] or [0.0] * len(next(iter(experts.values()))))
    maps = [domain_map(experts, layer, divergence[layer].y[-1] if divergence else None) for layer in shown]
    which = "" if len(maps) >= len(next(iter(experts.values()))) else " Shown: the first and the last layer, and those that separate most."
    sections: list[Section] = [
        FigureSection(
            "Which experts serve which domain",
            heat_maps(maps, "routed expert, ordered by the domain that uses it most"),
            "Share of each domain's held-out tokens that went to an expert, relative to an even share (1.0). A column that is orange "
            f"in one row only is a specialist; columns alike in all rows mean that the router does not tell the domains apart.{which}",
        )
    ]
    if divergence:
        if len(divergence[0].x) > 1:
            rows = [Chart("divergence of the domains' experts", layer_curves(divergence, dots=True), form="{:.3f}")]
            sections.append(FigureSection("How far the domains part", charts(rows), f"{DIVERGENCE} {which_layers(len(divergence))}"))
        if len(divergence) > MOST_LAYERS:
            by_layer = Line("", tuple(float(i + 1) for i in range(len(divergence))), tuple(line.y[-1] for line in divergence))
            rows = [Chart("divergence at the last validation", (Curve(by_layer, HUES[0], dots=True, named=False),), form="{:.3f}")]
            sections.append(
                FigureSection("Depth and specialisation", charts(rows, over=LAYERS), f"{DIVERGENCE} By depth, first layer left.")
            )
    return sections


def domain_map(experts: dict[str, list[list[float]]], layer: int, divergence: float | None) -> Heat:
    """Return the map of one layer, its experts ordered by the domain that uses them most, then by how much more it does."""
    shares = np.asarray([domain[layer] for domain in experts.values()], dtype=float)
    relative = shares / np.maximum(shares.mean(axis=0), 1e-12)
    order = sorted(range(shares.shape[1]), key=lambda expert: (int(relative[:, expert].argmax()), -float(relative[:, expert].max())))
    title = f"MoE layer {layer + 1}" + (f", divergence {divergence:.3f}" if divergence is not None else "")
    names = [str(expert) if len(order) <= WRITTEN_COLUMNS else "" for expert in order]
    return Heat(title, tuple(map(domain_name, experts)), tuple(names), tuple(map(tuple, shares[:, order])))


def chosen_layers(divergence: Sequence[float]) -> list[int]:
    """Return all of a few layers; of many the first, the last and those that separate the domains most."""
    if len(divergence) <= MOST_MAPS:
        return list(range(len(divergence)))
    ends = [0, len(divergence) - 1]
    between = sorted(range(1, ends[1]), key=lambda layer: -divergence[layer])[: MOST_MAPS - 2]
    return sorted([*ends, *between])
