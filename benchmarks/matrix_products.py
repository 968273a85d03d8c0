"""The matrix products of a piece of work: recorded while it runs, then replayed bare, which bounds how fast it could be."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.baddbmm,
            torch.ops.aten.baddbmm_}  # fmt: skip
SQUARE = 2048  # side of the product that stands for the machine's rate

Operand = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


@dataclass(frozen=True)
class Product:
    """left [.., m, k] times right [.., k, n], as it was called."""

    left: Operand
    right: Operand

    @property
    def flops(self) -> int:
        shape = self.left[0]
        rows = 1
        for size in shape:
            rows *= size
        return 2 * rows * self.right[0][-1]


class Recorder(TorchDispatchMode):
    """Counts every matrix product of two or three dimensions that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            left, right = tensors[-2:]
            self.products[Product(*((tuple(t.shape), tuple(t.stride()), t.dtype) for t in (left, right)))] += 1
        return func(*args, **(kwargs or {}))


def record(work: Callable[[], None]) -> Counter[Product]:
    """Return the products of ``work``, each with how often it runs."""
    with Recorder() as recorder:
        work()
    return recorder.products


def total_flops(products: Counter[Product]) -> int:
    return sum(product.flops * count for product, count in products.items())


def replay_seconds(products: Counter[Product], repeats: int = 5) -> float:
    """Return how long the products take by themselves: each on operands of its own layout, its median time by its count."""
    total = 0.0
    for product, count in products.items():
        left, right = (_operand(*operand) for operand in (product.left, product.right))
        multiply = torch.bmm if left.dim() == 3 else torch.mm
        out = multiply(left, right)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            multiply(left, right, out=out)
            times.append(time.perf_counter() - start)
        total += statistics.median(times) * count
    return total


def matrix_rate(dtype: torch.dtype) -> float:
    """Return this machine's matrix rate, GFLOP/s: the best of some large products, since other work only ever lowers it."""
    left, right = torch.randn(SQUARE, SQUARE).to(dtype), torch.randn(SQUARE, SQUARE).to(dtype)
    out = left @ right
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - start)
    return 2 * SQUARE**3 / min(times) / 1e9


def _operand(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return torch.randn(size).to(dtype).as_strided(shape, strides)
