"""Rewards of made-up rollouts: what each pays, how they add up, and that whatever goes wrong is no score and never 0."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from dsv2.config import Section, load_recipe
from dsv2.errors import CheckpointError, ConfigError, DataError, MissingExtra
from dsv2.rl.reward import NoScore, Part, Rewards, Scores
from dsv2.rl.reward_kinds import RewardSection, open_rewards
from dsv2.rl.reward_needs import require_judges
from dsv2.rl.step_metrics import rollout_metrics
from dsv2.tasks.verdict import MIB, Limits, Verdict


def rollout(text="", *, group=0, example=None, tokens=None):
    return SimpleNamespace(
        prompt_tokens=(1, 2), tokens=tuple(tokens or text.encode()), text=text, group=group, example={} if example is None else example
    )


def values_of(rollouts, **section):
    """The values of a single reward."""
    scores = open_rewards([RewardSection(**section)]).score(rollouts)
    assert scores.total == scores.parts[section["name"]]
    return scores.total


def fixed(*values):
    return lambda rollouts: [values[rollout.tokens[0]] for rollout in rollouts]


NUMBERED = [rollout(tokens=[i]) for i in range(4)]


def test_an_answer_is_right_if_it_says_the_same():
    rollouts = [rollout(text, example={"answer": "1/2"}) for text in ("The answer is 0.5.", r"so \boxed{\frac12}", "It is 2", "no idea")]
    assert values_of(rollouts, name="answer") == [1.0, 1.0, 0.0, 0.0]
    assert values_of([rollout("5")], name="answer") == [None], "nobody knows the truth"


def test_exact_answers_are_digits():
    rollouts = [rollout(text, example={"answer": 1234}) for text in ("1234", "= 1234.", "1,234", "1234.0", "")]
    assert values_of(rollouts, name="answer", exact=True) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_format_and_length():
    rollouts = [rollout("<a>\n7</a>"), rollout("<a>7</a> and more")]
    assert values_of(rollouts, name="format", pattern="<a>.*</a>") == [1.0, 0.0]
    rollouts = [rollout(tokens=[5] * num) for num in (1, 2, 4, 5)]
    assert values_of(rollouts, name="length", least_tokens=2, most_tokens=4) == [0.0, 1.0, 1.0, 0.0]


def answer_with(program):
    return f"```python\n{program}\n```"


@pytest.fixture
def graded(monkeypatch):
    """Programs, tests and limits of all calls of the sandbox; a program's outcome is what it imports."""
    calls = []

    def grade_all(programs, tests, limits):
        calls.append((programs, tests, limits))
        return [Verdict(program.split()[1], "it says why") for program in programs]

    monkeypatch.setattr("dsv2.tasks.code.grade_all", grade_all)
    return calls


TESTED = {"test_list": ["assert f() == 1"]}
OUTCOMES = [answer_with(f"import {outcome}") for outcome in ("pass", "fail", "timeout", "infrastructure")]


def test_code_passes_fails_is_missing_or_could_not_be_run(graded):
    """What the machine did is no score, and is told; programs are graded together, an answer without one not at all."""
    rewards = open_rewards([RewardSection(name="code")])
    scores = rewards.score([rollout(text, example=TESTED) for text in [*OUTCOMES, "I cannot."]])
    assert scores.total == [1.0, 0.0, 0.0, None, 0.0]
    assert rewards.reasons == {"code": "it says why"} and scores.failed == {"code": 0} and scores.unscored("code") == 1
    assert len(graded) == 1 and len(graded[0][0]) == 4
    tested = {"tests": {"inputs": ["1"], "outputs": ["2"]}}
    assert values_of([rollout(OUTCOMES[0], example=tested), rollout(OUTCOMES[0])], name="code") == [1.0, None]


def test_a_recipe_says_what_programs_may_take(graded):
    for section in ({}, {"cpu_s": 6, "memory_mib": 64}, {"cpu_s": 1}):
        values_of([rollout(OUTCOMES[0], example=TESTED)], name="code", **section)
    assert [limits for _, _, limits in graded] == [
        Limits(scratch_bytes=0),
        Limits(cpu_s=6, wall_s=20.0, memory_bytes=64 * MIB, scratch_bytes=0),
        Limits(cpu_s=1, scratch_bytes=0),
    ]


