"""Each kind of damage, one at a time: the error names the file or tensor, and what it should have been."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_tiny

from dsv2.checkpoint.folder import open_folder
from dsv2.checkpoint.huggingface import load_model
from dsv2.errors import CheckpointError

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"  # [12, 32]
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"

Header = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("good") / "model", "v2", torch.bfloat16, max_shard_bytes=12_000)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_header(folder: Path, change: Callable[[Header], object], *, cut: int = 0, more: bytes = b"") -> None:
    file = shard_of(folder, EXPERT)
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    data = raw[end : len(raw) - cut] + more
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def twice(header: Header) -> bytes:
    text = json.dumps(header)
    return text.replace("{", "{" + f'"{EXPERT}": {json.dumps(header[EXPERT])}, ', 1).encode()


def share(header: Header) -> None:
    header[EXPERT]["data_offsets"] = header[GATE]["data_offsets"]


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (lambda f: edit_config(f, num_hidden_layers=4), ["lacks tensor", "model.layers.3."]),
    "an absurd number of layers": (lambda f: edit_config(f, num_hidden_layers=10**9), ["lacks tensor", "model.layers.3."]),
    "extra tensor": (lambda f: edit_config(f, num_hidden_layers=2), ["model.layers.2.", "has no place"]),
    "wrong shape": (lambda f: edit_header(f, lambda h: h[EXPERT].update(shape=[32, 12])), [EXPERT, "[32, 12]", "[12, 32]"]),
    "other kind of 16 bit": (lambda f: edit_header(f, lambda h: h[EXPERT].update(dtype="F16")), [EXPERT, "F16", "BF16"]),
    "integers": (lambda f: edit_header(f, lambda h: h[EXPERT].update(dtype="I16")), [EXPERT, "I16", "allowed: F32, BF16, F16"]),
    "unknown dtype": (lambda f: edit_header(f, lambda h: h[EXPERT].update(dtype="F4")), [EXPERT, "'F4'", "known: F32"]),
    "size that lies": (lambda f: edit_header(f, lambda h: h[EXPERT].update(shape=[12, 64])), [EXPERT, "768", "1,536"]),
    "overlap": (lambda f: edit_header(f, share), ["overlaps the tensor before it"]),
    "gap": (lambda f: edit_header(f, lambda h: h.pop(GATE)), ["leaves a gap of 768 bytes", "up_proj"]),
    "named twice": (lambda f: edit_header(f, twice), [EXPERT, "occurs twice"]),
    "cut": (lambda f: edit_header(f, lambda h: None, cut=100), ["it is cut: 100 bytes are missing"]),
    "more bytes": (lambda f: edit_header(f, lambda h: None, more=b"x" * 9), ["9 bytes at its end belong to no tensor"]),
    "header too long": (lambda f: shard_of(f, EXPERT).write_bytes(b"\xff" * 8 + b"{}"), ["its header claims 18,446,744,073,709,551,615"]),
    "header no JSON": (lambda f: edit_header(f, lambda h: b"[" * 10**6), ["not the JSON of a safetensors file"]),
    "shard away": (lambda f: shard_of(f, EXPERT).unlink(), ["model-", "is missing"]),
    "path up": (lambda f: edit_index(f, lambda m: m.update({EXPERT: "../model-00001-of-00001.safetensors"})), [EXPERT, "'../model-"]),
    "path absolute": (lambda f: edit_index(f, lambda m: m.update({EXPERT: "/x/a.safetensors"})), [EXPERT, "'/x/a.safetensors'"]),
    "path down": (lambda f: edit_index(f, lambda m: m.update({EXPERT: "training/optimizer.safetensors"})), [EXPERT, "of the same folder"]),
    "placed elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({EXPERT: m["model.embed_tokens.weight"]})), [EXPERT, "model-00001"],
    ),
    "placed and not there": (lambda f: edit_index(f, lambda m: m.update(more=m[EXPERT])), ["'more'", "does not hold it"]),
    "two sets of weights": (lambda f: shutil.copy(shard_of(f, EXPERT), f / "model.safetensors"), ["holds both"]),
    "foreign quantisation": (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), ["quantization_config", "fp8", "bf16"]),
    "int8 by config alone": (
        lambda f: edit_config(f, quantization_config={"quant_method": "dsv2-int8-rows"}), ["lacks tensor", "weight_scale"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "config of another family": (lambda f: edit_config(f, model_type="llama"), ["'llama'", "deepseek_v2"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_named(kind: str, folder: Path) -> None:
    damage, words = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_a_file_cut_between_opening_and_reading_is_no_crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped memory beyond the end of a file would kill the process."""
    from dsv2.checkpoint import huggingface

    real = huggingface.open_folder

    def open_then_cut(path: Path) -> object:
        opened = real(path)
        with shard_of(path, EXPERT).open("r+b") as file:
            file.truncate(100)
        return opened

    monkeypatch.setattr(huggingface, "open_folder", open_then_cut)
    with pytest.raises(CheckpointError, match="was cut while it was read"):
        load_model(folder)
