"""One safetensors file: its header read with suspicion, and a new file written tensor by tensor. Without torch.

Layout: 8 bytes little-endian header length; the header, a JSON object from tensor name to dtype, shape and byte range; then the bytes of
all tensors, without gap. The library of the same name writes whole dictionaries only; a model of 236B parameters is written one tensor
at a time.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dsv2.checkpoint.names import Shape
from dsv2.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}  # the dtypes that a DeepSeek-V2 file of ours may hold
_SIZES = ITEM_BYTES | {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_LENGTH_BYTES = 8
_MAX_AXES = 8


class TensorSpec(NamedTuple):
    """What is known of a tensor without its values.

    Args:
        dtype: as safetensors spells it, such as "BF16".
        shape: ``[out, in]`` for matrices.
    """

    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * _SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file.

    Args:
        name: as published.
        dtype: as safetensors spells it.
        shape: ``[out, in]`` for matrices.
        file: that holds it.
        begin: of its bytes, counted from the start of the file.
        end: one past its last byte.
    """

    name: str
    dtype: str
    shape: Shape
    file: Path
    begin: int
    end: int

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return TensorSpec(self.dtype, self.shape)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file, checked against the file's size: known dtypes, byte ranges that tile the data exactly.

    Raises:
        CheckpointError: the file is missing, cut, or its header lies; names the file and the tensor.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{file} is {'no file' if file.exists() else 'missing'}")
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            header, start = _header(opened, size, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    entries = {name: _entry(name, value, file, start) for name, value in header.items() if name != "__metadata__"}
    _require_tiling(entries.values(), start, size, file)
    return entries


def _header(opened: BinaryIO, size: int, file: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > size:
        limit = min(MAX_HEADER_BYTES, max(size - _LENGTH_BYTES, 0))
        raise _damaged(file, f"its header claims {length:,} bytes; at most {limit:,} are possible in a file of {size:,}")
    try:
        header = json.loads(opened.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not the JSON of a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, f"its header is a {type(header).__name__}, not an object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "the __metadata__ of its header must map text to text")
    return header, _LENGTH_BYTES + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _entry(name: str, value: Any, file: Path, start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _damaged(file, f"tensor {name!r} has dtype {dtype!r}; known: {', '.join(_SIZES)}")
    if not _sizes(shape):
        raise _damaged(file, f"tensor {name!r} has shape {shape!r}; a list of sizes was expected")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, f"tensor {name!r} has data_offsets {offsets!r}; [begin, end] was expected")
    spec = TensorSpec(dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.num_bytes:
        found = offsets[1] - offsets[0]
        raise _damaged(file, f"tensor {name!r} spans {found:,} bytes; {dtype} {list(shape)} takes {spec.num_bytes:,}")
    return TensorEntry(name, dtype, spec.shape, file, start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_AXES and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _require_tiling(entries: Iterable[TensorEntry], start: int, size: int, file: Path) -> None:
    """Refuse overlaps, gaps, and bytes that belong to no tensor."""
    end = start
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            kind = "overlaps the tensor before it" if entry.begin < end else f"leaves a gap of {entry.begin - end:,} bytes before it"
            raise _damaged(file, f"tensor {entry.name!r} {kind}")
        end = entry.end
    if end != size:
        kind = f"it is cut: {end - size:,} bytes are missing" if end > size else f"{size - end:,} bytes at its end belong to no tensor"
        raise _damaged(file, kind)


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {reason}", hint="copy the file again, or use another checkpoint")


class ShardWriter:
    """Write one file tensor by tensor, in any order; memory holds one tensor at a time.

    Wide dtypes come first and the header is padded, so every tensor starts at a multiple of its item size.
    """

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers looks for
        end = 0
        for name, spec in sorted(specs.items(), key=lambda item: -_SIZES[item[1].dtype]):
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.num_bytes]}
            end += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        self._start = _LENGTH_BYTES + len(text)
        self._ranges = {name: header[name]["data_offsets"] for name in specs}
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        self._left = set(specs)

    def write(self, name: str, values: memoryview) -> None:
        """Write a tensor's bytes to its place."""
        begin, end = self._ranges[name]
        assert values.nbytes == end - begin, (name, values.nbytes, end - begin)
        self._file.seek(self._start + begin)
        self._file.write(values)
        self._left.remove(name)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind or not self._left, f"never written: {min(self._left)}"
