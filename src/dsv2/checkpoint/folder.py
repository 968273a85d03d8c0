"""A model folder in the Hugging Face layout, opened without torch and trusted with nothing: config, index, headers, names and shapes.

Opening reads config.json, the index if there is one, and every header; values are not touched. What comes out fits its config tensor for
tensor, or a CheckpointError names what does not.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dsv2.checkpoint.names import SCALE, Shape, is_quantised, published_shapes
from dsv2.checkpoint.shard import ITEM_BYTES, TensorEntry, read_header
from dsv2.errors import CheckpointError, ConfigError
from dsv2.model.config import Head, ModelConfig, head_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INT8 = {"quant_method": "dsv2-int8-rows"}  # config.json's quantization_config of our int8 folders
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch_dtype of config.json
_MAX_JSON_BYTES = 100_000_000  # the index of 29,102 tensors has 3 MB


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk whose tensors are those of its config.

    Args:
        path: the folder.
        config: from config.json.
        entries: every tensor by published name, in the order of ``published_shapes``; int8 weights are followed by their scale.
        quantised: whether it is one of our int8 folders.
        head: what stands on the last hidden state.
    """

    path: Path
    config: ModelConfig
    entries: Mapping[str, TensorEntry]
    quantised: bool
    head: Head = "lm_head"

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({entry.file for entry in self.entries.values()})


def open_folder(path: str | Path, head: Head | None = "lm_head") -> ModelFolder:
    """Open a model folder: one ``model.safetensors``, or shards with an index.

    Args:
        path: the folder.
        head: that the model must have; None: any.

    Raises:
        CheckpointError: a file or tensor is missing, unexpected, damaged, or has another shape or dtype than the config asks for.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder", hint="give the folder that holds config.json and the .safetensors files")
    fields = read_json(path / "config.json")
    quantised = _is_int8(fields, path / "config.json")
    try:
        config = ModelConfig.from_dict(fields, source=str(path / "config.json"))
    except ConfigError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    found = head_of(fields)
    if head not in (None, found):
        kinds = {"lm_head": "a language model", "score": "a reward model"}
        raise CheckpointError(f"{path} holds {kinds[found]}; {kinds[head or found]} is needed here")
    entries = _weights(path)
    # one name more than there are tensors is enough to find a missing one, and an absurd number of layers costs nothing
    expected = dict(islice(expected_shapes(config, quantised, found), len(entries) + 1))
    _require_same_tensors(path, entries, expected)
    stated = fields.get("torch_dtype", fields.get("dtype"))
    _require_dtypes(entries.values(), quantised, _DTYPES.get(str(stated).removeprefix("torch.")))
    return ModelFolder(path, config, {name: entries[name] for name in expected}, quantised, found)


def expected_shapes(config: ModelConfig, quantised: bool, head: Head = "lm_head") -> Iterable[tuple[str, Shape]]:
    """Yield name and shape of every tensor of a folder; in an int8 one the scales of the rows follow their weight."""
    for name, shape in published_shapes(config, head):
        yield name, shape
        if quantised and is_quantised(name):
            yield name + SCALE, shape[:1]


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, not JSON, or holds something else.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{file} is {'no file' if file.exists() else 'missing'}")
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes; at most {_MAX_JSON_BYTES:,} are read")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: a JSON object was expected, found {type(value).__name__}")
    return value


def _is_int8(fields: dict[str, Any], source: Path) -> bool:
    """Take quantization_config out of a config's fields; only our own kind is known."""
    found = fields.pop("quantization_config", None)
    if found not in (None, INT8):
        raise CheckpointError(
            f"{source}: quantization_config = {found!r} is not supported; allowed: none, or {INT8}",
            hint="use the bf16 checkpoint of this model; `dsv2 convert --dtype int8` quantises it",
        )
    return found is not None


def _weights(path: Path) -> dict[str, TensorEntry]:
    """Return all tensors of the folder's weight files."""
    index, single = path / INDEX, path / SINGLE
    if index.exists() and single.exists():
        raise CheckpointError(f"{path} holds both {INDEX} and {SINGLE}", hint="remove the one that does not belong to this model")
    if single.exists():
        return read_header(single)
    if not index.exists():
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"{others[0]} is not read: files that can hold code are refused; use the safetensors files of this model" if others else None
        raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}", hint=hint)
    return _indexed(index)


def _indexed(index: Path) -> dict[str, TensorEntry]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index} is damaged: weight_map must map tensor names to files")
    for name, file_name in placed.items():
        if not _is_plain(file_name):
            raise CheckpointError(f"{index}: tensor {name!r} lies in {file_name!r}; only a .safetensors file of the same folder is read")
    entries: dict[str, TensorEntry] = {}
    for file_name in dict.fromkeys(placed.values()):
        for name, entry in read_header(index.parent / file_name).items():
            if placed.get(name) != file_name:
                seen = placed.get(name, "nowhere")
                raise CheckpointError(f"{entry.file} holds tensor {name!r}, which {index.name} places in {seen!r}")
            entries[name] = entry
    for name, file_name in placed.items():
        if name not in entries:
            raise CheckpointError(f"{index} places tensor {name!r} in {file_name}, which does not hold it")
    return entries


def _is_plain(file_name: Any) -> bool:
    """Tell whether a file name stays inside the folder."""
    plain = isinstance(file_name, str) and file_name.endswith(".safetensors") and file_name.isprintable()
    return plain and len(file_name.encode()) < 256 and not file_name.startswith(".") and not set(file_name) & set("/\\:")


def _require_same_tensors(path: Path, entries: Mapping[str, TensorEntry], expected: Mapping[str, Shape]) -> None:
    missing = next((name for name in expected if name not in entries), None)
    if missing is not None:
        raise CheckpointError(f"{path} lacks tensor {missing!r}, which its config asks for; it holds {len(entries):,} tensors")
    for name, entry in entries.items():
        if name not in expected:
            hint = "config.json and the weights belong to different models"
            raise CheckpointError(f"{entry.file}: tensor {name!r} has no place in this model", hint=hint)
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}; config.json asks for {list(expected[name])}"
            )


def _require_dtypes(entries: Iterable[TensorEntry], quantised: bool, stated: str | None) -> None:
    """Refuse what is no weight, and 16-bit values that may be the other 16-bit kind: read as such they would be silently wrong."""
    half = stated if stated in ("BF16", "F16") else None
    for entry in entries:
        int8 = quantised and is_quantised(entry.name)
        scale = quantised and entry.name.endswith(SCALE)
        allowed = ("I8",) if int8 else ("F32",) if scale else tuple(name for name in ITEM_BYTES if name != "I8")
        if entry.dtype not in allowed:
            raise CheckpointError(f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}; allowed: {', '.join(allowed)}")
        if entry.dtype in ("BF16", "F16"):
            half = half or entry.dtype
            if entry.dtype != half:
                raise CheckpointError(f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}; the rest of the model is {half}")
