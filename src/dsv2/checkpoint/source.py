"""Weights under their published names, one tensor at a time, whatever they come from: a folder, a model, an average, a random stream.

Everything that reads weights takes a ``Source``: building a model, writing a folder, exporting GGUF. So no model has to fit in memory to be
converted, and none is ever held twice.
"""

import hashlib
import math
import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dsv2.checkpoint.folder import ModelFolder, expected_shapes
from dsv2.checkpoint.names import SCALE, is_quantised, place_of
from dsv2.checkpoint.shard import ShardWriter, TensorEntry, TensorSpec, read_header
from dsv2.errors import CheckpointError, ConfigError
from dsv2.kernels.quantize import dequantize_rows, quantize_rows
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@runtime_checkable
class Source(Protocol):
    """Where weights come from."""

    @property
    def config(self) -> ModelConfig:
        """The model that the weights belong to."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor by published name, layer by layer; an int8 weight is followed by its scale."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; it may be a view that is valid until the next call."""
        ...


def is_int8(source: Source) -> bool:
    """Tell whether a source holds its matrices as int8 rows."""
    return any(spec.dtype == "I8" for spec in source.specs.values())


class FolderSource:
    """The tensors of a model folder, memory-mapped; pages are given back as soon as the next tensor is read."""

    def __init__(self, folder: ModelFolder) -> None:
        self.config = folder.config
        self.specs = {name: entry.spec for name, entry in folder.entries.items()}
        self._folder, self._entries = folder, folder.entries
        self._maps: dict[Path, mmap.mmap] = {}
        self._last: TensorEntry | None = None

    def read(self, name: str) -> Tensor:
        """Return a view of the file's pages."""
        entry = self._entries[name]
        pages = self._pages(entry)
        if self._last is not None:
            self._give_back(self._last)
        self._last = entry
        values = _view(pages, entry)
        if self._folder.quantised and name.endswith(SCALE) and not (torch.isfinite(values).all() and (values > 0).all()):
            raise CheckpointError(f"{entry.file}: tensor {name!r} holds scales that are not finite and above 0")
        return values

    def _pages(self, entry: TensorEntry) -> mmap.mmap:
        if entry.file not in self._maps:
            try:
                with entry.file.open("rb") as file:
                    self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{entry.file} cannot be mapped: {error}") from error
        pages = self._maps[entry.file]
        if os.stat(entry.file).st_size < entry.end:  # read beyond the end, mapped memory kills the process
            raise CheckpointError(f"{entry.file} was cut while it was read, before the end of tensor {entry.name!r}")
        return pages

    def _give_back(self, entry: TensorEntry) -> None:
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[entry.file].madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _view(pages: mmap.mmap, entry: TensorEntry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes to it
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin)
    if entry.begin % dtype.itemsize:  # a file of another writer: its values lie between two addresses for them
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are no model's weights, such as moments, to one file, sorted by name."""
    with ShardWriter(file, {name: _spec(tensor) for name, tensor in sorted(tensors.items())}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, raw_bytes(tensor))


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file into memory.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    entries = _entries(file)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        return {name: _view(pages, entry).clone() for name, entry in entries.items()}


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a file as its mapped pages, which the system reads when they are used and may drop afterwards.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    entries = _entries(file)
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # closed when its last tensor goes
    return {name: _view(pages, entry) for name, entry in entries.items()}


def _entries(file: Path) -> Mapping[str, TensorEntry]:
    entries = read_header(file)
    for entry in entries.values():
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {entry.name!r} has dtype {entry.dtype}; allowed: {', '.join(DTYPES)}")
    return entries


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes, without a copy where it is contiguous and in the CPU's memory."""
    values: memoryview = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return values


class ModelSource:
    """The weights of a model in memory, as views."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self._state = model.state_dict()
        quantised = any(tensor.dtype == torch.int8 for tensor in self._state.values())
        names = [name for name, _ in expected_shapes(model.config, quantised, model.head)]
        self.specs = {name: _spec(locate(self._state, name)) for name in names}

    def read(self, name: str) -> Tensor:
        """Return the model's own memory."""
        return locate(self._state, name).cpu()


def _spec(tensor: Tensor) -> TensorSpec:
    if tensor.dtype not in CODES:
        raise ConfigError(f"weights of dtype {tensor.dtype} cannot be stored; allowed: {', '.join(map(str, CODES))}")
    return TensorSpec(CODES[tensor.dtype], tuple(tensor.shape))