def test_a_program_with_the_same_tests_is_run_once(graded):
    others = {"test_list": ["assert f() == 2"]}
    rollouts = [rollout(OUTCOMES[n], example=example) for n, example in ((0, TESTED), (1, TESTED), (0, others), (3, TESTED))]
    assert values_of(rollouts * 3, name="code") == [1.0, 0.0, 1.0, None] * 3
    assert [len(programs) for programs, _, _ in graded] == [4]


class FakeRewardModel:
    asked: ClassVar[list[int]] = []

    def __init__(self, folder, tokenizer, seq_len):
        assert (folder, tokenizer, seq_len) == ("rm", "the policy's", 9)

    def score(self, rows):
        self.asked.append(len(rows))
        return [float(sum(row)) for row in rows]

    def score_steps(self, rows, places):
        return [[float(row[place]) for place in own] for row, own in zip(rows, places, strict=True)]


def test_a_reward_model_sees_the_tokens_of_whole_answers_or_of_steps(monkeypatch):
    monkeypatch.setitem(sys.modules, "dsv2.rl.reward_model", SimpleNamespace(OffloadedRewardModel=FakeRewardModel))
    rewards = open_rewards([RewardSection(name="model", folder="rm", label="helpful")], "the policy's", 9)
    assert rewards.score(NUMBERED * 2).total == [3.0, 4.0, 5.0, 6.0] * 2 and not rewards.step_labels
    assert FakeRewardModel.asked == [4], "equal answers are scored once"
    said = rollout("a;b")
    said.text_ends = (1, 2, 3)
    scores = open_rewards([RewardSection(name="model", folder="rm", steps=True, delimiter=";")], "the policy's", 9).score([said])
    assert scores.steps == [[(1, float(ord(";"))), (2, float(ord("b")))]]
    assert scores.total == scores.parts["model"] == [(ord(";") + ord("b")) / 2]


@pytest.mark.parametrize("error", [CheckpointError("no such folder"), ConfigError("no such level"), MissingExtra("sympy", "eval", "it")])
def test_what_is_wrong_with_a_reward_itself_is_an_error_and_not_a_missing_score(error):
    def gone(rollouts):
        raise error

    with pytest.raises(type(error)):
        Rewards([Part("model", gone)]).score(NUMBERED)


def test_prompts_have_what_paid_rewards_judge_by():
    whole = {"messages": [], "answer": 0, **TESTED}
    without_answer, without_tests = [{k: v for k, v in whole.items() if k != name} for name in ("answer", "test_list")]
    for name, lacking, problem in (("answer", without_answer, 'no "answer"'), ("steps", without_answer, 'no "answer"'),
                                   ("code", without_tests, "no tests of a known form")):  # fmt: skip
        short = RewardSection(name="length", most_tokens=9)
        require_judges(open_rewards([RewardSection(name=name), short]), [whole] * 2)
        require_judges(open_rewards([RewardSection(name=name, weight=0.0), short]), [lacking])
        with pytest.raises(DataError, match=rf"1 of 3 prompts can be judged by none of .*\(mine\): .*{problem}"):
            require_judges(open_rewards([RewardSection(name=name, label="mine"), short]), [whole, lacking, whole])


MIXED = [RewardSection(name="answer", weight=2.0), RewardSection(name="code"), RewardSection(name="length", most_tokens=99, weight=0.5),
         RewardSection(name="format", pattern=".*", weight=0.1, only_with="answer")]  # fmt: skip


