"""A packed model in memory: read into huge pages by several threads, or mapped where memory is short.

Two threads read twice as fast from 2 MiB pages as from the 4 KiB pages of a mapped file (docs/benchmarks.md), and decoding is reading; so
the file is copied once at the start.
"""

import ctypes
import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

from dsv2.checkpoint.folder import read_json
from dsv2.checkpoint.identity import weights_id
from dsv2.checkpoint.manifest import MANIFEST, listed_hashes, require_hash, verify_manifest
from dsv2.checkpoint.shard import TensorEntry, read_header
from dsv2.engine.layout import FILE, METHOD, SCHEMES, Scheme, Slot, expert_stride, slots
from dsv2.engine.native import StackWeights
from dsv2.errors import CheckpointError
from dsv2.kernels.cpu.library import VECTORS, Layer, Matrix, Vector
from dsv2.kernels.cpu.memory import HugeMemory
from dsv2.machine import available_memory
from dsv2.model.config import ModelConfig
from dsv2.progress import transfer_bar

Placement = Literal["memory", "mapped"]
_READ = 16 << 20  # bytes of one read
_HEADROOM = 600 << 20  # bytes of the process beside weights and cache
READERS = 2  # threads


def packed_scheme(folder: Path) -> Scheme | None:
    """Return the scheme of a packed folder; None where the folder is not packed."""
    if not (folder / FILE).is_file():
        return None
    stated = read_json(folder / "config.json").get("quantization_config") or {}
    scheme = stated.get("scheme")
    if stated.get("quant_method") != METHOD or scheme not in SCHEMES:
        raise CheckpointError(f"{folder / 'config.json'}: scheme {scheme!r} is not one of: {', '.join(get_args(Scheme))}")
    chosen: Scheme = scheme
    return chosen


def load_packed(folder: Path, *, placement: Placement | None = None, verify: bool = False) -> StackWeights:
    """Load a packed folder.

    Args:
        folder: as ``dsv2 quantize`` writes it.
        placement: "memory": copied into huge pages; "mapped": left in the file's pages; None: memory where it fits.
        verify: compare the file's hash with the manifest's, while it is read into memory; before it is mapped.

    Raises:
        CheckpointError: a file is missing or damaged, or is not what its config says; or there is no hash to compare with.
    """
    scheme = packed_scheme(folder)
    if scheme is None:
        raise CheckpointError(f"{folder} holds no {FILE}", hint=f"pack the model first: dsv2 quantize {folder} --out DIR")
    fields = read_json(folder / "config.json")
    config = ModelConfig.from_dict(
        {name: value for name, value in fields.items() if name != "quantization_config"}, source=str(folder / "config.json")
    )
    if verify or (folder / MANIFEST).exists():
        verify_manifest(folder, ["config.json"])
    listed = listed_hashes(folder, [FILE])[FILE] if verify else None
    entries = read_header(folder / FILE)
    wanted = list(slots(config, scheme))
    _require_same(folder / FILE, entries, wanted)
    size = (folder / FILE).stat().st_size
    if placement is None:
        free = available_memory()
        placement = "memory" if free is None or size + _HEADROOM <= free else "mapped"
    if placement == "mapped" and verify:
        verify_manifest(folder, [FILE])
    place = _Mapped(folder / FILE) if placement == "mapped" else _Arena(entries, folder / FILE, listed)
    weights = _described(config, wanted, entries, place)
    weights.weights_id = weights_id(folder)
    return weights


def _require_same(file: Path, entries: dict[str, TensorEntry], wanted: list[Slot]) -> None:
    expected = {name: spec for slot in wanted for name, spec in slot.specs().items()}
    for name in expected.keys() | entries.keys():
        found = entries[name].spec if name in entries else None
        if found != expected.get(name):
            raise CheckpointError(
                f"{file}: tensor {name!r} is {found}; config.json asks for {expected.get(name)}", hint="pack the model again"
            )


