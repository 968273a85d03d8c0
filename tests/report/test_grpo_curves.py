"""The report of GRPO runs: what rose and what drifted, of one run or several, and no mixture with other kinds of run."""

import json
from pathlib import Path

import pytest

from dsv2.errors import DataError
from dsv2.report import run
from dsv2.report.alignment import alignment_sections
from dsv2.report.page import TableSection, write_report
from dsv2.report.record import load_record
from dsv2.report.reinforcement import _held_out_keys


def write_run(folder: Path, *, gain: float = 0.1, unscored: int = 0, right_or_wrong: bool = True) -> Path:
    known = {"answer/pass@1": 0.5, "answer/pass@4": 0.97} if right_or_wrong else {}
    lines = [{"step": 0, "kind": "evaluation", "elapsed_s": 0.0, "reward": 0.5, "answers": 80, "unscored": 0, **known}]
    for step in range(1, 6):
        lines.append(
            {
                "step": step, "kind": "grpo", "reward": 0.5 + gain * step, "reward_std": 0.4, "kl": 0.01 * step, "entropy": 0.9,
                "rewards/answer/mean": 0.5, "rewards/format/mean": 0.9, "completions/mean_length": 12.0, "completions/clipped_ratio": 0.0,
                "grad_norm": None if step == 2 else 1.0, "rollouts_per_s": 100.0, "sampling/sampling_logp_difference/max": 2e-6 * step,
            }
        )  # fmt: skip
    known = {"answer/pass@1": 0.875, "answer/pass@4": 0.97} if right_or_wrong else {}
    lines.append({"step": 5, "kind": "evaluation", "elapsed_s": 9.0, "reward": 0.9, "answers": 80, "unscored": unscored, **known})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_run_shows_what_rose_and_by_which_reward(tmp_path: Path) -> None:
    run([write_run(tmp_path / "a")], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "0.6 \u2192 1" in page and "0.5 \u2192 0.875" in page and "1.0e-05" in page
    assert "Rewards by name" in page and "Held-out prompts" in page
    assert "share cut at the limit" not in page, "a figure that is 0 throughout is left out"


def test_held_out_figures_say_of_how_many_answers_they_are(tmp_path: Path) -> None:
    run([write_run(tmp_path / "whole")], tmp_path / "whole.html")
    run([write_run(tmp_path / "short", unscored=7)], tmp_path / "short.html")
    whole, short = ((tmp_path / name).read_text() for name in ("whole.html", "short.html"))
    assert "without a score" not in whole
    assert "Answers without a score are left out, at most 7 of 80 after step 5." in short and "held-out answers without a score" in short


def test_a_run_without_pass_at_k_shows_its_reward_beside_others(tmp_path: Path) -> None:
    runs = [load_record(write_run(tmp_path / "sums")), load_record(write_run(tmp_path / "judged", right_or_wrong=False))]
    assert _held_out_keys(runs) == ["answer/pass@1", "answer/pass@4", "reward"]


def test_several_runs_share_their_charts(tmp_path: Path) -> None:
    run([write_run(tmp_path / "steep"), write_run(tmp_path / "flat", gain=0.0)], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "reward, last step: steep" in page and "reward, last step: flat" in page and "Rewards by name" not in page


def test_runs_of_another_kind_are_refused_beside_them(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "metrics.jsonl").write_text(json.dumps({"step": 1, "kind": "train", "loss": 2.0, "tokens": 10}) + "\n")
    with pytest.raises(DataError, match="no curve in common with others: base"):
        run([write_run(tmp_path / "a"), tmp_path / "base"], tmp_path / "out.html")


def test_a_tour_s_page_says_how_much_is_right_before_and_after(tmp_path: Path) -> None:
    gains = [("answer, pass@1", "50.0%", "87.5%")]
    answers = [("18 and", "5+8=13: 12", "5+8=13: 13")]
    sections = alignment_sections(write_run(tmp_path / "a"), gains, ["What is 5 + 8?"], answers, [0.0, 0.9, 0.8])
    tables = {section.title: section for section in sections if isinstance(section, TableSection)}
    assert tables["What it answers"].rows == (("What is 5 + 8?", "18 and", "5+8=13: 12", "5+8=13: 13"),)
    assert tables["How much is right"].rows == (("answer, pass@1", "", "50.0%", "87.5%"), ("instruction set", "0.0%", "90.0%", "80.0%"))
    write_report(tmp_path / "out.html", title="", subtitle="", summary=[], sections=sections)
    assert "Rewards by name" in (tmp_path / "out.html").read_text()
