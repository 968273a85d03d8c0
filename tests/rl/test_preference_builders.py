"""Preferences out of outcomes: differing outcomes make pairs, and what the machine could not find out counts for nobody."""

import pytest

from dsv2.data.preferences import read_preferences, write_preferences
from dsv2.data.rows import ReadingReport
from dsv2.errors import DataError
from dsv2.metrics import MetricsLog
from dsv2.rl.outcomes import by_answer, by_tests
from dsv2.rl.preference_builders import Group, build, groups_of
from dsv2.rl.rollout import Rollout
from dsv2.tasks.verdict import Verdict

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
    assert by_answer(["The answer is 42.", "The answer is 41.", "No idea."], [QUESTION] * 3) == [1.0, 0.0, 0.0]
    assert by_answer(["42.0", "42"], [QUESTION] * 2, exact=True) == [0.0, 1.0]
    unknown = {"messages": QUESTION["messages"]}
    pairs, points, report = build([Group(QUESTION, ("42", "41")), Group(unknown, ("42", "41"))], by_answer, domain="sums")
    assert (len(pairs), len(points), report.unknown, report.reason) == (1, 2, 2, 'it has no "answer"') and report.reason in report.line()


def test_an_infrastructure_outcome_is_no_wrong_program(tmp_path, monkeypatch):
    outcomes = {"x = 1\n": "pass", "x = 2\n": "fail", "x = 3\n": "timeout", "x = 4\n": "infrastructure"}
    monkeypatch.setattr("dsv2.tasks.code.grade_all", lambda programs, *_: [Verdict(outcomes[program], "busy") for program in programs])
    outputs = tuple(f"```python\n{program}```" for program in outcomes)
    tested = QUESTION | {"test_list": ["assert f() == 1"]}
    groups = [Group(tested, (*outputs, "```rust\n```")), Group(QUESTION, outputs[:1])]
    pairs, points, report = build(groups, by_tests, domain="code")
    assert (report.right, report.wrong, report.unknown, report.reason) == (1, 3, 2, "busy"), "a program without tests is unknown, too"
    assert not any("x = 4" in said(p.answers[0]) for p in points)
    write_preferences(tmp_path / "p.jsonl", [*pairs, *points])
    again = list(read_preferences([tmp_path / "p.jsonl"], ReadingReport()))
    assert [(p.answers, p.score, p.domain) for p in again] == [(p.answers, p.score, p.domain) for p in [*pairs, *points]]


def answer(index, number, ended, group=0, **example):
    """An answer of a GRPO run, of as many tokens as it has characters."""
    text, num = f"The answer is {number}.", len(f"The answer is {number}.")
    prompt = {"messages": list(QUESTION["messages"]), **example}
    return Rollout((1,), (2,) * num, (0.0,) * num, (True,) * num, text, tuple(range(1, num + 1)), ended, group, index, prompt)


def test_rollouts_of_a_run_make_preferences(tmp_path):
    """What a group's judge needs stands with its first answer alone, also where that was cut."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    for step, rollout in (
        (1, answer(0, "4", "length", answer="42", tools=tools)), (1, answer(1, "42", "stop")), (1, answer(2, "41", "stop")),
        (1, answer(0, "4", "length", 1, answer="42")), (1, answer(1, "4", "length", 1)),
        (2, answer(0, "42", "stop", answer="42")), (2, answer(1, "4", "length")), (2, answer(2, "40", "stop")),
    ):  # fmt: skip
        log.write(step, "rollout", **rollout.as_dict())
    log.close()
    groups = groups_of(tmp_path / "rollouts.jsonl")
    assert [len(group.outputs) for group in groups] == [2, 2], "a group is of one step, and a cut answer is none"
    pairs, _, _ = build(groups, by_answer, domain="sums")
    assert [(said(p.answers[0])[-3:], said(p.answers[1])[-3:]) for p in pairs] == [("42.", "41."), ("42.", "40.")]
    assert pairs[0].answers[0].prompt == QUESTION["messages"]
    assert [p.answers[0].tools for p in pairs] == [tuple(tools), ()]
    (tmp_path / "torn.jsonl").write_text("".join((tmp_path / "rollouts.jsonl").read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match="a group of step 1 begins without the example of its prompt"):
        groups_of(tmp_path / "torn.jsonl")


def test_the_sandbox_grades_programs_of_several_examples(tmp_path):
    examples = [QUESTION | {"tests": {"test_list": [f"assert f(2) == {n}"]}} for n in (4, 6)]
    programs = [f"```python\ndef f(x):\n    return {n} * x\n```" for n in (2, 3)]
    _, points, report = build([Group(example, tuple(programs)) for example in examples], by_tests, domain="code")
    assert (report.pairs, report.unknown) == (2, 0)
    assert [p.score for p in points] == [1.0, 0.0, 0.0, 1.0]
