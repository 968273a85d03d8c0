"""`import dsv2` offers a dozen names, each loaded from its room on first use; errors carry hints; extras agree with pyproject.toml."""

import ast
import tomllib
from pathlib import Path

import pytest

import dsv2
from dsv2.errors import EXTRAS, ConfigError, Dsv2Error, MissingExtra, did_you_mean, extra_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", dsv2.__all__)
def test_public_name_comes_from_its_room(name: str) -> None:
    value = getattr(dsv2, name)
    assert value.__name__ == name
    assert value.__module__.startswith("dsv2.")
    assert value.__doc__
    assert name in dir(dsv2)


def test_the_three_lists_of_public_names_agree() -> None:
    tree = ast.parse((ROOT / "src/dsv2/__init__.py").read_text())
    for_type_checkers = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    del for_type_checkers["import_module"], for_type_checkers["TYPE_CHECKING"], for_type_checkers["Any"]
    assert for_type_checkers == dsv2._HOME
    assert sorted(dsv2._HOME) == sorted(dsv2.__all__)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        dsv2.Trainer  # noqa: B018


def test_errors_say_what_and_what_to_do() -> None:
    error = ConfigError("a = 3; allowed: 4", hint="write 4")
    assert isinstance(error, Dsv2Error)
    assert str(error) == "a = 3; allowed: 4\nhint: write 4"
    missing = MissingExtra("pyarrow", "data", "reading parquet")
    assert missing.message == "reading parquet needs pyarrow, which is not installed"
    assert missing.hint == "run: pip install pyarrow (part of the extra dsv2[data])"
    assert did_you_mean("zzz", ["nano"]) == "did you mean 'nano'?"
    assert did_you_mean("zzz", []) is None


def test_extras_are_those_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra: tuple(line.split(">=")[0] for line in lines) for extra, lines in declared.items() if extra != "dev"} == EXTRAS
    assert extra_of("pyarrow.parquet") == "data"
    assert extra_of("torch") is None
