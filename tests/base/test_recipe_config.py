"""Recipes are read strictly, and every complaint says where, what was seen and what is allowed."""

import json
import math
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from dsv2.config import Section, dump_toml, load_recipe, parse_override
from dsv2.errors import ConfigError


class Schedule(Section):
    warmup_steps: int = Field(default=10, ge=0)
    peak_lr: float = 1e-4
    kind: Literal["steps", "cosine"] = "steps"
    drops_at: tuple[float, ...] = (0.6, 0.9)
    every: int | Literal["never"] = "never"


class Recipe(Section):
    preset: str = "nano"
    seq_len: int = Field(gt=0)
    schedule: Schedule = Schedule()
    second: Schedule | None = None
    phases: list[Schedule] = []
    weights: dict[str, float] = {}
    clip: bool = True
    out: Path = Path("runs")

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.preset == "own error":
            raise ConfigError("no such preset", hint="take nano")
        if self.preset == "value error":
            raise ValueError("preset cannot be that")
        return self


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text("seq_len = 128\n\n[schedule]\npeak_lr = 1\ndrops_at = [0.5]\n")
    return path


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(str(path), Recipe, folder="pretrain", overrides=overrides)


def complaint(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    return caught.value


def test_file_then_overrides_in_order(recipe_file: Path) -> None:
    recipe = load(
        recipe_file, "schedule.warmup_steps=5", "preset=v2-lite", "clip=false", "schedule.warmup_steps=7", "second.every=3", "out=a/b"
    )
    assert recipe.schedule == Schedule(warmup_steps=7, peak_lr=1.0, drops_at=(0.5,))
    assert isinstance(recipe.schedule.peak_lr, float)
    assert recipe.second == Schedule(every=3)
    assert (recipe.preset, recipe.seq_len, recipe.clip, recipe.out) == ("v2-lite", 128, False, Path("a/b"))


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("schedule.warmup_step=3", "schedule.warmup_step", "did you mean 'schedule.warmup_steps'?"),
        ("second.kin='steps'", "second.kin", "did you mean 'second.kind'?"),
        ("shedule.peak_lr=1", "shedule", "did you mean 'schedule'?"),
        ("phases=[{peak_rl=1.0}]", "phases.0.peak_rl", "did you mean 'phases.peak_lr'?"),
        ("schedule.seq_len=3", "schedule.seq_len", "did you mean 'seq_len'?"),
    ],
)
def test_unknown_key_names_the_nearest(recipe_file: Path, override: str, key: str, hint: str) -> None:
    error = complaint(recipe_file, override)
    assert error.message == f"override {override!r}: unknown key {key!r}"
    assert error.hint == hint


def test_unknown_key_in_a_file_names_the_file(recipe_file: Path) -> None:
    recipe_file.write_text("seq_len = 1\n[schedule]\nwarmup = 3\n")
    error = complaint(recipe_file)
    assert error.message == f"{recipe_file}: unknown key 'schedule.warmup'"
    assert error.hint == "did you mean 'schedule.warmup_steps'?"


@pytest.mark.parametrize(
    ("override", "says", "hint"),
    [
        ("schedule.warmup_steps=ten", 'schedule.warmup_steps = "ten" (a string); allowed: an integer', None),
        ("schedule.warmup_steps='12'", 'schedule.warmup_steps = "12" (a string); allowed: an integer', None),
        ("schedule.warmup_steps=1e3", "schedule.warmup_steps = 1000.0 (a float); allowed: an integer", "write 1000"),
        ("schedule.warmup_steps=true", "schedule.warmup_steps = true (a boolean); allowed: an integer", None),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps = -1 (an integer); allowed: greater than or equal to 0", None),
        ("schedule.peak_lr=nan", "schedule.peak_lr = nan (a float); allowed: a finite number", None),
        ("schedule.kind=cosin", "schedule.kind = \"cosin\" (a string); allowed: 'steps' or 'cosine'", "did you mean 'cosine'?"),
        ("schedule.every=1.5", "schedule.every = 1.5 (a float); allowed: an integer or 'never'", None),
        ("preset=3", "preset = 3 (an integer); allowed: a string", 'quote it: preset = "3"'),
        ("clip=True", 'clip = "True" (a string); allowed: true or false', "write true"),
        ("schedule=5", "schedule = 5 (an integer); allowed: a table", None),
        ("weights.en=heavy", 'weights.en = "heavy" (a string); allowed: a number', None),
        ("preset.size=3", 'preset is "nano", not a section', None),
    ],
)
def test_wrong_value_shows_what_was_seen_and_what_is_allowed(recipe_file: Path, override: str, says: str, hint: str | None) -> None:
    recipe_file.write_text('preset = "nano"\n' + recipe_file.read_text())
    error = complaint(recipe_file, override)
    assert error.message == f"override {override!r}: {says}"
    assert error.hint == hint


def test_a_number_says_which_table_of_an_array(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "\n[[phases]]\npeak_lr = 1.0\n\n[[phases]]\nwarmup_steps = 3\n")
    given = ["phases.1.peak_lr=0.5", "phases.0={warmup_steps=7}", "phases.0.kind=cosine"]
    first, second = load_recipe(str(recipe_file), Recipe, folder="none", overrides=given).phases
    assert (first.warmup_steps, first.peak_lr, first.kind) == (7, 1e-4, "cosine") and (second.warmup_steps, second.peak_lr) == (3, 0.5)
    for override, name in (("phases.2.peak_lr=1", "2"), ("phases.peak_lr=1", "peak_lr"), ("phases.2={}", "2")):
        error = complaint(recipe_file, override)
        assert error.message == f"override {override!r}: phases has 2 tables, counted from 0, and {name!r} is none of them"
    assert 'phases.1.peak_lr = "x"' in complaint(recipe_file, "phases.1.peak_lr=x").message
    assert complaint(recipe_file, "phases.1.peak=1").hint == "did you mean 'phases.peak_lr'?"
    assert "schedule.drops_at is [0.5], not a section" in complaint(recipe_file, "schedule.drops_at.0=0.7").message


