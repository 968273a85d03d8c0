"""Folders that somebody else filled, through the command line: an answer, exit code 0 or 2; nobody's files are touched."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from folders import files_of, tiny_model

from dsv2.checkpoint.huggingface import build_model
from dsv2.checkpoint.layout import load_training
from dsv2.checkpoint.source import Converted, ModelSource, save_tensors
from dsv2.cli import main
from dsv2.errors import CheckpointError, ConfigError, DataError
from dsv2.model.config import ModelConfig
from dsv2.tokenizer.tokenizer import Tokenizer
from reference.tiny import V2


@pytest.fixture
def folder(run: Path) -> Path:
    """Return a good model folder without a manifest, which would find every change."""
    shutil.rmtree(run / "step-3" / "training", ignore_errors=True)
    (run / "step-3" / "manifest.json").unlink()
    return run / "step-3"


def answers(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Take a folder through every verb that reads one; return what was said."""
    codes = {
        main(["generate", str(folder), "--prompt", "The", "--max-tokens", "1"]),
        main(["info", str(folder)]),
        main(["convert", str(folder), "--out", str(out / "folder")]),
    }
    assert codes <= {0, 2}
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said) < 20_000
    return said


# One value somewhere in a JSON file is replaced by another. ------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, -1, 0, 1.5, 10**6, 10**400, float("nan"), float("inf"), "", "x", "\ud800", "[", "\u0000" * 5, "y" * 5000, [], {}, [[]],
    {"a": 1}, ["a", 1], {"type": "BPE"}, {"content": 3},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the ways to all values inside one, at most a few into long lists."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))[:12] if isinstance(value, dict | list) else []
    return [path] + [place for key, inner in items for place in places(inner, (*path, key))]


def changed(value: Any, dice: random.Random) -> Any:
    content = copy.deepcopy(value)
    way = dice.choice(places(content)[1:])
    holder = content
    for key in way[:-1]:
        holder = holder[key]
    if dice.random() < 0.2:
        del holder[way[-1]]
    else:
        holder[way[-1]] = copy.deepcopy(dice.choice(ODD))
    return content


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_any_value_of_any_json_file_may_be_odd(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = json.loads((folder / name).read_text())
    for number in range(60):
        (folder / name).write_text(json.dumps(changed(good, random.Random(f"{name}{number}"))))
        answers(folder, tmp_path / f"out-{number}", capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", "[" * 10**5, "null", '"x"', "{", "\ufeff{}", '{"a": ' * 10**5])
def test_what_is_no_json_object(name: str, text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    assert "error: " in answers(folder, tmp_path, capsys)


@pytest.mark.parametrize("kind", ["dangling link", "pipe", "folder", "link to elsewhere", "huge"])
def test_a_chat_template_that_is_no_template(kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "chat_template.jinja"
    if kind == "dangling link":
        file.symlink_to("/nowhere/at/all")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "huge":
        file.write_text("x" * 1_000_001)
    else:
        (tmp_path / "secret").write_text("a secret")
        file.symlink_to(tmp_path / "secret")
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "chat_template.jinja" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_template_of_somebody_is_handed_on_and_not_run(folder: Path, tmp_path: Path) -> None:
    evil = (
        "{{ cycler.__init__.__globals__.os.system('touch "
        + str(tmp_path / "ran")
        + "') }} Assistant: {% for i in range(10**9) %}x{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(evil)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.template, tokenizer.published_template) == ("v2", evil)
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == evil
    assert not (tmp_path / "ran").exists()


# Where it is written ---------------------------------------------------------------------------------------------------------------


def untouched(path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = files_of(path)
    assert main(["convert", *arguments]) == 2
    assert files_of(path) == before
    return capsys.readouterr().err


def test_somebodys_folder_is_not_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text('{"name": "my app"}')
    (app / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in untouched(app, [str(folder), "--out", str(app)], capsys)


def test_a_runs_own_step_is_not_replaced(
    run: Path, model: Any, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "step-3", tmp_path / "step-4")
    (tmp_path / "step-4" / "training").mkdir()
    (tmp_path / "step-4" / "training" / "state.json").write_text("{}")
    assert "training/ would be lost" in untouched(tmp_path / "step-4", [str(run), "--out", str(tmp_path / "step-4")], capsys)


@pytest.mark.parametrize("out", ["", "model.safetensors", ".."])
def test_the_model_to_read_is_not_written_over(out: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "step-3"
    to = ["--to", "gguf"] if out.endswith("safetensors") else []
    assert "is the model to read" in untouched(run, [str(folder), *to, "--out", str(folder / out)], capsys)


@pytest.mark.parametrize("kind", ["notes", "device"])
def test_gguf_replaces_gguf_alone(kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.gguf"
    if kind == "notes":
        out.write_text("notes")
    else:
        os.mkfifo(out)
    assert main(["convert", str(folder), "--out", str(out)]) == 2
    assert "error: " in capsys.readouterr().err
    assert out.is_fifo() if kind == "device" else out.read_text() == "notes"


@pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "a/" * 3000])
def test_names_too_long_for_the_disk(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["convert", str(folder), "--out", str(tmp_path / name)],
        ["convert", name, "--out", str(tmp_path / "out")],
        ["info", name],
    ):
        assert main(arguments) == 2
        assert "error: " in capsys.readouterr().err


def test_sigterm_takes_its_temporary_folder_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv2", "convert", "random:small", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(tmp_path.iterdir()):
        sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert list(tmp_path.iterdir()) == []


# Values -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e5), (torch.bfloat16, 3.4e38)])
def test_a_value_that_the_new_dtype_cannot_hold_is_named(dtype: torch.dtype, value: float) -> None:
    model = tiny_model("v2")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds values up to"):
        build_model(Converted(ModelSource(model), dtype))


@pytest.mark.parametrize("weights", ["nan,nan", "inf,-inf", "1e400,0"])
def test_weights_of_a_merge_are_numbers(weights: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["convert", "merge", str(folder), str(folder), "--weights", weights, "--out", str(tmp_path / "out")])
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_lists_no_weights_vouches_for_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": "dsv2-checkpoint", "version": 1, "files": {}}))
    assert "does not list config.json" in answers(folder, tmp_path, capsys)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1}, {"max_position_embeddings": 10**15}, {"qk_nope_head_dim": 10**400, "qk_rope_head_dim": 1.5},
        {"rope_scaling": V2["rope_scaling"] | {"factor": float("inf")}},
        {"rope_scaling": V2["rope_scaling"] | {"original_max_position_embeddings": 10**400}},
    ],
)  # fmt: skip
def test_sizes_beyond_any_model(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(V2 | fields)


@pytest.mark.parametrize("damage", ["dtype", "state", "missing"])
def test_a_damaged_training_folder(damage: str, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    save_tensors(tmp_path / "training" / "optimizer.safetensors", {"a": torch.ones(2)})
    state: dict[str, Any] = {"step": 1, "consumed_samples": 8, "elapsed_s": 0.5}
    if damage == "dtype":
        file = tmp_path / "training" / "optimizer.safetensors"
        file.write_bytes(file.read_bytes().replace(b'"F32","shape":[2]', b'"I64","shape":[1]'))
    elif damage == "state":
        state["step"] = "many"
    else:
        del state["elapsed_s"]
    (tmp_path / "training" / "state.json").write_text(json.dumps(state))
    with pytest.raises((CheckpointError, DataError), match="I64|must be a number"):
        load_training(tmp_path)
