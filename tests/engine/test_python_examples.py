"""The README's Python example and the programs in examples/ do run."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Transformer, tokenizer: Tokenizer) -> None:
    save_checkpoint(tmp_path / "runs" / "nano" / "step-1", model, tokenizer)
    monkeypatch.chdir(tmp_path)


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(program.splitlines()) <= 15
    exec(compile(program, "README.md", "exec"), {})
    assert re.search(r"-?\d+\.\d+ (True|False)\n$", capsys.readouterr().out)


def test_every_example_is_run_here_and_short() -> None:
    files = sorted((ROOT / "examples").iterdir())
    assert [file.name for file in files] == ["best_of_n.py"]
    assert all(len(file.read_text().splitlines()) <= 40 for file in files)


def test_best_of_n() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / "best_of_n.py"))["main"]("runs/nano", "the river", "the sea")
    found = re.findall(r"^  (-\d+\.\d+) a token, the worst (-\d+\.\d+)$", printed.getvalue(), re.MULTILINE)
    assert len(found) == 2 and all(float(best) >= float(worst) for best, worst in found)
