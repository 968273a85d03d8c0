"""Thousands of damaged folders: each is refused with a CheckpointError, or holds exactly what the safetensors library says it holds."""

import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import files_of, write_tiny
from safetensors import safe_open

from dsv2.checkpoint.folder import open_folder
from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.source import ModelSource
from dsv2.errors import CheckpointError
from dsv2.model.config import ModelConfig

FOLDERS = 2_000
SECONDS = 10  # more than any load here takes, on any machine: only a hang reaches it

BASES: dict[str, dict[str, Any]] = {
    "single": {"name": "lite", "dtype": torch.float32},
    "shards": {"name": "v2", "dtype": torch.bfloat16, "max_shard_bytes": 12_000},
    "int8": {"name": "v2", "dtype": torch.int8, "max_shard_bytes": 9_000},
    "manifest": {"name": "v2", "dtype": torch.bfloat16, "max_shard_bytes": 12_000, "manifest": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_tiny(root / name, **options) for name, options in BASES.items()}


# The ways to damage a folder. Each takes the folder and a generator, and changes something. ------------------------------------------

Damage = Callable[[Path, random.Random], None]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_parts(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_parts(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def any_file(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(file for file in folder.iterdir() if file.is_file()))


def remove(folder: Path, dice: random.Random) -> None:
    any_file(folder, dice).unlink()


def truncate(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))


def append(folder: Path, dice: random.Random) -> None:
    with any_file(folder, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 40)))


