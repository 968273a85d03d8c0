"""What the figures of a report show: numbers against hand computation, every quantity of new runs, and older runs without them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsv2.errors import DataError
from dsv2.report import FigureSection, TableSection, TextSection, run, run_sections
from dsv2.report.balance import chosen_layers, domain_map, jensen_shannon, specialisation
from dsv2.report.compare import comparison_sections, differences_section, ends_section
from dsv2.report.record import Record, load_record

LOAD = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
ROUTER = {
    "max_over_mean": [2.0, 1.0], "entropy": [0.75, 1.0], "dead_experts": [1, 0], "device_load": [[0.75, 0.25], [0.5, 0.5]],
    "sends_per_token": [1.5, 1.25], "dropped": [3, 0], "dropped_share": [0.1, 0.0], "computed_max": [1.1, 1.0],
}  # fmt: skip
EXPERTS = {"zh": [[0.0, 0.5, 0.5, 0.0], LOAD[1]], "en": [[0.5, 0.0, 0.0, 0.5], LOAD[1]]}


def train_line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "kind": "train", "tokens": step * 1000, "loss": 5 / step, "elapsed_s": step * 2.0, "load": LOAD} | more


def write_run(folder: Path, *, new: bool = True, settings: str = "", domains: tuple[str, ...] = ("zh", "en")) -> Path:
    """A run of 30 steps; ``new``: with all that a run writes today."""
    lines = []
    for step in range(1, 31):
        modern = {"router": ROUTER, "grad_norm": 1 / step, "lr": 1e-3, "tokens_per_s": 500.0} if new else {}
        lines.append(train_line(step, **modern))
        if new and step == 7:
            lines[-1]["skipped"] = True
            lines.append(
                {
                    "step": 7,
                    "kind": "spike",
                    "what": "grad_norm",
                    "value": 9.0,
                    "limit": 2.0,
                    "first_sample": 48,
                    "in_a_row": 1,
                    "action": "skipped",
                }
            )
        if step % 10 == 0:
            values = dict.fromkeys(domains, 4 - step / 30)
            modern = {"experts": EXPERTS, "elapsed_s": step * 2.0} if new else {}
            lines.append({"step": step, "kind": "validation", "tokens": step * 1000, "bits_per_byte": values, "loss": values} | modern)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings:
        (folder / "recipe.toml").write_text(settings)
    return folder


def titles(sections: Any) -> list[str]:
    return [section.title for section in sections]


def test_divergence_equals_a_hand_computation() -> None:
    assert jensen_shannon([[0.5, 0.5], [0.5, 0.5]]) == 0
    assert jensen_shannon([[1, 0, 0], [0, 0.5, 0.5]]) == pytest.approx(1)
    # The mean is (3/4, 1/4) with entropy 2 ln 2 - (3/4) ln 3; the mean of the entropies 0 and ln 2 goes off; the largest value is ln 2.
    expected = (2 * math.log(2) - 0.75 * math.log(3) - 0.5 * math.log(2)) / math.log(2)
    assert jensen_shannon([[1, 0], [0.5, 0.5]]) == pytest.approx(expected)
    assert jensen_shannon([[2, 0], [50, 50]]) == pytest.approx(expected)  # counts do as well
    assert jensen_shannon([[0.3, 0.7]]) == 0


def test_the_map_of_domains_holds_their_shares_specialists_first(tmp_path: Path) -> None:
    record = load_record(write_run(tmp_path / "run"))
    assert [(line.name, line.y) for line in specialisation(record)] == [("layer 1", (1.0, 1.0, 1.0)), ("layer 2", (0.0, 0.0, 0.0))]
    assert specialisation(record)[0].times == (20.0, 40.0, 60.0)
    heat = domain_map({"en": [[0.1, 0.6, 0.3]], "zh": [[0.3, 0.0, 0.7]]}, 0, 0.25)
    assert heat.rows == ("English", "Chinese")
    assert heat.columns == ("1", "0", "2")  # expert 1 is English's; 0 is Chinese three to one, 2 seven to three
    assert heat.shares == ((0.6, 0.1, 0.3), (0.0, 0.3, 0.7))
    assert chosen_layers([0.0, 0.1, 0.3, 0.2, 0.3, 0.0]) == [0, 2, 4, 5]


def test_a_run_shows_all_it_wrote(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings="[optimizer]\nclip_norm = 0.5\n")
    sections = run_sections(folder)
    assert titles(sections) == [
        "Learning", "How well it predicts", "Loss", "Bits per byte by domain",
        "Steps", "Gradient norm, learning rate, speed", "Spikes",
        "Routing", "Which experts work", "Balance on the way", "Which devices work", "Devices on the way",
        "Which experts serve which domain", "How far the domains part", "Recipe", "All settings",
    ]  # fmt: skip
    drawn = {section.title: section.svg for section in sections if isinstance(section, FigureSection)}
    for title, texts in {
        "Loss": ("training tokens", "training time, s"),
        "Bits per byte by domain": ("English 3.00", "Chinese 3.00", "training time, s"),
        "Gradient norm, learning rate, speed": ("clipped at 0.5", "learning rate", "tokens per second"),
        "Balance on the way": ("layer 1 2.00", "layer 2 1.00", "layer 1 0.750", "experts without a token in the step"),
        "Devices on the way": ("layer 1 1.50", "layer 1 1.10", "layer 2 1.25", "layer 1 0.100"),
        "Which experts serve which domain": ("MoE layer 1, divergence 1.000", "MoE layer 2, divergence 0.000"),
    }.items():
        assert [text for text in texts if text not in drawn[title]] == [], title
    spikes = next(section for section in sections if isinstance(section, TableSection))
    assert spikes.rows == (("7", "gradient norm", "9", "2", "skipped"),)


def test_an_older_run_has_a_report_of_what_it_wrote(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", new=False)
    sections = run_sections(folder)
    assert titles(sections) == [
        "Learning", "How well it predicts", "Loss", "Bits per byte by domain", "Routing", "Which experts work", "Balance on the way",
    ]  # fmt: skip
    record = load_record(folder)
    assert [line.y[-1] for line in record.routers("max_over_mean")] == [2.0, 1.0]
    assert [line.y[-1] for line in record.routers("entropy")] == pytest.approx([0.75, 1.0])
    assert record.routers("dead_experts") == []
    assert record.held_out("loss")["en"].times == (20.0, 40.0, 60.0)  # from the training steps
    run([folder, write_run(tmp_path / "new")], tmp_path / "c.html")
    assert "Specialisation" in (tmp_path / "c.html").read_text()


def test_many_layers_are_drawn_by_their_bounds(tmp_path: Path) -> None:
    lines = [train_line(step, load=[[0.5, 0.5]] * 8 + [[0.9, 0.1]]) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    svg = next(section.svg for section in run_sections(tmp_path) if section.title == "Balance on the way")
    assert "highest 1.80" in svg and "median 1.00" in svg and "lowest 1.00" in svg and "layer" not in svg


def test_runs_show_which_settings_differ_and_how_they_ended(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", settings="[run]\nseed = 0\ntokens = 9\n[mixture]\nstages = [{weights = {en = 1}}]\n")
    b = write_run(tmp_path / "b", settings="[run]\nseed = 1\ntokens = 9\n", domains=("en", "fr"))
    c = write_run(tmp_path / "c", new=False)
    (b / "plan.json").write_text(json.dumps({"device": "cuda", "data": "0123456789abcdef", "other": 1}))
    records = [load_record(folder) for folder in (a, b, c)]
    table = differences_section(records)[0]
    assert isinstance(table, TableSection) and table.columns == ("", "a", "b") and "Without a recipe.toml: c" in table.note
    assert table.rows == (
        ("run.seed", "0", "1"), ("mixture.stages", "[{'weights': {'en': 1}}]", "\u2013"), ("device", "\u2013", "cuda"),
        ("data", "\u2013", "0123456789ab"),
    )  # fmt: skip
    ends = {row[0]: row[1:] for row in ends_section(records).rows}
    assert ends["training time"] == ("1 min 00 s",) * 3
    assert ends["Chinese, bits per byte"] == ("3.000", "\u2013", "3.000") and ends["fr, bits per byte"] == ("\u2013", "3.000", "\u2013")
    assert ends["busiest expert / mean, worst layer"] == ("2.00",) * 3
    assert ends["experts without a token, all layers"] == ("1.0", "1.0", "\u2013")
    assert ends["assignments dropped"] == ("5.00%", "5.00%", "\u2013")
    assert ends["divergence of the domains' experts"] == ("0.500", "0.500", "\u2013")
    assert list(ends)[5:8] == ["English, bits per byte", "Chinese, bits per byte", "fr, bits per byte"]
    keys = [section.key for section in comparison_sections(records) if isinstance(section, FigureSection)]
    assert len(keys) == 6 and set(keys) == {(("a", 0), ("b", 1), ("c", 2))}  # one colour a run on the whole page
    assert isinstance(differences_section(records[:1] * 2)[0], TextSection)


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged"):
        load_record(write_run(tmp_path / "run", settings="[run"))


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    record = Record("a", [train_line(1), train_line(2, loss=None), train_line(3)])
    line = record.series("loss")
    assert line is not None and line.x == (1000.0, 3000.0) and line.times == (2.0, 6.0)
