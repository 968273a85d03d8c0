"""``dsv2 quantize``: a model into one packed file that the engine reads as it is, streamed matrix by matrix.

Peak memory is the largest stack of a layer's experts, packed, and a few of its matrices: a model larger than memory is packed, too.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from dsv2.checkpoint.convert import copy_side_files, open_input
from dsv2.checkpoint.generation import write_generation_config
from dsv2.checkpoint.manifest import write_manifest
from dsv2.checkpoint.shard import ShardWriter, TensorSpec
from dsv2.checkpoint.source import Converted, Source, is_int8, raw_bytes
from dsv2.engine.layout import FILE, METHOD, Scheme, Slot, expert_stride, padded, slots
from dsv2.errors import CheckpointError
from dsv2.files import atomic_folder, atomic_write_json
from dsv2.kernels.cpu.library import Type, empty_tiles, pack_into
from dsv2.kernels.formats import TILE, dequantize_groups, from_tiles
from dsv2.machine import peak_memory, require_disk
from dsv2.model.config import ModelConfig
from dsv2.progress import console, table, transfer_bar

THREADS = 2  # packing threads; reading is the caller's
TURN = 32  # rows of a gate block, then of an up block (PIECE in kernels/cpu/source/step.cpp)


def run(target: str, *, out: Path, scheme: Scheme = "mixed") -> None:
    """Pack a model.

    Args:
        target: a model folder, run, tour, model id on the hub, or random:PRESET.
        out: folder to write.
        scheme: bits of the weights: 4, mixed (experts 4, everything else 8), 8, bf16 or fp32.

    Raises:
        CheckpointError: the model cannot be read.
        DataError: too little disk, or ``out`` holds something else.
        Unavailable: there is no C++ compiler for the kernels.
    """
    started, given = monotonic(), open_input(target)
    source = given.source
    size = packed_bytes(source.config, scheme)
    bits = 8 * size / sum(_count(spec) for name, spec in source.specs.items() if not name.endswith("_scale"))
    original = sum(spec.num_bytes for spec in source.specs.values())
    table(
        "plan",
        ("what", "value"),
        [("read", f"{given.label}: {original / 1e9:.2f} GB"), ("write", f"{out}: {size / 1e9:.2f} GB, {bits:.2f} bits a weight")],
    )
    require_disk(size, out)
    with atomic_folder(out) as new:
        pack_folder(source, new, scheme)
        copy_side_files(given, new)
        if not (new / "generation_config.json").exists():
            write_generation_config(new, source.config)
        write_manifest(new)
    seconds = monotonic() - started
    console().print(
        f"{out}: {size / 1e9:.2f} GB in {seconds:.1f} s, peak memory {peak_memory() / 1e9:.2f} GB", markup=False, soft_wrap=True
    )


def packed_bytes(config: ModelConfig, scheme: Scheme) -> int:
    """Return the size of a packed file's tensors."""
    return sum(spec.num_bytes for slot in slots(config, scheme) for spec in slot.specs().values())


def _count(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count


def pack_folder(source: Source, folder: Path, scheme: Scheme) -> None:
    """Write config.json and the packed file into a folder that exists."""
    if is_int8(source):
        source = Converted(source, torch.float32)
    all_slots = list(slots(source.config, scheme))
    mark = {"quantization_config": {"quant_method": METHOD, "scheme": scheme}}
    atomic_write_json(folder / "config.json", source.config.to_dict(torch_dtype="float32" if scheme == "fp32" else "bfloat16") | mark)
    specs = {name: spec for slot in all_slots for name, spec in slot.specs().items()}
    total = sum(spec.num_bytes for spec in specs.values())
    with ShardWriter(folder / FILE, specs) as writer, ThreadPoolExecutor(THREADS) as threads, transfer_bar(total, "packing") as advance:
        packer = Packer(source, threads)
        for slot in all_slots:
            for name, values in packer.tensors(slot).items():
                writer.write(name, raw_bytes(values))
                advance(specs[name].num_bytes)


class Packer:
    """Makes the tensors of one slot after the other, in the order of ``layout.slots``."""

    def __init__(self, source: Source, threads: ThreadPoolExecutor) -> None:
        self._source, self._config, self._threads = source, source.config, threads
        self._absorbed: dict[str, tuple[Slot, Tensor, Tensor]] = {}  # of the layer at hand

    def tensors(self, slot: Slot) -> dict[str, Tensor]:
        """Return a slot's tensors by their names in the file."""
        field = slot.name.rpartition(".")[2]
        if slot.quantised:
            data, scales = self._packed(slot, self._parts(slot, field))
            if field in ("key_up", "value_up"):
                self._absorbed[field] = slot, data, scales
            return {f"{slot.name}.data": data, f"{slot.name}.scales": scales}
        if field == "up" and self._absorbed:
            return {slot.name: self._expanded()}
        dtype = torch.float32 if slot.type == Type.F32 else torch.bfloat16
        return {slot.name: torch.cat([self._source.read(name).to(dtype).reshape(-1, slot.cols) for name in slot.sources])}

    def _parts(self, slot: Slot, field: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the matrices that are stacked in a slot, each with its first row."""
        config = self._config
        if field in ("key_up", "value_up"):
            nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
            heads = self._source.read(slot.sources[0]).view(-1, nope + value, latent).clone()
            for head, weight in enumerate(heads.unbind(0)):
                if field == "key_up":
                    yield head * padded(latent, TILE), weight[:nope].t()
                else:
                    yield head * padded(value, TILE), weight[nope:]
            return
        if field == "expert_gate_up":
            yield from self._by_turns(slot)
            return
        for index, name in enumerate(slot.sources):
            yield index * padded(config.hidden_size, TILE), self._source.read(name)

    def _by_turns(self, slot: Slot) -> Iterator[tuple[int, Tensor]]:
        """Yield gate and up matrices of the experts in blocks that take turns, so that a step reads both in one run."""
        stride = expert_stride(self._config, slot.type)
        for index, name in enumerate(slot.sources):
            expert, half = divmod(index, 2)
            for block, weight in enumerate(self._source.read(name).split(TURN)):
                yield (2 * stride * expert) + TURN * (2 * block + half), weight

    def _packed(self, slot: Slot, parts: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """Quantise what is stacked in a slot; a view of a source is valid until its next read, so each is copied first."""
        data, scales = empty_tiles(slot.rows, slot.cols, slot.type)
        running: deque[Future[None]] = deque()
        for row, weight in parts:
            if len(running) > 2 * THREADS:
                running.popleft().result()
            running.append(self._threads.submit(self._pack_part, slot, row, weight.clone(), data, scales))
        for part in running:
            part.result()
        return data, scales

    def _pack_part(self, slot: Slot, row: int, weight: Tensor, data: Tensor, scales: Tensor) -> None:
        try:
            pack_into(weight, slot.type, row, data, scales)
        except ValueError as error:
            raise CheckpointError(f"{slot.name} cannot be packed: {error}") from error

    def _expanded(self) -> Tensor:
        """Return kv_b_proj with the values that the absorbed matrices stand for, in bf16."""
        config = self._config
        nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        wide = {}
        for field, (slot, data, scales) in self._absorbed.items():
            bits = 8 if slot.type == Type.I8 else 4
            wide[field] = dequantize_groups(*from_tiles(data, scales, slot.rows, slot.cols, bits)).unflatten(
                0, (config.num_attention_heads, -1)
            )
        self._absorbed = {}
        both = torch.cat((wide["key_up"][:, :latent, :nope].transpose(1, 2), wide["value_up"][:, :value, :latent]), dim=1)
        return both.flatten(0, 1).to(torch.bfloat16)