def test_every_problem_is_listed_with_its_origin(recipe_file: Path) -> None:
    recipe_file.write_text("seq_len = 0\n")
    lines = complaint(recipe_file, "clip=2").message.splitlines()
    assert lines[0] == "2 things are wrong"
    assert {line.strip() for line in lines[1:]} == {
        f"{recipe_file}: seq_len = 0 (an integer); allowed: greater than 0",
        "override 'clip=2': clip = 2 (an integer); allowed: true or false",
    }


def test_missing_key_and_errors_of_validators_name_the_file(recipe_file: Path) -> None:
    assert complaint(recipe_file, "preset='value error'").message == f"{recipe_file}: preset cannot be that"
    own = complaint(recipe_file, "preset='own error'")
    assert (own.message, own.hint) == (f"{recipe_file}: no such preset", "take nano")
    recipe_file.write_text("")
    assert complaint(recipe_file).message == f"{recipe_file}: the key 'seq_len' is missing"


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("a = 1\n[schedule\nb = 2\n", 2, "[schedule"),
        ("a = 1\na = 2\n", 2, "a = 2"),
        ('a = """\nopen\n', 2, "open"),
        ("a = 1\n\nb\n", 3, "b"),
    ],
)
def test_broken_toml_names_file_and_line(recipe_file: Path, text: str, line: int, shown: str) -> None:
    recipe_file.write_text(text)
    error = complaint(recipe_file)
    assert error.message.startswith(f"{recipe_file}:{line}: not valid TOML: ")
    assert error.hint == f"line {line} reads: {shown}"


def test_what_is_no_recipe_file(tmp_path: Path) -> None:
    junk = tmp_path / "junk.toml"
    junk.write_bytes(b"a = 1\n\xff\x00")
    assert complaint(junk).message == f"{junk} is not UTF-8 text: byte 0xff at offset 6"
    assert "No such file" in complaint(tmp_path / "absent.toml").message
    assert "directory" in complaint(tmp_path).message.lower()


def test_shipped_recipes_are_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "stage").mkdir(parents=True)
    (tmp_path / "recipes" / "stage" / "nano.toml").write_text("seq_len = 7")
    (tmp_path / "recipes" / "stage" / "small.toml").write_text("seq_len = 'x'")
    monkeypatch.setattr("dsv2.config.files", lambda package: tmp_path)
    assert load_recipe("nano", Recipe, folder="stage").seq_len == 7
    with pytest.raises(ConfigError) as caught:
        load_recipe("nanno", Recipe, folder="stage")
    assert caught.value.message == "unknown recipe 'nanno'; shipped: nano, small"
    assert caught.value.hint == "did you mean 'nano'?"
    with pytest.raises(ConfigError, match="^recipes/stage/small.toml: seq_len"):
        load_recipe("small", Recipe, folder="stage")


@pytest.mark.parametrize("override", ["", "x", "=3", "a=", "a.=3", ".a=3", "a b=3", "a=[1", 'a="open', "a={b}"])
def test_overrides_with_bad_syntax_are_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(override)
    assert repr(override) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [("4e-4", 4e-4), ("1_000", 1000), ("true", True), ("'true'", "true"), ("v2-lite", "v2-lite"), ("a=b", "a=b"), ("/x/y", "/x/y")]
    + [("[1, 2]", [1, 2]), ("{b = 1}", {"b": 1}), ("1\nb = 2", "1\nb = 2"), ("hello world", "hello world"), ('""', "")],
)
def test_override_values_are_toml_literals_or_bare_words(text: str, value: object) -> None:
    assert parse_override(f"a.b-c={text}") == (("a", "b-c"), value)


def test_sections_are_frozen_and_closed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Schedule().warmup_steps = 3
    with pytest.raises(ValueError, match="Extra inputs"):
        Schedule(warmup=3)  # type: ignore[call-arg]


finite = st.floats(allow_nan=False, allow_infinity=False)
schedules = st.builds(
    Schedule,
    warmup_steps=st.integers(0, 10**12),
    peak_lr=finite,
    kind=st.sampled_from(["steps", "cosine"]),
    drops_at=st.lists(finite).map(tuple),
    every=st.integers() | st.just("never"),
)


@settings(deadline=None)
@given(
    st.builds(
        Recipe,
        preset=st.text().filter(lambda text: "error" not in text),
        seq_len=st.integers(1, 2**40),
        schedule=schedules,
        second=st.none() | schedules,
        phases=st.lists(schedules, max_size=2),
        weights=st.dictionaries(st.text(), finite),
        clip=st.booleans(),
        out=st.sampled_from(["a", "b/c", "d e"]),
    )
)
def test_a_dumped_recipe_is_read_back_as_itself(recipe: Recipe) -> None:
    again = Recipe.model_validate_json(json.dumps(tomllib.loads(dump_toml(recipe))), strict=True)
    assert again == recipe


def test_dump_refuses_what_toml_cannot_say() -> None:
    class Odd(Section):
        limit: int | None = 3
        ratio: float = Field(default=1.0, allow_inf_nan=True)

    assert dump_toml(Odd(ratio=math.inf)) == "limit = 3\nratio = inf\n"
    with pytest.raises(ValueError, match="does not survive TOML"):
        dump_toml(Odd(limit=None))
