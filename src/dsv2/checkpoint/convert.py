"""``dsv2 convert``: a model from one form to another, streaming; and the average of several."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import torch

from dsv2.checkpoint.folder import open_folder, read_json
from dsv2.checkpoint.generation import write_generation_config
from dsv2.checkpoint.huggingface import MAX_SHARD_BYTES, plan_shards, write_model
from dsv2.checkpoint.manifest import MANIFEST, verify_manifest, write_manifest
from dsv2.checkpoint.source import AverageSource, Converted, FolderSource, RandomSource, Source
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import CheckpointError, ConfigError, Dsv2Error
from dsv2.files import atomic_folder, require_replaceable
from dsv2.machine import peak_memory, require_disk
from dsv2.presets import preset
from dsv2.progress import console, table
from dsv2.tokenizer.recognise import template_text
from dsv2.tokenizer.tokenizer import Tokenizer

Form = Literal["hf", "gguf"]
RANDOM = "random:"  # in front of a preset's name: weights made up as they are written
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
GGUF_KINDS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0", "q4_0": "q4_0"}
_SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Input:
    """One model to read.

    Args:
        label: what the user called it.
        source: its weights.
        folder: that it lies in; None for random weights.
    """

    label: str
    source: Source
    folder: Path | None


def run(
    targets: Sequence[str],
    *,
    out: Path,
    to: Form | None = None,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    max_shard_gb: float = MAX_SHARD_BYTES / 1e9,
) -> None:
    """Write a model in another form; several, after the word ``merge``, become their weighted average.

    Args:
        targets: one folder, run, model id or ``random:PRESET``; or "merge" and two or more of them.
        out: folder, or .gguf file, to write.
        to: form of the result; None: gguf where ``out`` ends in .gguf, else hf.
        dtype: of the result; None: as it is (gguf: bf16).
        weights: of the average; None: equal ones.
        max_shard_gb: largest file of a folder, 1e9 bytes.

    Raises:
        ConfigError: options that do not fit together.
        CheckpointError: a model that cannot be read.
        DataError: too little disk, or ``out`` holds something else.
    """
    started = monotonic()
    merging = targets[0] == "merge" and len(targets) > 1
    inputs = [open_input(target) for target in (targets[1:] if merging else targets)]
    _require_free_place(out, inputs)
    source = _one_source(inputs, merging, weights)
    form: Form = to or ("gguf" if out.suffix == ".gguf" else "hf")
    if form == "gguf":
        written = _to_gguf(source, _with_tokenizer(inputs), out, dtype or "bf16")
    else:
        written = _to_folder(source, _with_tokenizer(inputs), out, dtype, max_shard_gb)
    seconds = monotonic() - started
    console().print(
        f"{out}: {written / 1e9:.2f} GB in {seconds:.1f} s ({written / 1e9 / seconds:.2f} GB/s), peak memory {peak_memory() / 1e9:.2f} GB",
        markup=False,
        soft_wrap=True,
    )


def _require_free_place(out: Path, inputs: Sequence[Input]) -> None:
    """Refuse, before any work, to write over a model that is read, a run's own checkpoint, or somebody's files."""
    place = out.resolve()
    for one in inputs:
        folder = None if one.folder is None else one.folder.resolve()
        if folder is not None and (folder == place or folder.is_relative_to(place) or (place.parent == folder and place.exists())):
            raise ConfigError(f"{out} is the model to read, or a part of it", hint="choose another path with --out")
    if (out / "training").exists():
        raise ConfigError(f"{out} is a run's own checkpoint; its training/ would be lost", hint="choose another folder with --out")
    require_replaceable(out)
    if out.is_file():
        with out.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigError(f"{out} exists and is no GGUF file", hint="choose another path with --out")


def open_input(target: str) -> Input:
    """Open what a user names as a model; hashes of a manifest are compared.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: no preset has this name.
    """
    if target.startswith(RANDOM):
        return Input(target, RandomSource(preset(target.removeprefix(RANDOM))), None)
    folder = latest_checkpoint(target)
    opened = open_folder(folder)
    source = FolderSource(opened)
    if (folder / MANIFEST).exists():
        side_files = [name for name in _SIDE_FILES if (folder / name).exists()]
        verify_manifest(folder, ["config.json", *(file.name for file in opened.files), *side_files])
    return Input(target, source, folder)


def _one_source(inputs: Sequence[Input], merging: bool, weights: Sequence[float] | None) -> Source:
    if not merging:
        if len(inputs) > 1:
            raise ConfigError(f"{len(inputs)} models were given", hint="to average them: dsv2 convert merge A B --out DIR")
        if weights is not None:
            raise ConfigError("--weights belong to a merge", hint="dsv2 convert merge A B --weights 0.5,0.5 --out DIR")
        return inputs[0].source
    if len(inputs) < 2:
        raise ConfigError("a merge takes two models or more", hint="dsv2 convert merge A B --out DIR")
    _require_same_tokenizer(inputs)
    return AverageSource([one.source for one in inputs], weights or [1 / len(inputs)] * len(inputs))


def _with_tokenizer(inputs: Sequence[Input]) -> Input:
    """Return the first model that brings a tokenizer, else the first."""
    return next((one for one in inputs if one.folder is not None and (one.folder / "tokenizer.json").is_file()), inputs[0])


def _require_same_tokenizer(inputs: Sequence[Input]) -> None:
    files = [one.folder / "tokenizer.json" for one in inputs if one.folder is not None and (one.folder / "tokenizer.json").is_file()]
    for file in files[1:]:
        if file.read_bytes() != files[0].read_bytes():
            raise ConfigError(f"{files[0]} and {file} differ: the models give other meanings to the same ids, and have no average")


def _to_folder(source: Source, given: Input, out: Path, dtype: str | None, max_shard_gb: float) -> int:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of a model folder; allowed: {', '.join(DTYPES)}")
    if not 0 < max_shard_gb < 1e6:
        raise ConfigError(f"--max-shard-gb = {max_shard_gb} must be above 0 and below a million")
    if dtype is not None:
        source = Converted(source, DTYPES[dtype])
    max_shard_bytes = round(max_shard_gb * 1e9)
    total = sum(spec.num_bytes for spec in source.specs.values())
    shards = plan_shards(source.specs, max_shard_bytes)
    _print_plan(source, given, f"{len(shards):,} safetensors files in {out}", total)
    require_disk(total, out)
    with atomic_folder(out) as new:
        write_model(new, source, max_shard_bytes=max_shard_bytes)
        copy_side_files(given, new)
        if not (new / "generation_config.json").exists():
            write_generation_config(new, source.config)
        write_manifest(new)
    return total


def _to_gguf(source: Source, given: Input, out: Path, dtype: str) -> int:
    from dsv2.checkpoint.gguf import export_gguf  # an optional extra

    if dtype not in GGUF_KINDS:
        raise ConfigError(f"dtype {dtype!r} is not one of a GGUF file; allowed: {', '.join(GGUF_KINDS)}")
    tokenizer = None
    if given.folder is not None and os.path.lexists(given.folder / "tokenizer.json"):
        tokenizer = Tokenizer.load(given.folder)
    elif given.folder is not None:
        console().print(f"WARNING: {given.folder} holds no tokenizer.json: the file gets a vocabulary of single bytes", markup=False)
    total = sum(spec.num_bytes for spec in source.specs.values())
    _print_plan(source, given, f"{GGUF_KINDS[dtype]} in {out}", total)
    export_gguf(source, out, kind=GGUF_KINDS[dtype], tokenizer=tokenizer, name=Path(given.label).name.encode(errors="replace").decode())  # type: ignore[arg-type]
    return out.stat().st_size


def copy_side_files(given: Input, new: Path) -> None:
    """Copy tokenizer, chat template and generation settings as they are; what should be JSON is looked at first, nothing is executed."""
    if given.folder is None:
        return
    home = (given.folder / "config.json").resolve().parent  # links of the hub's cache, or of a user, all lead to one folder
    for name in _SIDE_FILES:
        file = given.folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file() or file.resolve().parent != home:
            raise CheckpointError(f"{file} leads to {file.resolve()}; only a file beside config.json is copied")
        if file.suffix == ".json":
            read_json(file)
        else:
            template_text(given.folder, {})  # not too large
        shutil.copyfile(file, new / name)
    if (new / "tokenizer.json").exists():
        _try_tokenizer(new)


def _try_tokenizer(folder: Path) -> None:
    try:
        Tokenizer.load(folder)
    except Dsv2Error as error:
        console().print(f"WARNING: the tokenizer was copied as it is, but cannot be used: {error.message}", markup=False, soft_wrap=True)


def _print_plan(source: Source, given: Input, result: str, total: int) -> None:
    dtypes = sorted({spec.dtype for spec in source.specs.values()})
    rows = [
        ("read", f"{given.label}{'' if given.folder is None or str(given.folder) == given.label else f' ({given.folder})'}"),
        ("weights", f"{len(source.specs):,} tensors, {', '.join(dtypes)}, {total / 1e9:.2f} GB"),
        ("write", result),
    ]
    table("plan", ("what", "value"), rows)
