"""`import dsv2`, every `--help` and the rooms that promise it work without torch, and importing a module does nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv2.cli import VERBS

SOURCE = Path(__file__).parents[2] / "src" / "dsv2"

# Files and folders of src/dsv2 that promise to work without torch; those that do not exist yet are passed over.
TORCH_FREE = [
    "__init__.py", "__main__.py", "errors.py", "files.py", "machine.py", "config.py", "progress.py", "metrics.py", "cli.py", "verbs",
    "doctor.py",
    "presets.py",
    "assets", "tokenizer", "data/documents.py", "data/shards.py", "data/packing.py", "data/prepare.py", "model/config.py",
    "model/accounting.py", "checkpoint/names.py", "checkpoint/shard.py", "checkpoint/folder.py", "checkpoint/identity.py",
    "checkpoint/generation.py", "checkpoint/hub.py", "checkpoint/manifest.py", "checkpoint/steps.py",
    "engine/request.py", "engine/blocks.py", "engine/scheduler.py", "engine/sampler.py", "engine/text.py", "engine/constrain.py",
    "engine/grammar_probe.py", "engine/tier.py", "engine/speculate.py", "tasks",
    "server/protocol.py", "model/yardstick.py", "info",
    "parallel/__init__.py", "parallel/hardware.py", "parallel/routing.py", "parallel/schedules.py", "parallel/layout.py",
    "parallel/memory.py", "parallel/simulate.py", "parallel/served.py", "parallel/serving.py", "parallel/fit.py", "parallel/search.py",
    "plan",
]  # fmt: skip

PROGRAM = """
import contextlib, importlib, io, json, os, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            attempts.append(current)
            raise ImportError("torch is not to be imported here")

attempts, current, failures = [], "", {}
sys.meta_path.insert(0, NoTorch())
job = json.loads(sys.stdin.read())
environment = dict(os.environ)
for module in job["modules"]:
    current = module
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            importlib.import_module(module)
        except Exception as error:
            failures[module] = repr(error)
    if said.getvalue() or dict(os.environ) != environment:
        failures[module] = f"importing it does something: {said.getvalue()!r}"
from dsv2.cli import main
for argv, code in job["lines"]:
    current = " ".join(["dsv2", *argv])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            got = main(argv)
        except BaseException as error:
            got = repr(error)
    if got != code:
        failures[current] = f"exit code {got}, not {code}"
print(json.dumps({"failures": failures, "torch": sorted(set(attempts))}))
"""


def modules(paths: list[str]) -> list[str]:
    """Return the dotted names of the files that exist at or below the paths, and so the packages around them."""
    files = [
        file
        for path in paths
        for file in ([SOURCE / path] if path.endswith(".py") else sorted((SOURCE / path).rglob("*.py")))
        if file.is_file()
    ]
    names = [".".join(["dsv2", *file.relative_to(SOURCE).with_suffix("").parts]) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def without_torch(names: list[str], lines: list[tuple[list[str], int]], *, path: str = "") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        input=json.dumps({"modules": names, "lines": lines}),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.skipif(sys.flags.optimize > 0, reason="asserts are off")
def test_no_torch_before_a_stage_runs() -> None:
    lines: list[tuple[list[str], int]] = [([], 0), (["--help"], 0), (["--version"], 0), (["no-such-verb"], 2)]
    for verb in VERBS:
        lines += [([verb, "--help"], 0), ([verb, "--no-such-option"], 2)]
    lines += [(["info", "v2"], 0), (["info", "v2-lite", "--tensors", "--json"], 0), (["info", "no-such-preset"], 2)]
    lines += [(["plan", "train", "v2"], 0), (["plan", "serve", "v2", "--json"], 0), (["plan", "train", "v2", "pq=1"], 2)]
    names = modules(TORCH_FREE)
    assert {"dsv2", "dsv2.cli", "dsv2.config", "dsv2.errors"} <= set(names)
    assert without_torch(names, lines) == {"failures": {}, "torch": []}


def test_an_import_of_torch_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "hides.py").write_text("try:\n    import torch\nexcept ImportError:\n    pass\n")
    (tmp_path / "talks.py").write_text("print('hello')\n")
    answer = without_torch(["hides", "talks"], [(["no-such-verb"], 0)], path=str(tmp_path))
    assert answer["torch"] == ["hides"]
    assert answer["failures"] == {"talks": "importing it does something: 'hello\\n'", "dsv2 no-such-verb": "exit code 2, not 0"}
