"""The balance study on paper: tables between markers of docs/balance.md, and pictures, both from results.json alone."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from typing import Any

from balance_measures import side, values_of

from dsv2.plan.figures import HUES, INK, RULE, SETTINGS, SOFT

Results = Mapping[str, Any]
BASE = "baseline"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What was expected, of one figure of two arms: ``more`` 1: the first is higher; -1: lower; 0: not higher beyond the noise."""

    text: str
    figure: str
    arms: tuple[str, str]
    more: int


EXPECTED = (
    Expectation("Without alpha_1 single experts are busier.", "expert", ("alpha1-0", BASE), 1),
    Expectation("With none of the losses they are, too.", "expert", ("no-losses", BASE), 1),
    Expectation("alpha_1 = 0.01 evens more than 0.003,", "expert", ("alpha1-0.01", BASE), -1),
    Expectation("and 0.1 more than 0.01,", "expert", ("alpha1-0.1", "alpha1-0.01"), -1),
    Expectation("but 0.1 costs held-out bits.", "held_out", ("alpha1-0.1", BASE), 1),
    Expectation("The paper's weights cost none.", "held_out", (BASE, "no-losses"), 0),
    Expectation("Without alpha_2 devices are less even.", "device", ("alpha2-0", BASE), 1),
    Expectation("Without alpha_3 what devices receive is less even.", "received", ("alpha3-0", BASE), 1),
    Expectation("Without a limit a token reaches more devices.", "sends", ("m8", BASE), 1),
    Expectation("M = 3 predicts as well as no limit;", "held_out", (BASE, "m8"), 0),
    Expectation("M = 1 worse.", "held_out", ("m1", BASE), 1),
    Expectation("Dropping costs no held-out bits where the losses even the load,", "held_out", ("dropping", BASE), 0),
    Expectation("and some where nothing does.", "held_out", ("no-losses-dropping", "no-losses"), 1),
    Expectation("Without losses more is dropped.", "dropped", ("no-losses-dropping", "dropping"), 1),
)

# columns of a table: heading, figure, how a value is written
Column = tuple[str, str, Callable[[float], str]]


def two(value: float) -> str:
    return f"{value:.2f}"