def test_a_prompt_is_judged_by_what_it_has(graded, capsys):
    """A reward is no part of the sum where a prompt lacks what it judges by, nor is what is paid with it."""
    asked = {"answer": 7}
    prompts = (asked, asked, TESTED, TESTED, TESTED, asked | TESTED, {})
    answers = ("7", "8", OUTCOMES[0], OUTCOMES[1], OUTCOMES[3], OUTCOMES[0], "7")
    rollouts = [rollout(text, example=example) for text, example in zip(answers, prompts, strict=True)]
    scores = open_rewards(MIXED).score(rollouts)
    assert scores.total == [2.6, 0.5, 1.5, 0.5, None, 1.5, 0.5]
    assert scores.parts["answer"] == [1.0, 0.0, None, None, None, 0.0, None]
    assert scores.of(2) == {"code": 1.0, "length": 1.0, "format": 1.0} and scores.of(4)["code"] is None
    assert [scores.not_asked(label) for label in scores.parts] == [4, 3, 0, 0] and (Scores.empty() + scores).asked == scores.asked
    assert (scores.unscored("answer"), scores.unscored("code")) == (0, 1)
    assert open_rewards(MIXED[:2]).score(rollouts[-1:]).total == [None], "nothing that is paid was asked"
    require_judges(open_rewards(MIXED), [asked, TESTED, TESTED])
    said = " ".join(capsys.readouterr().err.split())
    assert "reward 'answer': not asked about 2 of 3 prompts" in said and "reward 'code': not asked about 1 of 3 prompts" in said
    with pytest.raises(DataError, match=r"2 of 3 .* \(answer, code, format\): it has no \"answer\"; .*no tests"):
        require_judges(open_rewards(MIXED), [{}, asked, {}])


def test_a_machine_that_cannot_confine_programs_is_refused_if_there_are_any(monkeypatch):
    require_judges(open_rewards(MIXED), [TESTED])  # this one can
    monkeypatch.setattr("dsv2.tasks.sandbox.run", lambda *_, **__: Verdict("infrastructure", "confined only by 'seccomp'"))
    require_judges(open_rewards(MIXED), [{"answer": 7}])
    with pytest.raises(ConfigError, match=r"'code' cannot run programs under landlock\+seccomp here: infrastructure: .* 'seccomp'"):
        require_judges(open_rewards(MIXED), [{"answer": 7}, TESTED])


def test_the_sum_is_weighted_and_none_where_a_part_that_counts_is():
    parts = [
        Part("a", fixed(1.0, 0.0, None, 1.0), 2.0),
        Part("b", fixed(0.5, 0.5, 0.5, None), 0.1),
        Part("seen", fixed(None, 1, 2, 3), 0.0),
    ]
    scores = Rewards(parts).score(NUMBERED)
    assert scores.total == [pytest.approx(2.05), pytest.approx(0.05), None, None]
    assert scores.parts["seen"] == [None, 1.0, 2.0, 3.0]


def test_a_format_is_paid_only_with_a_right_answer():
    parts = [Part("right", fixed(1.0, 0.0, 1.0, None)), Part("format", fixed(1.0, 1.0, None, 1.0), 0.5, only_with="right")]
    scores = Rewards(parts).score(NUMBERED)
    assert scores.total == [1.5, 0.0, None, None]
    assert scores.parts["format"] == [1.0, 1.0, None, 1.0], "shown as it is"


def test_an_exception_costs_one_score_is_counted_and_told_once(capsys):
    def broken(rollouts):
        return [1.0 / rollout.tokens[0] for rollout in rollouts]

    rewards = Rewards([Part("broken", broken)])
    scores = rewards.score(NUMBERED)
    assert scores.total == [None, 1.0, 0.5, pytest.approx(1 / 3)] and scores.failed == {"broken": 1}
    rewards.score(NUMBERED)
    said = capsys.readouterr().err
    assert said.count("no score") == 1 and "1 of 4 rollouts: ZeroDivisionError" in " ".join(said.split())


def test_a_reward_can_say_why_it_has_no_score():
    rewards = Rewards([Part("shy", fixed(None, NoScore("not today"), 2.0, NoScore()))])
    scores = rewards.score(NUMBERED)
    assert scores.total == [None, None, 2.0, None] and scores.failed == {"shy": 0} and rewards.reasons == {"shy": "not today"}


