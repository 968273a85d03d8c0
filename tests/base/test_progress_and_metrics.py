"""Metrics survive a killed process and a resumed run; progress speaks on stderr, on rank 0 alone."""

import json
import math
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2 import metrics, progress
from dsv2.errors import DataError, MissingExtra
from dsv2.metrics import MetricsLog, read_metrics, stream_metrics
from dsv2.progress import bar, console, table, transfer_bar


def test_lines_are_legal_json_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert not log.path.exists()
    log.write(1, "train", loss=4.5, load=[[0.5, math.nan]], bits={"zh": math.inf, "en": 2.0})
    log.write(2, "sample", text="中\n\u2028x")
    lines = log.path.read_text().split("\n")  # before close: every line is flushed
    log.close()
    assert lines[0] == '{"step": 1, "kind": "train", "loss": 4.5, "load": [[0.5, null]], "bits": {"zh": null, "en": 2.0}}'
    assert json.loads(lines[1]) == {"step": 2, "kind": "sample", "text": "中\n\u2028x"}
    assert lines[2:] == [""]
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2]


@settings(deadline=None, max_examples=60)
@given(kept=st.integers(0, 6), torn_at=st.integers(0, 200), resumed=st.booleans())
def test_a_log_torn_anywhere_is_cut_back_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, kept: int, torn_at: int, resumed: bool
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(step, "train", loss=1.0 / step, text="ä")
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:torn_at])
    there = whole[:torn_at].count(b"\n")
    assert [row["step"] for row in read_metrics(path)] == list(range(1, there + 1))

    log = MetricsLog(path)
    if resumed:
        log.cut_back(kept)
    log.write(99, "train", loss=0.5)
    log.close()
    last = min(there, kept) if resumed else there
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:last]) + b'{"step": 99, "kind": "train", "loss": 0.5}\n'


def test_of_a_large_log_what_goes_is_read_and_no_more_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    for step in range(1, 41):
        log.write(step, "rollout", text="x" * 100_000)
    log.close()
    whole, parsed, loads = log.path.read_bytes(), [], json.loads
    with log.path.open("ab") as file:
        file.write(b'{"step": 41')
    monkeypatch.setattr(metrics.json, "loads", lambda line: parsed.append(len(line)) or loads(line))
    tracemalloc.start()
    MetricsLog(log.path).cut_back(38)
    assert sum(1 for _ in stream_metrics(log.path)) == 38
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(parsed) == 3 + 38, "two lines that go and one that stays, then all that is left"
    assert peak < 1_000_000 < len(whole)
    assert log.path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:38])


def test_damage_among_what_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n[]\n{"step": 3}\n[]\n')
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl, byte 24: not a line of metrics"):
        MetricsLog(path).cut_back(1)
    assert path.read_bytes() == before


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki\n{"step": 3, "kind": "train"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(path)
    with pytest.raises(DataError, match="no metrics at"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_full_disk_ends_in_a_data_error(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.symlink_to("/dev/full")  # afterwards, for opening a log reads what is there, and this file has no end
    with pytest.raises(DataError, match="the disk is full"):
        log.write(1, "train")
    log.close()


def test_other_ranks_write_and_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, "train", loss=1.0)
    log.cut_back(0)
    log.close()
    table("t", ["a"], [[1]])
    console().print("hello")
    with bar(3, "train", unit="steps") as steps:
        steps.advance()
    assert not log.path.exists()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.write(1, "train", loss=3.0, load=[[1.0 / 9] * 9], skipped=True)  # too wide a table for a curve each
    log.write(2, "train", loss=9.0)
    log.cut_back(1)
    log.write(2, "train", loss=2.0, router={"entropy": [0.5, 0.75], "device_load": [[0.25, 0.75]]})
    log.write(2, "sample", text="It was")
    log.write(2, "validation", bits_per_byte={"en": 1.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "train/loss": [(1, 3.0), (2, 2.0)],
        "train/skipped": [(1, 1.0)],
        "train/router/entropy/layer_1": [(2, 0.5)],
        "train/router/entropy/layer_2": [(2, 0.75)],
        "train/router/device_load/layer_1/0": [(2, 0.25)],
        "train/router/device_load/layer_1/1": [(2, 0.75)],
        "validation/bits_per_byte/en": [(2, 1.5)],
    }
    assert events.Tags()["tensors"] == ["sample/text/text_summary"]


def test_tensorboard_without_its_package_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="needs tensorboard"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)


def test_without_a_terminal_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with bar(2000, "train", unit="steps", done=1000) as steps:
        for step in range(60):
            now += 1.0
            steps.advance(10, loss=4.20691 - step / 100, tokens_per_s=4100.2, note="[x]")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    # 100 of the remaining 1,000 steps took 10 s: what was done before this process does not count for the speed
    assert lines[0] == "train: 1,100/2,000 steps (55%), loss 4.117, 4,100 tokens/s, note [x], ETA 1:30"
    assert len(lines) == 6
    assert lines[-1].startswith("train: 1,600/2,000 steps (80%)")


def test_a_short_or_broken_bar_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), bar(None, "read", unit="documents") as documents:
        documents.advance(1200)
        raise KeyError
    assert capsys.readouterr().err == "read: 1,200 documents, in 0:00\n"


def test_on_a_terminal_the_bar_is_live(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_console", lambda speaks: progress.Console(stderr=True, force_terminal=True, width=120, highlight=False))
    with bar(10, "train", unit="steps") as steps:
        steps.advance(4, loss=2.5)
    err = capsys.readouterr().err
    assert "4/10 steps (40%)" in err
    assert "loss 2.5" in err


def test_tables_show_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table("Plan [bold]", ["leg", "steps"], [["[en]", 5], ["zh", 1200]])
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split() for line in err.splitlines()] == [["Plan", "[bold]"], ["leg", "steps"], ["[en]", "5"], ["zh", "1200"]]
    assert err.splitlines()[2].rstrip().endswith("   5")  # numbers to the right


def test_a_bar_inside_a_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(4, "training", unit="steps") as outer:
        with transfer_bar(2 * 10**9, "writing weights") as advance:
            advance(2 * 10**9)
        outer.advance(4)
    with transfer_bar(2 * 10**9, "reading weights") as advance:
        advance(10**9)
        advance(10**9)
    said = capsys.readouterr().err
    assert "training: 4/4 steps" in said
    assert "writing" not in said
    assert "reading weights: 2,000/2,000 MB (100%)" in said
    assert "GB/s" in said
