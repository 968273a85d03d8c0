"""Preferences out of outcomes: differing outcomes make pairs, and what the machine could not find out counts for nobody."""

from types import SimpleNamespace

import pytest

from dsv2.data.preferences import read_preferences, write_preferences
from dsv2.data.rows import ReadingReport
from dsv2.progress import MetricsLog
from dsv2.rl.preference_builders import Group, build, by_answer, by_tests, groups_of

QUESTION = {"messages": ({"role": "user", "content": "What is 6 * 7?"},), "answer": "42"}


def said(answer):
    return answer.messages[-1]["content"]


def test_pairs_are_of_differing_outcomes_and_unknown_ones_are_left_out():
    grades = {"a": 1.0, "b": 0.0, "c": None, "d": 0.0, "e": 0.0}
    groups = [Group(QUESTION, ("a", "b", "c", "d", "d", "e")), Group(QUESTION, ("b", "d")), Group(QUESTION, ("c", "a"))]
    pairs, points, report = build(groups, lambda texts, _: [grades[text] for text in texts], domain="x", max_pairs=2)
    assert [(said(p.answers[0]), said(p.answers[1]) in "bde") for p in pairs] == [("a", True)] * 2
    assert len({said(p.answers[1]) for p in pairs}) == 2
    assert (report.right, report.wrong, report.unknown, report.duplicates, report.groups_without_pairs) == (2, 5, 2, 1, 2)
    assert sorted((said(p.answers[0]), p.score) for p in points if p.place == "x, group 0") == [
        ("a", 1.0), ("b", 0.0), ("d", 0.0), ("e", 0.0),
    ]  # fmt: skip


def test_ground_truth_decides_by_what_an_answer_says():
    pytest.importorskip("dsv2.tasks.answers")
    assert by_answer(["The answer is 42.", "The answer is 41.", "No idea."], [QUESTION] * 3) == [1.0, 0.0, 0.0]


def test_an_infrastructure_outcome_is_no_wrong_program(tmp_path):
    pytest.importorskip("dsv2.tasks.code")
    outcomes = {"x = 1\n": "pass", "x = 2\n": "fail", "x = 3\n": "timeout", "x = 4\n": "infrastructure"}
    judge = by_tests(lambda example: None, lambda programs, tests: [SimpleNamespace(outcome=outcomes[program]) for program in programs])
    outputs = tuple(f"```python\n{program}```" for program in outcomes)
    pairs, points, report = build([Group(QUESTION, (*outputs, "```rust\n```"))], judge, domain="code")
    assert (report.right, report.wrong, report.unknown) == (1, 3, 1)
    assert not any("x = 4" in said(p.answers[0]) for p in points)
    write_preferences(tmp_path / "p.jsonl", [*pairs, *points])
    again = list(read_preferences([tmp_path / "p.jsonl"], ReadingReport()))
    assert [(p.answers, p.score, p.domain) for p in again] == [(p.answers, p.score, p.domain) for p in [*pairs, *points]]


def test_rollouts_of_a_run_make_preferences(tmp_path):
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    for step, number, ended in ((1, "42", "stop"), (1, "41", "stop"), (1, "4", "length"), (2, "42", "stop"), (2, "40", "stop")):
        text = f"The answer is {number}."
        given = {"prompt": list(QUESTION["messages"]), "example": {"answer": "42"}}
        log.write(step, "rollout", group=0, index=0, text=text, finish_reason=ended, **given)
    log.close()
    groups = groups_of(tmp_path / "rollouts.jsonl")
    assert [len(group.outputs) for group in groups] == [2, 2], "a group is of one step, and a cut answer is none"
    pairs, _, _ = build(groups, by_answer, domain="sums")
    assert [(said(p.answers[0])[-3:], said(p.answers[1])[-3:]) for p in pairs] == [("42.", "41."), ("42.", "40.")]
    assert pairs[0].answers[0].prompt == QUESTION["messages"]


def test_the_sandbox_grades_programs_of_several_examples(tmp_path):
    examples = [QUESTION | {"tests": {"test_list": [f"assert f(2) == {n}"]}} for n in (4, 6)]
    programs = [f"```python\ndef f(x):\n    return {n} * x\n```" for n in (2, 3)]
    _, points, report = build([Group(example, tuple(programs)) for example in examples], by_tests(), domain="code")
    assert (report.pairs, report.unknown) == (2, 0)
    assert [p.score for p in points] == [1.0, 0.0, 0.0, 1.0]
