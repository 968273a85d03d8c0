"""The page of a run on preferences: accuracy, calibration and margins where the run has them, nothing elsewhere."""

from dsv2.report.page import FigureSection, TableSection
from dsv2.report.preferences import preference_sections
from dsv2.report.record import Record


def evaluation(step, accuracy):
    return {
        "step": step, "kind": "evaluation", "tokens": step * 100, "elapsed_s": step / 10, "accuracy": {"pairs": accuracy},
        "margin": {"pairs": 0.3}, "loss": {"pairs": 0.5}, "calibration_error": {"pairs": 0.08},
        "calibration": {"pairs": [[0.55, 0.72], [0.5, 0.9], [6, 4]]}, "margins": {"pairs": [[-1.0, 0.0, 1.0], [2, 8]]},
    }  # fmt: skip


def test_held_out_figures_become_a_table_and_drawings():
    table, *figures = preference_sections(Record("run", [evaluation(1, 0.5), evaluation(2, 0.8)]))
    assert isinstance(table, TableSection)
    assert table.rows == (("pairs", "0.800", "0.300", "0.500", "0.080"),)
    assert [figure.title for figure in figures] == ["Accuracy and margin", "Calibration", "Margins"]
    assert all(isinstance(figure, FigureSection) and "<svg" in figure.svg for figure in figures)


def test_dpo_has_accuracy_and_margins_without_calibration():
    line = {
        "step": 1, "kind": "evaluation", "tokens": 10, "rewards/accuracies": {"a": 0.7}, "rewards/margins": {"a": 1.25}, "loss": {"a": 0.6},
    }  # fmt: skip
    (table,) = preference_sections(Record("run", [line]))
    assert table.rows == (("a", "0.700", "1.250", "0.600"),)


def test_other_runs_have_no_such_page():
    assert preference_sections(Record("run", [{"step": 1, "kind": "train", "loss": 1.0, "tokens": 1}])) == []