class _Mapped:
    """The file's own pages."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            self._pages = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def address(self, entry: TensorEntry) -> int:
        """Return where a tensor's bytes begin."""
        return self._base + entry.begin


class _Arena:
    """Anonymous memory in huge pages; every tensor begins at a multiple of 64 bytes.

    Args:
        entries: of the file's header.
        file: that is read.
        listed: SHA-256 that the whole file must have; None: it is not looked at.

    Raises:
        CheckpointError: it has another, or was cut.
    """

    def __init__(self, entries: dict[str, TensorEntry], file: Path, listed: str | None) -> None:
        self._offsets: dict[str, int] = {}
        end = 0
        for entry in sorted(entries.values(), key=lambda entry: entry.begin):
            self._offsets[entry.name] = end
            end += -(-(entry.end - entry.begin) // 64) * 64
        self._memory = HugeMemory(end)
        self._read(entries, file, listed)

    def _read(self, entries: dict[str, TensorEntry], file: Path, listed: str | None) -> None:
        memory, pieces = self._memory.view(), list(self._pieces(entries))
        total = sum(end - begin for begin, end, _ in pieces)
        handle = os.open(file, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(READERS) as threads, transfer_bar(total, "reading weights") as advance:
                read = threads.map(lambda piece: _read_piece(handle, memory, *piece), pieces)
                digest = hashlib.sha256(os.pread(handle, pieces[0][0], 0))  # the header; the tensors follow it without a gap
                for (_, _, to), count in zip(pieces, read, strict=True):
                    if listed is not None:  # in the order of the file, while the threads read on
                        digest.update(memory[to : to + count])
                    advance(count)
        except EOFError as error:
            raise CheckpointError(f"{file} was cut while it was read") from error
        finally:
            os.close(handle)
        if listed is not None:
            require_hash(file, digest.hexdigest(), listed)

    def _pieces(self, entries: dict[str, TensorEntry]) -> Iterator[tuple[int, int, int]]:
        for name, offset in self._offsets.items():
            entry = entries[name]
            for begin in range(entry.begin, entry.end, _READ):
                yield begin, min(entry.end, begin + _READ), offset + begin - entry.begin

    def address(self, entry: TensorEntry) -> int:
        """Return where a tensor's bytes begin."""
        return self._memory.address + self._offsets[entry.name]


def _read_piece(handle: int, memory: memoryview, begin: int, end: int, to: int) -> int:
    done = 0
    while begin + done < end:
        count = os.preadv(handle, [memory[to + done : to + end - begin]], begin + done)
        if count == 0:
            raise EOFError
        done += count
    return done


def _described(config: ModelConfig, wanted: list[Slot], entries: dict[str, TensorEntry], place: _Arena | _Mapped) -> StackWeights:
    layers = [Layer() for _ in range(config.num_hidden_layers)]
    outside: dict[str, Matrix | Vector] = {}
    for slot in wanted:
        described: Matrix | Vector
        field = slot.name.rpartition(".")[2]
        if field in VECTORS or field == "final_norm":
            described = Vector(slot.type, slot.cols, place.address(entries[slot.name]))
        elif slot.quantised:
            data, scales = (place.address(entries[f"{slot.name}.{part}"]) for part in ("data", "scales"))
            described = Matrix(slot.type, slot.rows, slot.cols, 0, data, scales)
        else:
            described = Matrix(slot.type, slot.rows, slot.cols, 0, place.address(entries[slot.name]), None)
        if field == slot.name:
            outside[field] = described
            continue
        layer = layers[int(slot.name.split(".")[1])]
        setattr(layer, field, described)
        if field == "expert_down":
            layer.expert_width, layer.expert_stride = config.moe_intermediate_size or 0, expert_stride(config, slot.type)
    embedding = outside["embedding"]
    return StackWeights(config, layers, outside["final_norm"], embedding, outside.get("head", embedding), [place])  # type: ignore[arg-type]
