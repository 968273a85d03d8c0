"""A room imports only from rooms upstream of it, and torch.distributed, triton and the web framework stay in theirs (docs/design.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "dsv2"

# The river, upstream first. A name is a folder of src/dsv2 or a file in it; names of one line may import each other.
RIVER = [
    {"errors", "files", "machine", "config", "progress", "metrics", "assets", "recipes"},
    {"tokenizer"},
    {"data"},
    {"kernels"},
    {"model"},
    {"presets"},
    {"parallel"},
    {"checkpoint"},
    {"train"},
    {"engine"},
    {"tasks"},
    {"rl"},
    {"server"},
    {"evaluation"},
    {"reproduce", "report", "info", "plan", "samples", "tour", "tour_chat", "tour_state", "doctor"},
    {"verbs"},
    {"cli"},  # reaches the stages through strings
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(RIVER) for name in names}

# Packages that only certain places may import: a folder with a slash at its end, or a file.
CONFINED = {
    "triton": ("kernels/triton/",),
    "torch.distributed": ("parallel/", "checkpoint/store.py"),
    "fastapi": ("server/app.py",),
    "starlette": ("server/app.py",),
    "uvicorn": ("server/app.py",),
}


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of all that a file imports anywhere in it, `import_module("x")` and `torch.distributed.f()` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def complaints(source: Path) -> list[str]:
    """Check every file below a dsv2 package folder; return a line for each breach."""
    found = []
    for file in sorted(source.rglob("*.py")):
        place = file.relative_to(source)
        room = place.with_suffix("").parts[0]
        if room not in RANK:
            found.append(f"{place}: give {room!r} its place in RIVER and in docs/design.md")
            continue
        for line, name in imports(ast.parse(file.read_text()), ["dsv2", *place.parts[:-1]]):
            reason = breach(place.as_posix(), room, name)
            if reason:
                found.append(f"{place}:{line}: {reason}")
    return found


def breach(place: str, room: str, name: str) -> str | None:
    """Say what is wrong with importing `name` in `place`, or None."""
    for confined, homes in CONFINED.items():
        if (name == confined or name.startswith(f"{confined}.")) and not any(
            place == home or (home.endswith("/") and place.startswith(home)) for home in homes
        ):
            return f"{confined} is imported only in {' and '.join(homes)}"
    parts = name.split(".")
    if parts[0] != "dsv2" or parts[1:] == ["__version__"]:
        return None
    target = parts[1] if len(parts) > 1 else ""
    if target not in RANK:
        return f"import {name} from the module that it lives in, not through the front door"
    if RANK[target] > RANK[room]:
        return f"{room} imports {name}, which is downstream"
    if room == "presets" and target != room and RANK[target] > 0 and parts[:3] != ["dsv2", "model", "config"]:
        return "presets imports only the base and model/config.py"
    return None


def test_imports_run_upstream_only() -> None:
    assert complaints(SOURCE) == []


@pytest.mark.parametrize(
    ("place", "code", "says"),
    [
        ("model/x.py", "from dsv2.engine.request import Request", "model imports dsv2.engine.request.Request, which is downstream"),
        ("model/x.py", "def f():\n    from ..train import loop", "model imports dsv2.train.loop, which is downstream"),
        ("data/x.py", "from dsv2 import kernels", "data imports dsv2.kernels, which is downstream"),
        ("data/x.py", "from importlib import import_module\nimport_module('dsv2.model')", "data imports dsv2.model, which is downstream"),
        ("errors.py", "import dsv2.tokenizer.chat", "errors imports dsv2.tokenizer.chat, which is downstream"),
        ("tour.py", "from dsv2.cli import main", "tour imports dsv2.cli.main, which is downstream"),
        ("train/x.py", "from dsv2 import Engine", "import dsv2.Engine from the module that it lives in, not through the front door"),
        ("presets.py", "from dsv2.model.moe import MoE", "presets imports only the base and model/config.py"),
        ("kernels/cpu/x.py", "import triton.language as tl", "triton is imported only in kernels/triton/"),
        ("train/x.py", "from torch import distributed", "torch.distributed is imported only in parallel/ and checkpoint/store.py"),
        (
            "train/x.py",
            "import torch\nn = torch.distributed.get_rank()",
            "torch.distributed is imported only in parallel/ and checkpoint/store.py",
        ),
        ("server/stream.py", "from starlette.responses import Response", "starlette is imported only in server/app.py"),
        ("plugins/x.py", "", "give 'plugins' its place in RIVER and in docs/design.md"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, place: str, code: str, says: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(code)
    found = complaints(tmp_path)
    assert len(found) == 1
    assert found[0].endswith(f": {says}")


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    for place, code in {
        "engine/x.py": "from dsv2.model.cache import LatentCache\nfrom .request import Request\nfrom dsv2 import __version__\nimport torch",
        "presets.py": "from dsv2.errors import ConfigError\nfrom dsv2.model.config import ModelConfig",
        "train/x.py": "from dsv2.presets import preset",
        "kernels/triton/x.py": "import triton",
        "parallel/x.py": "import torch.distributed as dist",
        "checkpoint/store.py": "import torch.distributed.checkpoint as dcp",
        "server/app.py": "from fastapi import FastAPI",
        "tour.py": "from dsv2.report import write_report",
        "__main__.py": "from dsv2.cli import main",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(code)
    assert complaints(tmp_path) == []
