"""The report: complete in itself, everything escaped, every part there, and clear about what is missing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.errors import DataError
from dsv2.report import (
    ChapterSection,
    CommandSection,
    FigureSection,
    Leg,
    LegSection,
    Sample,
    SampleSection,
    TableSection,
    TextSection,
    run,
    run_sections,
    write_report,
    write_tour_report,
)
from dsv2.report.drawing import Line, count, smooth, spread
from dsv2.report.learning import evenly
from dsv2.report.page import duration

EVIL = '<script>alert("1")</script> & </blockquote>'
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: tags must close in order; collects what it refers to and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def train_line(step: int, loss: float | None) -> dict[str, Any]:
    load = [[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]
    return {
        "step": step,
        "kind": "train",
        "tokens": step * 100,
        "loss": loss,
        "tokens_per_s": 4000.0,
        "elapsed_s": step * 0.5,
        "load": load,
    }


def make_run(folder: Path, *, steps: int = 40, extra: list[dict[str, Any]] | None = None) -> Path:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(train_line(step, 8.0 / step**0.2))
        if step % 10 == 0:
            values = {"code": 3.5, "en": 3.0 - step / 50, "zh": 4.0 - step / 50}  # in the alphabet's order, as shards list them
            lines.append({"step": step, "kind": "validation", "tokens": step * 100, "bits_per_byte": values, "loss": values})
            lines.append({"step": step, "kind": "sample", "prompt": "It was ", "text": f"It was story {step} {EVIL}"})
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines + (extra or []))
    (folder / "metrics.jsonl").write_text(text, encoding="utf8")
    return folder


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf8")
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references), page.references
    assert not re.search(r"url\((?!#)|@import|\b(https?:)?//\w", html)
    return html, page


def test_every_field_of_every_section_is_escaped(tmp_path: Path) -> None:
    sections = [
        ChapterSection(EVIL, EVIL),
        TextSection(EVIL, (EVIL,)),
        TableSection(EVIL, (EVIL, EVIL), ((EVIL, EVIL),), EVIL, folded=True, runs=True),
        FigureSection(EVIL, "<svg></svg>", EVIL, ((EVIL, 0),)),
        SampleSection(EVIL, (Sample(EVIL, EVIL, EVIL),), EVIL),
        LegSection(EVIL, (Leg(EVIL, 1.0, EVIL),)),
        CommandSection(EVIL, ((EVIL, EVIL),)),
    ]
    write_report(tmp_path / "r.html", title=EVIL, subtitle=EVIL, summary=[(EVIL, EVIL)], sections=sections)
    _, page = read(tmp_path / "r.html")
    assert page.text.count(EVIL) == 5 + len(sections) * 2 + 17  # title twice, subtitle, card; titles and their links; the fields


def test_a_tour_report_holds_every_part_in_order(tmp_path: Path) -> None:
    out = tmp_path / "tour" / "report.html"
    write_tour_report(
        out,
        run_folder=make_run(tmp_path / "run"),
        summary=[("parameters", "3.1M")],
        plan=[("model", "4 layers")],
        legs=[Leg("tokenizer", 9.3), Leg("pre-training", 221.0, "1M tokens")],
        baselines={"bigram": {"en": 2.5}},
        next_commands=[("dsv2 chat tour/run", "Talk to it.")],
    )
    html, page = read(out)
    body = page.text[page.text.rindex("A DeepSeek-V2") :]
    parts = ("bigram: 2.50", "3.1M", "first steps cut off", "story 40", "routed expert", "4 layers", "3 min 41 s", "dsv2 chat")
    places = [body.rindex(part) for part in parts]
    assert places == sorted(places)
    assert html.count("<svg") == 6
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_the_prompt_is_not_told_twice_and_markup_in_a_sample_stays_text(tmp_path: Path) -> None:
    run([make_run(tmp_path / "run")], tmp_path / "r.html")
    html, page = read(tmp_path / "r.html")
    assert "<span>It was </span>story 10 &lt;script&gt;" in html
    assert page.text.count("It was ") == 4


def test_drawings_take_the_colours_of_the_page(tmp_path: Path) -> None:
    run([make_run(tmp_path / "run")], tmp_path / "r.html")
    html, _ = read(tmp_path / "r.html")
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert "var(--ink)" in svg or "var(--soft)" in svg
        # Fixed colours would be invisible on one of the two papers; white and black here are masks and defaults that no shape uses.
        assert not re.search(r"#0[1-9]0[1-9]0[1-9]|#1[1-6]0[1-6]0[1-6]", svg)


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("a.html", "b.html"):
        run([folder], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_several_runs_are_compared_and_equal_names_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", steps=20), make_run(tmp_path / "price in $ 100 _{x")]
    run(runs, tmp_path / "c.html")
    _, page = read(tmp_path / "c.html")
    for name in (str(runs[0]), str(runs[1]), "price in $ 100 _{x"):
        assert page.text.count(name) >= 2  # in the table and at its curve
    assert "best English, bits per byte: " in page.text and "2.200" in page.text


def test_a_run_that_diverged_or_never_validated_still_has_a_report(tmp_path: Path) -> None:
    unknown = {"step": 6, "kind": "validation", "tokens": 600, "bits_per_byte": {"en": None}, "loss": {"en": None}}
    folder = make_run(tmp_path / "run", steps=5, extra=[train_line(6, None), unknown])
    run([folder], tmp_path / "r.html")
    _, page = read(tmp_path / "r.html")
    assert "not finite" in page.text
    assert [section.title for section in run_sections(folder)] == [
        "Learning", "Loss", "Steps", "Gradient norm, learning rate, speed", "Routing", "Which experts work", "Balance on the way",
    ]  # fmt: skip


def test_recorded_baselines_are_drawn(tmp_path: Path) -> None:
    line = {"step": 40, "kind": "baseline", "name": "counting", "bits_per_byte": {"en": 2.5}}
    run([make_run(tmp_path / "run", extra=[line])], tmp_path / "r.html")
    assert "counting" in read(tmp_path / "r.html")[1].text


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no metrics.jsonl"), ("", "no training step"), (train_line(1, None), "no training step")]
)
def test_missing_metrics_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        text = json.dumps(content) + "\n" if content else ""
        (tmp_path / "run" / "metrics.jsonl").write_text(text, encoding="utf8")
    with pytest.raises(DataError, match=message):
        run([tmp_path / "run"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_importing_the_report_loads_neither_matplotlib_nor_torch() -> None:
    code = "import sys, dsv2.report; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=12), gap=st.floats(0.01, 2.0))
def test_labels_keep_their_order_and_their_distance(values: list[float], gap: float) -> None:
    places = spread(sorted(values), gap)
    assert len(places) == len(values)
    assert all(above - below >= gap * (1 - 1e-9) for below, above in zip(places, places[1:], strict=False))
    assert sum(places) == pytest.approx(sum(values), abs=1e-6)


def test_small_things() -> None:
    assert [count(value) for value in (950, 12_345, 1_500_000, 8.1e12)] == ["950", "12.3k", "1.5M", "8.1T"]
    assert [duration(value) for value in (3.26, 42.4, 221, 3840)] == ["3.3 s", "42 s", "3 min 41 s", "1 h 04 min"]
    assert evenly(list(range(0, 101, 10)), 6) == [0, 20, 40, 60, 80, 100]
    x, y = smooth(Line("a", tuple(range(100)), tuple(float(i % 2) for i in range(100))), 10)
    assert (x[0], y[0]) == (0, 0.0)
    assert y[1:] == [0.5] * 10