def three(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def whole(value: float) -> str:
    return f"{value:.3g}"


BALANCE: tuple[Column, ...] = (
    ("experts", "expert", two),
    ("worst layer", "expert_worst", two),
    ("idle experts", "dead", two),
    ("dead", "dead_lasting", whole),
    ("devices", "device", two),
    ("received", "received", two),
    ("sends per token", "sends", two),
    ("most", "most_sends", whole),
)
QUALITY: tuple[Column, ...] = (
    ("held-out bits per byte", "held_out", three),
    ("training loss", "loss", three),
    ("dropped", "dropped", percent),
    ("dropped, whole run", "dropped_all", percent),
    ("devices chosen", "device", two),
    ("devices computed", "computed", two),
)
WRITE = {figure: write for _, figure, write in (*BALANCE, *QUALITY)}


def cell(results: Results, arm: str, figure: str, write: Callable[[float], str]) -> str:
    """Write mean and range; bold where all seeds lie on one side of all of the baseline's."""
    values = values_of(results, arm, figure)
    if not values:
        return "-"
    low, high = write(min(values)), write(max(values))
    text = write(fmean(values))
    base = values_of(results, BASE, figure)
    if arm != BASE and base and side(values, base):
        text = f"**{text}**"
    return text if low == high else f"{text} ({low} to {high})"


def arms_table(results: Results, columns: Sequence[Column]) -> str:
    """Return a table with a row for each arm."""
    rows = [["arm", *(heading for heading, _, _ in columns)], ["---"] + ["---:"] * len(columns)]
    for name, arm in results["arms"].items():
        rows.append([arm["label"], *(cell(results, name, figure, write) for _, figure, write in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def chance_row(results: Results) -> str:
    """Return the row of a router without any preference, for the table of balance."""
    cells = [write(results["chance"][figure]) if figure in results["chance"] else "-" for _, figure, write in BALANCE]
    return f"| chance alone, M = 3 | {' | '.join(cells)} |"


def verdict(found: int, more: int) -> str:
    """Say whether what was found (``side`` of the two arms) is what was expected."""
    if more:
        return {1: "yes", 0: "inside the noise", -1: "**no: the other way**"}[found * more]
    return {1: "**no: higher**", 0: "yes: inside the noise", -1: "yes: even lower"}[found]


def expectations_table(results: Results) -> str:
    """Return what was expected, what was seen and whether that is more than noise."""
    rows = [["expected", "seen", "held"], ["---", "---", "---"]]
    for expected in EXPECTED:
        one, other = (values_of(results, arm, expected.figure) for arm in expected.arms)
        write = WRITE[expected.figure]
        held = verdict(side(one, other), expected.more)
        rows.append([expected.text, f"{write(fmean(one))} against {write(fmean(other))}", held])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def setup_line(results: Results) -> str:
    """Say what was run."""
    setup, arms = results["setup"], results["arms"].values()
    seconds = [seed["seconds"] for arm in arms for seed in arm["seeds"]]
    return (
        f"{len(arms)} arms x {len(next(iter(arms))['seeds'])} seeds; {setup['parameters']:,} parameters, {setup['activated']:,} at work"
        f" per token, {setup['moe_layers']} MoE layers, {setup['chosen']} of {setup['experts']} experts on {setup['devices']} groups;"
        f" {setup['steps']} steps of {setup['step_tokens']:,} tokens; {setup['held_out_bytes']:,} bytes of held-out text;"
        f" fp32, one thread, {min(seconds):.0f} to {max(seconds):.0f} s of wall clock a run, torch {setup['torch']}, {setup['cpu']}."
    )


def blocks(results: Results) -> dict[str, str]:
    """Return what stands between the markers of the page."""
    return {
        "setup": setup_line(results),
        "expected": expectations_table(results),
        "balance": f"{arms_table(results, BALANCE)}\n{chance_row(results)}",
        "quality": arms_table(results, QUALITY),
    }


def fill(text: str, results: Results) -> str:
    """Replace what stands between ``<!-- NAME: from results.json -->`` and ``<!-- end -->``.

    Raises:
        ValueError: a block has no markers.
    """
    for name, block in blocks(results).items():
        pattern = re.compile(rf"(<!-- {name}: from results.json -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: f"{match[1]}\n{block}\n\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"the page has {found} pairs of markers for {name!r}; it needs one")
    return text


# Pictures ---------------------------------------------------------------------------------------------------------------------------


def pictures(results: Results) -> dict[str, bytes]:
    """Draw all pictures: file name -> PNG."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        return {"arms.png": draw_arms(results), "course.png": draw_course(results), "dropping.png": draw_dropping(results)}


def new_figure(columns: int, height: float, title: str, **options: Any) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, height), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()


def draw_arms(results: Results) -> bytes:
    """Draw every figure of every arm: a point for each seed, a bar at the mean, the baseline's range as a band."""
    panels = (
        ("experts\nbusiest / mean", "expert"), ("idle experts\nper step and layer", "dead"), ("devices\nbusiest / mean", "device"),
        ("received\nbusiest / mean", "received"), ("sends per token", "sends"), ("held-out\nbits per byte", "held_out"),
    )  # fmt: skip
    arms = results["arms"]
    figure, axes = new_figure(len(panels), 0.9 + 0.36 * len(arms), "What each arm changes", sharey=True)
    for axis, (title, name) in zip(axes, panels, strict=True):
        base = values_of(results, BASE, name)
        if name in results["chance"] and name != "sends":
            axis.axvline(results["chance"][name], color=SOFT, linestyle=":", linewidth=1.2)
        axis.axvspan(min(base), max(base), color=RULE, alpha=0.8, linewidth=0)
        for row, arm in enumerate(arms):
            values = values_of(results, arm, name)
            hue = INK if arm == BASE else HUES[1] if side(values, base) > 0 else HUES[0] if side(values, base) < 0 else SOFT
            axis.plot(values, [row] * len(values), "o", color=hue, markersize=4.5, alpha=0.55, markeredgewidth=0)
            axis.plot([fmean(values)], [row], "|", color=hue, markersize=13, markeredgewidth=2)
        axis.set_title(title, color=SOFT, fontsize=9)
        axis.grid(False, axis="y")
        axis.margins(x=0.12)
        axis.locator_params(axis="x", nbins=3)
        axis.ticklabel_format(axis="x", useOffset=False)
    axes[0].set_yticks(range(len(arms)), [arm["label"] for arm in arms.values()])
    axes[0].tick_params(axis="y", labelcolor=INK, length=0)
    axes[0].invert_yaxis()
    note = (
        "a dot per seed, a bar at the mean; band: range of the baseline; orange: all seeds above it, blue: all below; dotted: chance alone"
    )
    figure.supxlabel(note, color=SOFT, fontsize=9)
    return png(figure)


def plot_course(axis: Any, results: Results, name: str, arms: Sequence[tuple[str, str, str]]) -> None:
    """Draw a curve for each (arm, legend, colour): mean of the seeds, and their range as a band."""
    for arm, label, hue in arms:
        course = results["arms"][arm]["course"]
        tokens = [value / 1000 for value in course["tokens"]]
        mean, low, high = zip(*course[name], strict=True)
        axis.fill_between(tokens, low, high, color=hue, alpha=0.15, linewidth=0)
        axis.plot(tokens, mean, color=hue, linewidth=1.7, label=label)
    axis.set_xlim(0, None)
    axis.margins(y=0.25)  # room for the legend
    axis.set_xlabel("thousand tokens")
    axis.legend(loc="upper right")


def draw_course(results: Results) -> bytes:
    """Draw how uneven experts, devices and what they receive are in the course of training."""
    figure, axes = new_figure(3, 3.9, "Balance in the course of training: busiest / mean; dotted: what chance alone leaves")
    panels = (
        ("experts", "expert", "alpha_1", [("alpha1-0", "0"), (BASE, "0.003"), ("alpha1-0.01", "0.01"), ("alpha1-0.1", "0.1")]),
        ("devices", "device", "", [("no-losses", "no losses"), ("alpha2-0", "alpha_2 = 0"), (BASE, "baseline")]),
        ("received", "received", "", [("no-losses", "no losses"), ("alpha3-0", "alpha_3 = 0"), (BASE, "baseline")]),
    )
    for axis, (title, name, legend, arms) in zip(axes, panels, strict=True):
        plot_course(axis, results, name, [(arm, label, INK if arm == BASE else HUES[place]) for place, (arm, label) in enumerate(arms)])
        axis.set_title(title, color=SOFT)
        axis.axhline(results["chance"][name], color=SOFT, linewidth=1.2, linestyle=":")
        axis.get_legend().set_title(legend)
    return png(figure)


def draw_dropping(results: Results) -> bytes:
    """Draw what is dropped, and the busiest device before and after."""
    figure, axes = new_figure(2, 3.7, "Dropping: what exceeds a device's mean load goes, lowest affinity first")
    plot_course(axes[0], results, "dropped", [("no-losses-dropping", "no losses", HUES[1]), ("dropping", "with the losses", INK)])
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes[0].set_title("assignments dropped", color=SOFT)
    for arm, hue, label in (("no-losses-dropping", HUES[1], "no losses"), ("dropping", INK, "with the losses")):
        plot_course(axes[1], results, "device", [(arm, f"{label}: chosen", hue)])
        plot_course(axes[1], results, "computed", [(arm, f"{label}: computed", HUES[4] if hue != INK else HUES[0])])
    axes[1].axhline(1.0, color=SOFT, linewidth=0.8)
    axes[1].set_title("busiest device / mean", color=SOFT)
    for axis in axes:
        axis.set_ylim(0 if axis is axes[0] else None, None)
    return png(figure)