@pytest.mark.parametrize("values", [[1.0], [float("nan")] * 4, [float("inf")] * 4])
def test_too_few_values_and_no_numbers_are_no_scores(values):
    scores = Rewards([Part("odd", lambda rollouts: values if len(rollouts) == 4 else [])]).score(NUMBERED)
    assert scores.total == [None] * 4 and scores.failed == {"odd": 4}


def test_an_interrupt_is_no_failure():
    def interrupted(rollouts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rewards([Part("slow", interrupted)]).score(NUMBERED)


def test_shuffled_rewards_keep_the_values_of_each_group_and_forget_whose_they_are():
    rollouts = [rollout(tokens=[group, index], group=group) for group in range(200) for index in range(4)]
    reward = Part("first", lambda rollouts: [float(r.tokens[1] == 0) for r in rollouts], shuffled=True)
    seen = Rewards([reward]).score(rollouts).total
    assert seen == Rewards([reward]).score(rollouts).total, "a resumed run deals alike"
    assert all(sum(seen[i : i + 4]) == 1 for i in range(0, len(seen), 4))
    assert 30 < sum(seen[::4]) < 70, "one in four, by chance"


def test_groups_of_equal_rewards_are_those_that_teach_nothing():
    values = [1.0, 1.0 + 1e-7, 1.0, 1.1, None, None, None, 2.0]
    rollouts = [SimpleNamespace(tokens=(1,), prompt_tokens=(1,), truncated=False)] * 8
    assert rollout_metrics(rollouts, Scores(values, values, {}), 2)["frac_reward_zero_std"] == 0.75


def test_scores_join():
    one, other = (Rewards([Part("a", fixed(0.0, 1.0, None, 3.0))]).score(NUMBERED[half]) for half in (slice(0, 2), slice(2, 4)))
    joined = Scores.empty() + one + other
    assert joined.total == joined.parts["a"] == [0.0, 1.0, None, 3.0]
    longer = joined.with_penalty([-1.0, -0.5, 0.0, 0.0])
    assert longer.total == [-1.0, 0.5, None, 3.0] and longer.parts["overlong"] == [-1.0, -0.5, 0.0, 0.0]


# Steps -----------------------------------------------------------------------------------------------------------------------------------


LONG = [rollout(tokens=[i, 0, 0, 0, 0, 0]) for i in range(3)]


def test_steps_add_up_where_they_end_and_whole_answers_are_paid_with_the_last():
    fine = fixed([(0, 1.0), (3, 0.0), (5, 0.5)], [(4, 1.0)], None)
    coarse = fixed([(3, 0.2), (4, 0.4)], [(1, 0.0)], [(5, 1.0)])
    parts = [
        Part("fine", fine, 2.0, of_steps=True), Part("coarse", coarse, of_steps=True), Part("right", fixed(1.0, 0.5, 1.0), 0.1),
        Part("seen", fixed([(2, 9.0)], [(2, 9.0)], [(2, 9.0)]), 0.0, of_steps=True),
    ]  # fmt: skip
    rewards = Rewards(parts)
    assert rewards.step_labels == ("fine", "coarse") and rewards.labels == ("fine", "coarse", "right", "seen")
    scores = rewards.score(LONG)
    assert scores.parts["fine"] == [0.5, 1.0, None] and scores.parts["seen"] == [9.0] * 3
    assert scores.total == [pytest.approx(2 * 0.5 + 0.3 + 0.1), pytest.approx(2 * 1.0 + 0.05), None]
    assert scores.steps == [[(0, 2.0), (3, 0.2), (4, 0.4), (5, pytest.approx(1.1))], [(1, 0.0), (4, pytest.approx(2.05))], None]
    joined = (Scores.empty() + scores).with_penalty([-1.0, 0.0, -1.0])
    assert joined.steps == [[(0, 2.0), (3, 0.2), (4, 0.4), (5, pytest.approx(0.1))], scores.steps[1], None]
    assert joined.total == [pytest.approx(0.4), scores.total[1], None]


def test_steps_that_are_not_paid_are_steps_of_0():
    steps = fixed([(2, 1.0), (5, 1.0)], [(2, 1.0), (5, 1.0)], None)
    parts = [Part("right", fixed(1.0, 0.0, 0.0), 0.5), Part("steps", steps, only_with="right", of_steps=True)]
    scores = Rewards(parts).score(LONG)
    assert scores.total == [1.5, 0.0, 0.0]
    assert scores.steps == [[(2, 1.0), (5, 1.5)], [(2, 0.0), (5, 0.0)], [(5, 0.0)]]


@pytest.mark.parametrize(
    "wrong", [[], [(3, 1.0), (3, 1.0)], [(4, 1.0), (2, 1.0)], [(6, 1.0)], [(-1, 1.0)], [(0, float("nan"))], 1.0, [1.0]]
)
def test_steps_that_cannot_be_are_no_score(wrong, capsys):
    scores = Rewards([Part("odd", fixed([(5, 1.0)], wrong, [(0, 1.0)]), of_steps=True)]).score(LONG)
    assert scores.total == [1.0, None, 1.0] and scores.failed == {"odd": 1} and scores.steps[1] is None
    assert "no score for 1 of 3 rollouts" in " ".join(capsys.readouterr().err.split())


def test_whole_answers_have_no_steps():
    assert Rewards([Part("a", fixed(0.0, 1.0, 2.0)), Part("seen", fixed(*[[(5, 1.0)]] * 3), 0.0, of_steps=True)]).score(LONG).steps == []
    with pytest.raises(ConfigError, match="the reward 'a' scores steps, which other answers do not have"):
        Rewards([Part("a", fixed(), shuffled=True, of_steps=True)])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ('name = "answer"\npattern = "x"', "pattern is no option of the reward 'answer'; it has exact"),
        ('name = "format"', "the reward 'format' needs a pattern"),
        ('name = "format"\npattern = "("', "is no regular expression"),
        ('name = "code"\nmemory_mib = 63', "memory_mib = 63"),
        ('name = "length"\ncpu_s = 4', "cpu_s is no option of the reward 'length'; it has least_tokens, most_tokens"),
        ('name = "length"\nleast_tokens = 5\nmost_tokens = 4', "least_tokens = 5 and most_tokens = 4 allow no answer"),
        ('name = "model"', "the reward 'model' needs a folder"),
        ('name = "python"', "the reward 'python' needs a file"),
        ('name = "python"\nfile = "a.py"\npattern = "x"', "it has file, function, steps"),
        ('name = "answer"\nfile = "a.py"', "file is no option of the reward 'answer'"),
        ('name = "answer"\nscale = "groups"', 'scale = "groups"'),
        ('name = "anser"', "did you mean 'answer'"),
        ('name = "steps"\nsteps = true', "steps is no option of the reward 'steps'"),
        ('name = "model"\nfolder = "a"\ndelimiter = ";"', "add steps = true"),
        ('name = "model"\nfolder = "a"\nsteps = true\ndelimiter = ""', "delimiter"),
    ],
)
def test_bad_sections_are_refused(tmp_path, section, says):
    class Recipe(Section):
        reward: tuple[RewardSection, ...]

    (tmp_path / "r.toml").write_text(f"[[reward]]\n{section}\n")
    with pytest.raises(ConfigError) as raised:
        load_recipe(str(tmp_path / "r.toml"), Recipe, folder="grpo")
    assert says in str(raised.value)


def test_labels_must_fit():
    with pytest.raises(ConfigError, match="two rewards are called 'length'"):
        open_rewards([RewardSection(name="length", most_tokens=4), RewardSection(name="length", most_tokens=9)])
    with pytest.raises(ConfigError, match="only_with = 'anser' of the reward 'length' is none of answer, length"):
        open_rewards([RewardSection(name="answer"), RewardSection(name="length", most_tokens=9, only_with="anser")])
    with pytest.raises(ConfigError, match="a reward is called 'overlong', as the penalty for long answers is"):
        open_rewards([RewardSection(name="answer"), RewardSection(name="length", most_tokens=9, label="overlong")])
    with pytest.raises(ConfigError, match="no reward has a weight"):
        open_rewards([RewardSection(name="answer", weight=0.0)])
