"""Sizes, names and paths: what keeps the house easy to live in and the same on every machine."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv2.cli import VERBS

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 60
JUNK_DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}
# Text of other people, kept as it is.
QUOTED = ("src/dsv2/assets/corpus/",)


def committed() -> list[Path]:
    """Return the files that git tracks or would track; in a copy without git, all that is no build product."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
        paths = [ROOT / name for name in names if name]
    else:
        products = re.compile(r"(^|/)(\.(?!ci|gitignore)[^/]+|__pycache__|[^/]+\.egg-info|build|dist|runs)(/|$)")
        paths = [path for path in ROOT.rglob("*") if not products.search(path.relative_to(ROOT).as_posix())]
    return sorted(path for path in paths if path.is_file())


def python_files() -> list[Path]:
    return [path for path in committed() if path.suffix == ".py"]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its decorators and docstring."""
    assert function.end_lineno is not None
    first = function.body[0]
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    described = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - described


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > FUNCTION_LINES:
            yield f"{short(path)}:{node.lineno}: {node.name} has {lines_of(node)} lines; at most {FUNCTION_LINES}"


def test_files_and_functions_stay_small() -> None:
    sizes = {short(path): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: size for name, size in sizes.items() if size > FILE_LINES} == {}, f"at most {FILE_LINES} lines"
    assert [complaint for path in python_files() for complaint in long_functions(path)] == []


def test_no_file_is_a_junk_drawer() -> None:
    assert [
        short(path) for path in committed() if JUNK_DRAWERS & {part.split(".")[0].lower() for part in path.relative_to(ROOT).parts}
    ] == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in python_files() if path.name.startswith("test_")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == [], "pytest needs unique base names without __init__.py"


# Split, so that this file does not hold what it looks for.
OUTSIDE = re.compile(r"(?<![\w./-])(/" + "work|/" + r"root|/" + r"home/\w+)/|\.\./" + "shared")


def machine_paths(text: str) -> list[str]:
    return [match[0] for match in OUTSIDE.finditer(text)]


def test_no_file_points_outside_the_repository() -> None:
    found = []
    for path in committed():
        if short(path).startswith(QUOTED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # no text
        found += [f"{short(path)}: {place}" for place in machine_paths(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /" + "work/main/x", 1),
        ("'/" + "root/x'", 1),
        ("cd ../" + "shared", 1),
        ("/" + "home/ann/x", 1),
        ("http://a.org/" + "work/x", 0),
        ("frame" + "work/x", 0),
    ],
)
def test_a_machine_path_is_noticed(text: str, found: int) -> None:
    assert len(machine_paths(text)) == found


def test_the_readme_lists_every_verb_in_river_order() -> None:
    documented = re.findall(r"^\| `dsv2 ([a-z-]+)\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert documented == list(VERBS)


def test_the_readme_has_the_two_commands_in_one_line_each() -> None:
    fences = re.findall(r"^```[a-z]*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for fence in fences for line in fence.splitlines() if line.startswith("python3 -m venv")]
    assert len([line for line in commands if "-c constraints.txt" in line and "dsv2 tour" in line and "pytest" not in line]) == 1
    assert len([line for line in commands if "-c constraints.txt" in line and "pytest" in line]) == 1, ".ci/run runs this line"
