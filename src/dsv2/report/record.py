"""What a run left behind, ready to be drawn: its metrics as lines, its recipe and its plan; older runs lack some of it."""

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv2.errors import DataError
from dsv2.metrics import read_metrics
from dsv2.report.drawing import Line

DOMAIN_NAMES = {"en": "English", "zh": "Chinese", "code": "Code", "math": "Maths"}
MACHINE = ("device", "threads", "torch", "data", "start")  # of plan.json: what a run depends on besides its recipe

Metrics = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Record:
    """A run as a report sees it.

    Args:
        name: short, for people.
        metrics: the lines of metrics.jsonl, in order.
        settings: recipe.toml with dotted keys, and what plan.json says of derived sections, machine and data; empty where they are missing.
    """

    name: str
    metrics: Metrics
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of_kind(self, kind: str) -> Metrics:
        """Return the lines of one kind, in order."""
        return [line for line in self.metrics if line["kind"] == kind]

    @property
    def train(self) -> Metrics:
        """The lines of training steps."""
        return self.of_kind("train")

    @property
    def grpo(self) -> Metrics:
        """The lines of GRPO's steps."""
        return self.of_kind("grpo")

    @property
    def validations(self) -> Metrics:
        """The validation lines that hold a finite value, without the domains that do not; known domains first, English before all.

        A line without ``elapsed_s``, as older runs have them, takes it from the training step of its number.
        """
        lines = []
        times = {line["step"]: line["elapsed_s"] for line in self.train if line.get("elapsed_s") is not None}
        for line in self.of_kind("validation"):
            finite = {key: in_order({d: v for d, v in line.get(key, {}).items() if v is not None}) for key in ("bits_per_byte", "loss")}
            if finite["bits_per_byte"]:
                known = {"elapsed_s": times[line["step"]]} if line["step"] in times else {}
                lines.append(known | line | finite)
        return lines

    @property
    def baselines(self) -> dict[str, Mapping[str, float]]:
        """Predictor -> domain -> bits per byte from lines ``{"kind": "baseline", "name": "bigram", "bits_per_byte": {"en": 1.9}}``."""
        return {line["name"]: line["bits_per_byte"] for line in self.of_kind("baseline")}

    @property
    def spikes(self) -> Metrics:
        """The lines that the guard wrote."""
        return self.of_kind("spike")

    def series(self, key: str, name: str = "") -> Line | None:
        """Return a number of the training lines as a line; steps where it was not finite are gaps. None: no step has it."""
        return line_of(name or self.name, [(line, line[key]) for line in self.train if line.get(key) is not None])

    def held_out(self, key: str) -> dict[str, Line]:
        """Return domain -> ``loss`` or ``bits_per_byte`` of held-out text as a line."""
        by_domain: dict[str, list[tuple[dict[str, Any], float]]] = defaultdict(list)
        for line in self.validations:
            for domain, value in line[key].items():
                by_domain[domain].append((line, value))
        found = {domain: line_of(domain_name(domain), points) for domain, points in in_order(by_domain).items()}
        return {domain: line for domain, line in found.items() if line is not None}

    def routers(self, key: str) -> list[Line]:
        """Return a figure of ``router`` as a line for each MoE layer; of device loads the busiest device's, over the mean.

        Runs older than those figures still give ``max_over_mean`` and ``entropy``, computed from the loads.
        """
        rows = [(line, values) for line in self.train if (values := router_values(line, key))]
        layers = min((len(values) for _, values in rows), default=0)
        found = [line_of(f"layer {layer + 1}", [(line, values[layer]) for line, values in rows]) for layer in range(layers)]
        return [line for line in found if line is not None]


def router_values(line: Mapping[str, Any], key: str) -> list[float]:
    """Return a figure of each MoE layer from one training line; empty where the line does not have it."""
    router, load = line.get("router", {}), line.get("load") or []
    if key == "device_load":
        return [max(layer) * len(layer) for layer in router.get(key, [])]
    if key in router:
        return list(router[key])
    if key == "max_over_mean":
        return [max(layer) * len(layer) for layer in load]
    if key == "entropy":
        return [-sum(share * math.log(share) for share in layer if share > 0) / max(math.log(len(layer)), 1e-12) for layer in load]
    return []


def line_of(name: str, points: Sequence[tuple[Mapping[str, Any], float]]) -> Line | None:
    """Return (metrics line, value) pairs as a line against tokens, and against time where every one has its time."""
    if not points:
        return None
    times = tuple(line["elapsed_s"] for line, _ in points if line.get("elapsed_s") is not None)
    tokens = tuple(float(line["tokens"]) for line, _ in points)
    return Line(name, tokens, tuple(float(value) for _, value in points), times if len(times) == len(points) else ())


def over_layers(name: str, lines: Sequence[Line], reduce: Any) -> Line | None:
    """Return one line out of those of a run's layers, such as the ``max`` of them at each point; None where there are none."""
    if not lines:
        return None
    return Line(name, lines[0].x, tuple(float(reduce(values)) for values in zip(*(line.y for line in lines), strict=True)), lines[0].times)


def domain_name(domain: str) -> str:
    """Return a domain as a reader calls it."""
    return DOMAIN_NAMES.get(domain, domain)


def in_order(by_domain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries with the known domains first, English before all."""
    known = list(DOMAIN_NAMES)
    return dict(sorted(by_domain.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))


def load_record(folder: Path, name: str = "") -> Record:
    """Read a run's folder.

    Raises:
        DataError: there are no metrics, or no training step is among them.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(
            f"{folder} has no metrics.jsonl", hint="name the folder of a run (the --out of dsv2 pretrain, or the run of a tour)"
        )
    metrics = read_metrics(path)
    if not any(line["kind"] == "grpo" or (line["kind"] == "train" and line.get("loss") is not None) for line in metrics):
        raise DataError(
            f"{path} holds {len(metrics)} lines and no training step with a finite loss", hint="let the run make at least one step"
        )
    return Record(name or folder.resolve().name, metrics, load_settings(folder))


def load_records(folders: Sequence[Path]) -> list[Record]:
    """Read several runs; those of equal folder names are told apart by their paths."""
    short = [path.resolve().name for path in folders]
    return [load_record(path, str(path) if short.count(name) > 1 else name) for path, name in zip(folders, short, strict=True)]


def load_settings(folder: Path) -> dict[str, Any]:
    """Return a run's recipe with dotted keys, and what it depends on besides; what is missing is left out.

    Raises:
        DataError: recipe.toml or plan.json is there and damaged.
    """
    settings: dict[str, Any] = {}
    try:
        if (folder / "recipe.toml").is_file():
            settings |= dotted(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))
        if (folder / "plan.json").is_file():
            plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            settings |= dotted(plan.get("derived", {})) | {key: str(plan[key])[:12] for key in MACHINE if key in plan}
    except ValueError as error:
        raise DataError(f"{folder}: recipe.toml or plan.json is damaged: {error}", hint="restore the file, or remove it") from error
    return settings


def dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, ``{"run": {"seed": 0}}`` as ``{"run.seed": 0}``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
