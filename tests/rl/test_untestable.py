"""Prompts whose own solution our tests would not pay are left out when a run begins, and the same ones when it goes on."""

import json

import pytest

from dsv2.errors import DataError
from dsv2.rl.outcomes import solution_of, solution_problems
from dsv2.rl.prompts import Prompts
from dsv2.rl.reward_kinds import RewardSection, open_rewards
from dsv2.rl.untestable import LEFT_OUT, without_untestable
from dsv2.tasks.verdict import Verdict

CODE = open_rewards([RewardSection(name="code"), RewardSection(name="length", most_tokens=9)])


def asked(n, **more):
    return {"messages": [{"role": "user", "content": f"Double {n}."}], "test_list": [f"assert f({n}) == {2 * n}"], **more}


RIGHT, WITHOUT = asked(1, code="f = lambda x: 2 * x"), asked(2)
IN_PLACE = asked(3, code="def f(x):\n    x.append(1)", test_list=["x = []\nf(x)\nassert x == [1]"])
HUMANEVAL = {
    "messages": [{"role": "user", "content": 'def f(x):\n    """Double."""\n'}], "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "f",
}  # fmt: skip


def opened(out, examples, **options):
    options = {"begun": False, "check": True, "max_refused": 1.0, **options}
    return without_untestable(Prompts(examples, [IN_PLACE, RIGHT], 0), CODE, out, **options)


def test_a_right_program_that_cannot_be_tested_is_found(tmp_path, capsys):
    prompts = opened(tmp_path, [RIGHT, WITHOUT, IN_PLACE, HUMANEVAL])
    assert (len(prompts), prompts.held_out, prompts.left_out) == (3, [RIGHT], 2)
    said = " ".join(capsys.readouterr().err.split())
    assert "own solutions of 5 prompts run" in said and "a second; 2 fail and their prompts are left out: fail: test 1" in said
    assert len(json.loads((tmp_path / LEFT_OUT).read_text())) == 1


def test_a_run_goes_on_without_what_it_left_out(tmp_path, monkeypatch):
    everything = [RIGHT, WITHOUT, IN_PLACE, HUMANEVAL]
    began = opened(tmp_path, everything)
    monkeypatch.setattr("dsv2.tasks.code.grade_all", lambda programs, *_: [Verdict("timeout")] * len(programs))
    assert opened(tmp_path, everything, begun=True).fingerprint == began.fingerprint
    assert opened(tmp_path / "older", everything, begun=True).left_out == 0, "it began before solutions were looked at"
    with pytest.raises(DataError, match=r"5 of 6 prompts fail, more than task.max_refused = 0.05: timeout"):
        opened(tmp_path, everything, max_refused=0.05)
    assert opened(tmp_path, everything, check=False).left_out == 0


def test_what_the_machine_did_leaves_no_prompt_out(monkeypatch):
    monkeypatch.setattr("dsv2.tasks.code.grade_all", lambda programs, *_: [Verdict("infrastructure", "busy")] * len(programs))
    assert solution_problems([RIGHT, WITHOUT]) == [None, None]


def test_the_solution_of_an_example():
    assert solution_of(HUMANEVAL) == 'def f(x):\n    """Double."""\n    return 2 * x\n'
    assert solution_of({"messages": [], "tests": RIGHT}) == RIGHT["code"]
    assert solution_of(asked(1, solution="So:\n```python\nf = 1\n```")) == "f = 1\n"
    assert solution_of(HUMANEVAL | {"messages": [{"role": "user", "content": "Write f, please."}]}) is None
    assert solution_of(WITHOUT) is None and solution_of(asked(1, solution="It is twice as much.")) is None
