"""What decode_vs_peers.py found: figures of a case, the tables, and the bars that they are held against."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quiet_machine import MOST

OURS, LLAMA, TRANSFORMERS = "dsv2", "llama.cpp", "transformers"
ALLOWANCE_MIB = 600  # of memory beside the packed file and the cache
LIKE = 1.2  # one rate of reading over another, at most, for figures to be compared


class Figures:
    """What the processes of one case reported.

    Args:
        label: of the case, shape and width.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.rows: list[dict[str, Any]] = []

    def add(self, side: str, row: Mapping[str, Any]) -> str:
        """Keep what a process of a side reported; return it as a line."""
        self.rows.append({"side": side} | dict(row))
        said = []
        for what, figure in row["figures"].items():
            share = f" ({figure['of_roof']:.0%} of the roof at {figure['read']:.0f} GB/s)" if "of_roof" in figure else ""
            busy = f" [others {figure['others']:.0%}]" if figure["others"] > MOST / 2 else ""
            said.append(f"{what} {figure['value']:,.1f}{share}{busy}")
        return f"{self.label}, {side}: " + ", ".join(said)

    def sides(self) -> list[str]:
        return list(dict.fromkeys(row["side"] for row in self.rows))

    def whats(self) -> list[str]:
        return list(dict.fromkeys(what for row in self.rows for what in row["figures"]))

    def taken(self, side: str, what: str) -> list[dict[str, Any]]:
        """Return a side's figures under a name, disturbed ones included."""
        return [row["figures"][what] for row in self.rows if row["side"] == side and what in row["figures"]]

    def value(self, side: str, what: str, field: str = "value") -> float | None:
        """Return the median of a side's undisturbed figures; of a peer the best, as its programs measure one thing in two ways."""
        good = [figure[field] for figure in self.taken(side, what) if figure["others"] <= MOST and field in figure]
        if not good:
            return None
        return statistics.median(good) if side == OURS else max(good)

    def modes(self, peer: str) -> list[str]:
        """Return the sides that a peer stands for: itself, or the modes of transformers, of "eager transformers" those not compiled."""
        if peer in self.sides():
            return [peer]
        return [side for side in self.sides() if side.startswith(TRANSFORMERS) and (peer == TRANSFORMERS or "compiled" not in side)]

    def over(self, peer: str, what: str) -> tuple[float | None, bool]:
        """Return dsv2's speed over a peer's best, and whether memory was as fast for both.

        Each of dsv2's figures is compared with the best of the peer's that met the same rate of reading; the median counts. Where no two
        met the same, dsv2's median is compared with the peer's best.
        """
        theirs = [figure for side in self.modes(peer) for figure in self.taken(side, what) if figure["others"] <= MOST]
        ours = [figure for figure in self.taken(OURS, what) if figure["others"] <= MOST]
        alike = [(mine["value"], [their["value"] for their in theirs if _alike(mine, their)]) for mine in ours]
        if ratios := [mine / max(values) for mine, values in alike if values]:
            return statistics.median(ratios), True
        if not ours or not theirs:
            return None, False
        return statistics.median(mine["value"] for mine in ours) / max(their["value"] for their in theirs), False


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether memory kept one rate while two figures were taken; those of prompts are the processor's, whatever the rate."""
    if "reads" not in one or "reads" not in other:
        return True
    reads = one["reads"] + other["reads"]
    return max(reads) <= LIKE * min(reads)


