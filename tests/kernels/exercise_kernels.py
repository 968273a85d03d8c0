"""A program that drives every entry of the native kernels over odd shapes, for a library that was compiled with sanitizers.

    python exercise_kernels.py VARIANT JOB SEED FLAG...

Every tensor that the kernels see has memory of its own that ends where it ends, but for the slack that is promised behind the cache. Caches
and outputs are full of NaN before.
"""

import ctypes
import functools
import random
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dsv2.checkpoint.shard import TensorEntry, read_header
from dsv2.checkpoint.source import ModelSource
from dsv2.engine.cache import _SLACK, entry_bytes
from dsv2.engine.layout import FILE, slots
from dsv2.engine.native import NativeStack, Piece, StackWeights, weights_of
from dsv2.engine.quantize import pack_folder
from dsv2.engine.weights import _described
from dsv2.kernels.cpu import library as native
from dsv2.kernels.cpu.library import CacheFormat, Type, empty_tiles, pack_into, packed_matrix
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.presets import preset

BLOCK_LEN = 64


def random_matrix(chance: random.Random, kind: Type) -> tuple[native.Matrix, list[torch.Tensor]]:
    """A weight of a random shape, and the tensors that hold it."""
    rows, cols = chance.randint(1, 80), chance.randint(1, 200)
    weight = torch.randn(rows, cols)
    if kind in (Type.F32, Type.BF16):
        weight = weight.to(torch.bfloat16) if kind == Type.BF16 else weight
        return native.matrix(weight), [weight]
    data, scales = empty_tiles(rows, cols, kind)
    pack_into(weight if chance.random() < 0.5 else weight.bfloat16(), kind, 0, data, scales)
    return packed_matrix(rows, cols, kind, data, scales), [data, scales]


def products(chance: random.Random, lib: ctypes.CDLL) -> None:
    for _ in range(60):
        for kind in Type:
            matrix, held = random_matrix(chance, kind)
            y = native.multiply(matrix, torch.randn(chance.randint(1, 20), matrix.cols), lib)
            assert torch.isfinite(y).all(), (kind, [tensor.shape for tensor in held])


