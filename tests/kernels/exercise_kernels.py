"""A program that drives every entry of the native kernels over odd shapes, for a library that was compiled with sanitizers.

    python exercise_kernels.py VARIANT JOB SEED FLAG...

Every tensor that the kernels see has memory of its own that ends where it ends, but for the slack that is promised behind the cache. Caches
and outputs are full of NaN before.
"""

import ctypes
import functools
import random
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from random_steps import BLOCK_LEN, described, poisoned_step, random_config, random_model, random_pieces, random_texts

from dsv2.engine.cache import _SLACK, entry_bytes
from dsv2.engine.native import NativeStack
from dsv2.kernels.cpu import library as native
from dsv2.kernels.cpu.library import CacheFormat, Type, empty_tiles, pack_into, packed_matrix


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


def steps(chance: random.Random, variant: str, weights: Any, kind: CacheFormat, longest: int) -> None:
    """Run texts of random lengths to their ends on one random model."""
    config = random_config(chance, kind)
    texts = random_texts(chance, config.vocab_size, longest)
    num_blocks, size = sum(len(text.blocks) for text in texts), entry_bytes(config, kind)
    memory = np.full(config.num_hidden_layers * num_blocks * BLOCK_LEN * size + _SLACK, 0xFF, np.uint8)
    store: Any = SimpleNamespace(
        format=kind, entry_bytes=size, num_blocks=num_blocks, memory=SimpleNamespace(address=memory.ctypes.data, view=lambda: memory)
    )
    model = random_model(config, chance.randrange(2**32))
    given = described(chance, model.to(torch.bfloat16) if weights == "bf16" else model, weights)
    stack = NativeStack(given, store, threads=chance.randint(1, 3), num_tokens=config.vocab_size, variant=variant)
    while any(text.done < len(text.tokens) for text in texts):
        pieces = [piece for _, piece in random_pieces(chance, texts)]
        answered = poisoned_step(stack, pieces, want_experts=chance.random() < 0.3)
        assert np.isfinite(answered.logits).all() and np.array_equal(answered.best, answered.logits.argmax(-1))
        if answered.experts is not None and config.num_moe_layers:
            assert answered.experts.min() >= 0 and answered.experts.max() < (config.n_routed_experts or 0)
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