# Bars -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A claim and what came of it.

    Args:
        name: of the comparison.
        least: that the value must be.
        value: None where it was not measured, or only disturbed.
        alike: memory was as fast for both sides.
    """

    name: str
    least: float
    value: float | None
    alike: bool = True

    @property
    def outcome(self) -> str:
        if self.value is None:
            return "no quiet figure"
        return ("reached" if self.value >= self.least else "missed") + ("" if self.alike else ", memory not as fast for both")


def _bars() -> Iterator[tuple[str, str, str, float]]:
    """Yield case, figure, what it is compared with and the least ratio."""
    few, every = ("lite 4.5", "lite 8.5"), ("lite 4.5", "lite 8.5", "small bf16", "small 8.5", "small 4.5")
    for label in every:
        yield label, "decode b1", "roof", 0.80
        yield label, "decode b1", LLAMA, 1.25
        yield label, "decode b8", "roof", 0.75
        yield label, "decode b32", "roof", 0.75
    for label in few:
        yield label, "decode b8", LLAMA, 2.0
        yield label, "decode b32", LLAMA, 2.0
        yield label, "prefill 512", LLAMA, 2.0
        yield label, "prefill 4096", LLAMA, 2.0
        yield label, "depth 16384", "depth 0", 0.40
    yield "small 8.5", "depth 16384", LLAMA, 2.0
    yield "small 4.5", "depth 16384", LLAMA, 2.0
    yield "lite6 bf16", "prefill 512", TRANSFORMERS, 1.0
    yield "lite6 bf16", "prefill 4096", TRANSFORMERS, 1.1
    yield "nano bf16", "decode b1", LLAMA, 1.0
    yield "nano bf16", "decode b1", "eager transformers", 10.0
    yield "small bf16", "decode b1", "eager transformers", 4.0
    yield "lite6 bf16", "decode b1", "eager transformers", 2.5


def judge(found: Mapping[str, Figures]) -> list[Bar]:
    """Return the bars of the cases that were run, those left out whose figures were not asked for."""
    bars = []
    for label, what, against, least in _bars():
        figures = found.get(label)
        if figures is None or not figures.taken(OURS, what):
            continue
        if against == LLAMA and LLAMA not in figures.sides():
            continue
        name = f"{what} {label} {'of' if against == 'roof' else 'over'} {against}".replace(" ", "_")
        bars.append(Bar(name, least, *_ratio(figures, what, against)))
    return bars


def _ratio(figures: Figures, what: str, against: str) -> tuple[float | None, bool]:
    if against in ("roof", "depth 0"):  # both taken in turns with it
        return figures.value(OURS, what, "of_roof" if against == "roof" else "kept"), True
    return figures.over(against, what)


# Tables -----------------------------------------------------------------------------------------------------------------------------


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show_case(figures: Figures) -> None:
    """Print tokens/s of all sides, and dsv2's share of the roof; a ratio with ? is of figures that met other rates of memory."""
    peers = [side for side in figures.sides() if side != OURS]
    rows = []
    for what in figures.whats():
        row = [what, _speed(figures, OURS, what)]
        for peer in peers:
            row.append(_speed(figures, peer, what) + _times(figures, peer, what))
        row += [_shown(figures.value(OURS, what, "of_roof"), ".0%"), _shown(figures.value(OURS, what, "read"), ".1f")]
        row.append(_shown(figures.value(OURS, what, "distinct_experts"), ".1f"))
        rows.append(row)
    print(f"\n{figures.label}: tokens/s, in brackets dsv2 over that peer (?: memory was not as fast for both)", end="")
    _markdown(["what", OURS, *peers, "of the roof", "read, GB/s", "experts a layer"], rows)


def _times(figures: Figures, peer: str, what: str) -> str:
    value, alike = figures.over(peer, what)
    return "" if value is None else f" ({value:.2f}{'' if alike else ' ?'})"


def _speed(figures: Figures, side: str, what: str) -> str:
    value = figures.value(side, what)
    if value is None and figures.taken(side, what):
        return "disturbed"
    return _shown(value, ",.1f")


def show_memory(found: Sequence[Figures]) -> None:
    """Print what dsv2 held at its peak beside what it may hold, and the time of loading, the file in the page cache or not."""
    rows = []
    for figures in found:
        ours = [row for row in figures.rows if row["side"] == OURS]
        worst = max(ours, key=lambda row: row["peak_mib"] - row["cache_mib"])
        may = worst["packed_mib"] + worst["cache_mib"] + ALLOWANCE_MIB
        sizes = [f"{worst[name]:,.0f}" for name in ("packed_mib", "cache_mib", "peak_mib")]
        loads = ", ".join(f"{row['load_s']:.1f}" for row in ours)
        rows.append([figures.label, *sizes, f"{may / worst['peak_mib']:.3f}", loads])
    print(f"\ndsv2's memory, MiB; file, cache and {ALLOWANCE_MIB} MiB over the peak must be at least 1", end="")
    _markdown(["case", "packed file", "largest cache", "peak", "ratio", "load, s, each start"], rows)


def show_bars(bars: Sequence[Bar]) -> None:
    """Print each bar with what was reached, and the ``ratio`` lines."""
    _markdown(["bar", "at least", "measured", ""], [[bar.name, f"{bar.least:.2f}", _shown(bar.value, ".3f"), bar.outcome] for bar in bars])
    print()
    for bar in bars:
        if bar.value is not None:
            print(f"ratio {bar.name} {bar.value:.3f}")
    missed = [bar.name for bar in bars if not bar.outcome.startswith("reached")]
    print(f"{len(bars) - len(missed)} of {len(bars)} bars reached" + (f"; not: {', '.join(missed)}" if missed else ""))