def random_config(chance: random.Random, kind: CacheFormat) -> ModelConfig:
    groups = chance.choice([1, 2, 4])
    shape: dict[str, Any] = {
        "vocab_size": chance.randint(20, 400), "hidden_size": chance.choice([24, 40, 48, 70, 96]),
        "intermediate_size": chance.randint(8, 90),
        "num_hidden_layers": chance.randint(1, 3), "num_attention_heads": chance.randint(1, 5),
        "q_lora_rank": chance.choice([None, 20, 33]),
        "kv_lora_rank": chance.choice([32, 64] if kind == CacheFormat.SIX else [24, 33, 64, 80]),
        "qk_nope_head_dim": chance.choice([4, 12, 16, 21, 32]), "qk_rope_head_dim": chance.choice([2, 8, 10, 16, 32]),
        "v_head_dim": chance.choice([3, 10, 16, 64, 70]), "n_routed_experts": chance.choice([8, 12, 16]) if groups < 4 else 16,
        "n_shared_experts": chance.choice([None, 1, 2]), "num_experts_per_tok": chance.randint(1, 4),
        "moe_intermediate_size": chance.choice([5, 16, 40]), "first_k_dense_replace": chance.randint(0, 1),
        "max_position_embeddings": 1024, "tie_word_embeddings": chance.random() < 0.3,
        "norm_topk_prob": chance.random() < 0.5,
    }  # fmt: skip
    if groups > 1:
        shape |= {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": max(1, groups // 2)}
    return preset("nano", **shape)


class Separate:
    """A packed file's tensors, each in memory of its own."""

    def __init__(self, file: Path) -> None:
        self.tensors = {
            entry.name: torch.from_numpy(np.fromfile(file, np.uint8, entry.end - entry.begin, offset=entry.begin)).clone()
            for entry in read_header(file).values()
        }

    def address(self, entry: TensorEntry) -> int:
        return self.tensors[entry.name].data_ptr()


def packed(model: Transformer, scheme: Any) -> StackWeights:
    with tempfile.TemporaryDirectory() as name:
        pack_folder(ModelSource(model), Path(name), scheme)
        file = Path(name) / FILE
        return _described(model.config, list(slots(model.config, scheme)), read_header(file), Separate(file))  # type: ignore[arg-type]


def random_model(chance: random.Random, config: ModelConfig, weights: str) -> StackWeights:
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    if weights in ("fp32", "bf16") and chance.random() < 0.7:
        return weights_of(model.to(torch.bfloat16) if weights == "bf16" else model)
    return packed(model, weights)


def random_pieces(chance: random.Random, sequences: list[dict[str, Any]]) -> list[Piece]:
    """Some tokens of some sequences, each in one or two pieces, in either reading."""
    pieces = []
    for sequence in chance.sample(sequences, chance.randint(1, len(sequences))):
        for _ in range(chance.randint(1, 2)):
            start = sequence["done"]
            length = min(len(sequence["tokens"]) - start, chance.choice([1, 1, 2, 5, 17, 64, 90]))
            if length > 0:
                wanted = sorted(chance.sample(range(length), chance.randint(0, min(3, length))))
                tokens = sequence["tokens"][start : start + length]
                pieces.append(Piece(tokens, start, sequence["blocks"][: -(-(start + length) // BLOCK_LEN)], chance.random() < 0.5, wanted))
                sequence["done"] += length
    return pieces


def steps(chance: random.Random, variant: str, weights: str, kind: CacheFormat, longest: int) -> None:
    """Run sequences of random lengths to their ends on one random model."""
    config = random_config(chance, kind)
    lengths = [chance.randint(1, longest) for _ in range(chance.randint(1, 4))]
    needed = [-(-length // BLOCK_LEN) for length in lengths]
    order = chance.sample(range(sum(needed)), sum(needed))
    size = entry_bytes(config, kind)
    memory = np.full(config.num_hidden_layers * sum(needed) * BLOCK_LEN * size + _SLACK, 0xFF, np.uint8)
    store: Any = SimpleNamespace(
        format=kind, entry_bytes=size, num_blocks=sum(needed), memory=SimpleNamespace(address=memory.ctypes.data, view=lambda: memory)
    )
    stack = NativeStack(
        random_model(chance, config, weights), store, threads=chance.randint(1, 3), num_tokens=config.vocab_size, variant=variant
    )
    sequences = [
        {"tokens": [chance.randrange(config.vocab_size) for _ in range(length)], "blocks": [order.pop() for _ in range(count)], "done": 0}
        for length, count in zip(lengths, needed, strict=True)
    ]
    while sequences:
        pieces = random_pieces(chance, sequences)
        rows = sum(len(piece.wanted) for piece in pieces)
        stack._logits = np.full((rows, config.vocab_size), np.nan, np.float32)
        stack._best, stack._best_logit = np.full(rows, -1, np.int32), np.full(rows, np.nan, np.float32)
        answered = stack.step(pieces, want_experts=chance.random() < 0.3)
        assert np.isfinite(answered.logits).all() and np.array_equal(answered.best, answered.logits.argmax(-1))
        if answered.experts is not None and config.num_moe_layers:
            assert answered.experts.min() >= 0 and answered.experts.max() < (config.n_routed_experts or 0)
        sequences = [sequence for sequence in sequences if sequence["done"] < len(sequence["tokens"])]
    stack.close()


def read_beyond(lib: ctypes.CDLL) -> None:
    """A weight that is one row shorter than it says."""
    weight = torch.randn(7, 64)
    matrix = native.matrix(weight)
    matrix.rows += 1
    native.multiply(matrix, torch.randn(3, 64), lib)


def write_beyond(lib: ctypes.CDLL) -> None:
    """A result that is one number shorter than the product."""
    weight, x, y = torch.randn(8, 64), torch.randn(3, 64), torch.empty(3 * 8 - 1)
    lib.dsv2_multiply(ctypes.byref(native.matrix(weight)), x.data_ptr(), 3, y.data_ptr())


def overflow(lib: ctypes.CDLL) -> None:
    """A weight of so many rows that rounding them up leaves the range of an int."""
    weight, x, y = torch.randn(8, 64), torch.randn(1, 64), torch.empty(8)
    matrix = native.matrix(weight)
    matrix.rows = 2**31 - 1
    lib.dsv2_multiply(ctypes.byref(matrix), x.data_ptr(), 1, y.data_ptr())


def race(lib: ctypes.CDLL) -> None:
    """Two threads that write the same result."""
    weight, x, y = torch.randn(64, 64), torch.randn(8, 64), torch.empty(8 * 64)
    described = native.matrix(weight)

    def work() -> None:
        for _ in range(200):
            lib.dsv2_multiply(ctypes.byref(described), x.data_ptr(), 8, y.data_ptr())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    variant, job, seed, *flags = sys.argv[1:]
    native.library = functools.partial(native.library, extra_flags=tuple(flags))  # type: ignore[assignment]
    lib = native.library(variant)
    torch.manual_seed(int(seed))
    torch.set_num_threads(1)
    chance = random.Random(int(seed))
    if job in ("read_beyond", "write_beyond", "overflow", "race"):
        globals()[job](lib)
        return
    if job == "threads":
        steps(chance, variant, "bf16", CacheFormat.BF16, 150)
        steps(chance, variant, "mixed", CacheFormat.EIGHT, 150)
        return
    products(chance, lib)
    for weights in ("fp32", "bf16", "8", "mixed", "4"):
        for kind in CacheFormat:
            for _ in range(3):
                steps(chance, variant, weights, kind, 200)
    steps(chance, variant, "fp32", CacheFormat.F32, 700)  # several spans of keys
    steps(chance, variant, "4", CacheFormat.SIX, 700)


if __name__ == "__main__":
    main()