def locate(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the part of a model's state, as a view, that a published tensor corresponds to."""
    place = place_of(name)
    tensor = state[place.name]
    if place.expert is not None:
        tensor = tensor[place.expert]
    return tensor if place.half is None else tensor.chunk(2, dim=0)[place.half]


class RandomSource:
    """Weights N(0, initializer_range), norms 1, made as they are read: for measuring at sizes that no disk here holds.

    Every tensor is cut out of one pool of random numbers, at a place that its name and the seed decide.
    """

    _POOL = 1 << 24

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.config = config
        self.specs = {name: TensorSpec(CODES[dtype], shape) for name, shape in expected_shapes(config, quantised=False)}
        pool = (torch.randn(self._POOL, generator=torch.Generator().manual_seed(seed)) * config.initializer_range).to(dtype)
        self._pool, self._seed = torch.cat((pool, pool)), seed  # twice, so that a tensor may begin anywhere in the first

    def read(self, name: str) -> Tensor:
        """Return the tensor's values."""
        shape = self.specs[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._pool.dtype)
        count = shape[0] * shape[1]
        start = int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8], "little") % self._POOL
        values = self._pool[start : start + self._POOL]
        return (values if count <= self._POOL else values.repeat(-(-count // self._POOL)))[:count].view(shape)


class AverageSource:
    """The weighted mean of several models of one shape, formed in fp32, in the dtype of the first.

    Ours: how DeepSeek merged V2-Chat-0628 and Coder-V2-0724 into V2.5 is not public (spec 9.2).

    Raises:
        ConfigError: the weights do not sum to 1, the models differ in shape or function, or one is int8.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        if len(sources) != len(weights) or not abs(sum(weights) - 1) <= 1e-6 or not all(map(math.isfinite, weights)):
            raise ConfigError(f"{len(sources)} models take as many weights with the sum 1; got {list(weights)}")
        self.config, self._sources, self._weights = sources[0].config, sources, weights
        for source in sources:
            _require_same_model(self.config, source.config)
            if is_int8(source):
                raise ConfigError("int8 weights are not averaged: their rounding would be", hint="merge the models first, then convert")
        self.specs = sources[0].specs

    def read(self, name: str) -> Tensor:
        """Return the mean of this tensor."""
        mean = self._sources[0].read(name).float() * self._weights[0]
        for source, weight in zip(self._sources[1:], self._weights[1:], strict=True):
            mean.add_(source.read(name).float(), alpha=weight)
        return mean.to(DTYPES[self.specs[name].dtype])


def _require_same_model(first: ModelConfig, other: ModelConfig) -> None:
    for name in ModelConfig.model_fields:
        if name not in ("aux_loss_alpha", "initializer_range") and getattr(first, name) != getattr(other, name):
            raise ConfigError(f"the models differ in {name}: {getattr(first, name)!r} and {getattr(other, name)!r}; a mean needs one shape")


class Converted:
    """A source in another dtype: cast, quantised to int8 rows, or back from them.

    Args:
        source: where the weights come from.
        dtype: a floating dtype, of every tensor; or torch.int8, of the matrices: norms, router, embedding and kv_b_proj then keep theirs.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.config, self._source, self._dtype = source.config, source, dtype
        self._from_int8, self._to_int8 = is_int8(source), dtype == torch.int8
        self._scale: tuple[str, Tensor] | None = None
        if self._from_int8 == self._to_int8 and self._to_int8:
            self.specs = source.specs
        else:
            shapes = expected_shapes(source.config, self._to_int8)
            self.specs = {name: TensorSpec(self._code(name), shape) for name, shape in shapes}

    def _code(self, name: str) -> str:
        if not self._to_int8:
            return CODES[self._dtype]
        if name.endswith(SCALE):
            return "F32"
        return "I8" if is_quantised(name) else self._source.specs[name].dtype

    def read(self, name: str) -> Tensor:
        """Return the tensor in its new dtype."""
        if self._to_int8 and not self._from_int8:
            return self._quantised(name)
        if self._from_int8 and not self._to_int8 and is_quantised(name):
            values = self._source.read(name).clone()  # a view is valid until the next read only
            return dequantize_rows(values, self._source.read(name + SCALE), self._dtype)
        return self._cast(name)

    def _cast(self, name: str) -> Tensor:
        values, dtype = self._source.read(name), DTYPES[self.specs[name].dtype]
        cast = values.to(dtype)
        if dtype in (values.dtype, torch.float32) or torch.isfinite(cast.abs().amax()):
            return cast
        largest = values.abs().amax().item()
        if math.isfinite(largest):
            raise CheckpointError(
                f"tensor {name!r} holds values up to {largest:.3g}; {dtype} ends at {torch.finfo(dtype).max:.3g}",
                hint="keep fp32, or choose bf16 instead of fp16",
            )
        return cast

    def _quantised(self, name: str) -> Tensor:
        weight_name = name.removesuffix(SCALE)
        if not is_quantised(weight_name):
            return self._source.read(name)
        if name.endswith(SCALE) and self._scale is not None and self._scale[0] == weight_name:
            return self._scale[1]  # the weight was read just before
        try:
            values, scales = quantize_rows(self._source.read(weight_name))
        except ValueError as error:
            raise CheckpointError(f"tensor {weight_name!r} cannot be int8: {error}") from error
        self._scale = weight_name, scales
        return scales if name.endswith(SCALE) else values
