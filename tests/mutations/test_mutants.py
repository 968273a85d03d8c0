"""Every named mistake of mutants.toml, made in a copy of the package, must be caught by the tests named beside it."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dsv2"
MUTANTS = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text(encoding="utf-8"))["mutant"]
NAMED_TESTS = sorted({test for mutant in MUTANTS for test in mutant["tests"]})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_the_list_is_up_to_date(mutant):
    """The text to replace is in the source exactly once, and the tests that must fail exist."""
    assert (SOURCE / mutant["file"]).read_text(encoding="utf-8").count(mutant["old"]) == 1
    for test in mutant["tests"]:
        file, function = test.split("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


def copy_of_the_package(folder: Path) -> Path:
    """A copy of src/dsv2 that may be changed; the corpus, which no mutant touches, is only linked."""
    copy = folder / "dsv2"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
    (copy / "assets" / "corpus").symlink_to(SOURCE / "assets" / "corpus")
    return copy


def run_tests(tests: list[str], package: Path) -> subprocess.CompletedProcess[str]:
    """pytest on `tests` with `package` in place of the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_unchanged_copy_passes(tmp_path):
    """Otherwise a mutant below could be caught for another reason. The copy really is what runs."""
    package = copy_of_the_package(tmp_path)
    result = run_tests(NAMED_TESTS, package)
    assert result.returncode == 0, result.stdout
    command = [sys.executable, "-c", "import dsv2; print(dsv2.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()) == package / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_mutant_is_caught(mutant, tmp_path, monkeypatch):
    file = copy_of_the_package(tmp_path) / mutant["file"]
    file.write_text(file.read_text(encoding="utf-8").replace(mutant["old"], mutant["new"]), encoding="utf-8")
    if file.suffix == ".py":
        compile(file.read_text(encoding="utf-8"), str(file), "exec")
    else:  # the mistake is compiled, and its library thrown away
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run_tests(mutant["tests"], tmp_path / "dsv2")
    # 1: a test failed. Anything else (no test found, an import that broke) would be an accident and not a catch.
    assert result.returncode == 1, result.stdout