def flip_bytes(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    raw = bytearray(file.read_bytes())
    window = dice.choice([16, 2000, len(raw)])
    for _ in range(dice.choice([1, 1, 3, 30])):
        raw[dice.randrange(min(window, len(raw)))] = dice.randrange(256)
    file.write_bytes(raw)


def header_length(folder: Path, dice: random.Random) -> None:
    file = dice.choice(shards(folder))
    raw = file.read_bytes()
    length = dice.choice([0, 1, 7, len(raw), len(raw) - 8, 10**8, 10**8 + 1, 2**63, 2**64 - 1, dice.randrange(2**20)])
    file.write_bytes(struct.pack("<Q", length) + raw[8:])


def header_text(folder: Path, dice: random.Random) -> None:
    file = dice.choice(shards(folder))
    header, data = read_parts(file)
    text = json.dumps(header)
    first = json.dumps(next(name for name in header if name != "__metadata__"))
    bad = dice.choice([
        b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"null", b"[]", b"1" * 5000, b"{}",
        b'{"__metadata__": {"a": 1}}', b'{"__metadata__": []}',
        text.replace("{", "{" + first + ": " + json.dumps(next(v for k, v in header.items() if k != "__metadata__")) + ", ", 1).encode(),
        text.replace("0,", "NaN,", 1).encode(), text.replace("[", "[1e400, ", 1).encode(), text.encode() + b"\0" * 8,
    ])  # fmt: skip
    write_parts(file, bad, data)


def entry(folder: Path, dice: random.Random) -> None:
    """Lie about one tensor."""
    file = dice.choice(shards(folder))
    header, data = read_parts(file)
    name = dice.choice([key for key in header if key != "__metadata__"])
    value = header[name]
    begin, end = value["data_offsets"]
    kind = dice.randrange(12)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[dice.choice([name + "x", "", "model.layers.99.mlp.gate.weight", "../" + name, "\ud800", "lm_head.bias"])] = header.pop(name)
    elif kind == 2:
        value["dtype"] = dice.choice(["F16", "BF16", "F32", "F64", "I8", "U8", "I64", "F8_E4M3", "BOOL", "float32", "", None, 7, ["F32"]])
    elif kind == 3:
        value["shape"] = dice.choice(
            [value["shape"][::-1], [*value["shape"], 1], [], [0], [-1, -8], [2**62, 4], [10**400], "8", None, [1.0], [True], [2] * 100]
        )
    elif kind == 4:
        value["data_offsets"] = dice.choice(
            [
                [begin, end + 2],
                [begin + 2, end + 2],
                [end, begin],
                [-4, end],
                [0, 0],
                [begin],
                [begin, end, end],
                None,
                [2**63, 2**63 + 4],
                "0",
            ]
        )
    elif kind == 5:
        value[dice.choice(["extra", "dtype2"])] = 1
    elif kind == 6:
        del value[dice.choice(sorted(value))]
    elif kind == 7:
        header[name] = dice.choice([None, [], 3, "x", {}])
    elif kind == 8:  # two tensors change places
        other = dice.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == 9:  # one tensor's bytes are used twice
        other = dice.choice([key for key in header if key != "__metadata__"])
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 10:  # bytes that belong to nobody
        data += b"\0" * dice.randint(1, 64)
    else:  # all of the file in the other 16-bit kind
        for key, found in header.items():
            if key != "__metadata__" and found["dtype"] == "BF16":
                found["dtype"] = "F16"
    write_parts(file, header, data)


def index(folder: Path, dice: random.Random) -> None:
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        file.write_text(dice.choice(["{}", '{"weight_map": {"a": "model.safetensors"}}', ""]))
        return
    content = json.loads(file.read_text())
    placed = content["weight_map"]
    name = dice.choice(sorted(placed))
    files = [shard.name for shard in shards(folder)]
    kind = dice.randrange(6)
    if kind == 0:
        placed[name] = dice.choice([
            "../" + placed[name], "/etc/passwd", str(folder / placed[name]), "./" + placed[name], "..", "", ".", "a\0b.safetensors", "nul",
            "C:\\x.safetensors", "x.safetensors", "config.json", "~/x.safetensors", None, 7, [placed[name]], {}, "a/../" + placed[name],
        ])  # fmt: skip
    elif kind == 1:
        placed[name] = dice.choice(files)
    elif kind == 2:
        del placed[name]
    elif kind == 3:
        placed[dice.choice(["more.weight", "", "model.layers.7.mlp.gate.weight"])] = dice.choice(files)
    elif kind == 4:
        content["weight_map"] = dice.choice([{}, [], None, "x", [["a", "b"]]])
    else:
        content = dice.choice([[], {}, None, {"weight_map": dict.fromkeys(placed, files[0])}])
    file.write_text(json.dumps(content))


def config(folder: Path, dice: random.Random) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    name = dice.choice(sorted(content))
    value = content[name]
    kind = dice.randrange(5)
    if kind == 0:
        del content[name]
    elif kind == 1:
        content[name] = dice.choice(
            [None, "x", [], {}, True, -1, 0, 1, 10**9, 10**30, 10**400, 0.5, float("nan"), float("inf"), [1], {"a": 1}]
        )
    elif kind == 2 and isinstance(value, int | float):
        content[name] = value * 2 if dice.random() < 0.5 else value + 1
    elif kind == 3:
        name = dice.choice(["quantization_config", "rope_scaling", "rope_parameters", "unknown", "auto_map", "torch_dtype", "dtype"])
        content[name] = dice.choice(
            [None, {}, {"quant_method": "fp8"}, {"quant_method": "dsv2-int8-rows"}, {"type": "yarn"}, {"type": []}, "float16", "float32", 3,
             {"type": "yarn", "factor": 10**400, "original_max_position_embeddings": 4096}, {"AutoModel": "evil.py--Evil"}]
        )  # fmt: skip
    else:
        content = dice.choice([[], None, "x", {}, {"model_type": "llama"}, {**content, "model_type": ["deepseek_v2"]}])
    file.write_text(json.dumps(content))


def layout(folder: Path, dice: random.Random) -> None:
    """Files of another kind, in another place, or of another model."""
    file = any_file(folder, dice)
    kind = dice.randrange(8)
    if kind == 0:
        other = any_file(folder, dice)
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == 1:
        file.rename(folder / ("_" + file.name))
    elif kind in (2, 3):
        file.unlink()
        (os.mkfifo if kind == 2 else os.mkdir)(file)
    elif kind == 4:
        file.unlink()
        file.symlink_to(dice.choice(["/dev/zero", "/dev/null", file.name, "/nowhere", "/"]))
    elif kind == 5:
        (folder / "model.safetensors").write_bytes(shards(folder)[0].read_bytes())
    elif kind == 6:
        for shard in shards(folder):
            shard.rename(shard.with_suffix(".bin"))
    else:
        shutil.copyfile(dice.choice(shards(folder)), folder / "model-99999-of-99999.safetensors")


DAMAGES: list[Damage] = [
    remove,
    truncate,
    append,
    flip_bytes,
    header_length,
    header_text,
    entry,
    entry,
    entry,
    index,
    index,
    config,
    config,
    layout,
]


# What must hold ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def no_hang() -> Iterator[None]:
    def fail(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def according_to_the_library(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder's files hold, by another implementation; raises where it refuses them."""
    single = folder / "model.safetensors"
    files = (
        [single]
        if single.exists()
        else sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    )
    found = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def check(folder: Path, base: Path) -> bool:
    """Load a damaged folder; return whether it was refused."""
    with no_hang():
        try:
            opened = open_folder(folder)
            model = load_model(folder, dtype=None if opened.quantised else torch.float32)
        except CheckpointError as error:
            assert str(folder) in str(error) or "tensor" in str(error), f"names neither file nor tensor: {error}"
            return True
    stated = json.loads((folder / "config.json").read_text())
    stated.pop("quantization_config", None)
    assert model.config == ModelConfig.from_dict(stated)
    source, truth = ModelSource(model), according_to_the_library(folder)
    assert source.specs.keys() == truth.keys()
    for name, tensor in truth.items():
        read = source.read(name)
        assert torch.equal(read, tensor.to(read.dtype)) or not tensor.float().isfinite().all(), name
    if (base / "manifest.json").exists() and (folder / "manifest.json").is_file():
        was, now = files_of(base), files_of(folder)
        assert all(was[name] == now[name] for name in was if name.endswith(".safetensors") or name == "config.json"), (
            "damage under a manifest"
        )
    return False


def damaged(number: int, base: Path, folder: Path) -> bool:
    dice = random.Random(number)
    shutil.copytree(base, folder)
    for damage in dice.choices(DAMAGES, k=dice.choice([1, 1, 1, 2])):
        if not shards(folder) or not all(file.is_file() for file in (folder / "config.json", *shards(folder))):
            break
        try:
            damage(folder, dice)
        except (ValueError, LookupError, TypeError, StopIteration, AttributeError):
            break  # the first damage left nothing that the second can read
    try:
        return check(folder, base)
    except BaseException:
        print(f"folder number {number} of base {base.name}")
        raise
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("base", BASES)
def test_damage_is_refused_or_harmless(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    count = FOLDERS // len(BASES)
    refused = sum(damaged(number, bases[base], tmp_path / "damaged") for number in range(count))
    assert refused > 0.7 * count, f"only {refused} of {count} were refused: the damage does none"
