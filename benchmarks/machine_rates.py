"""What this machine gives at best: bytes a second out of memory in huge pages, and multiplications of matrices.

A decoding step can be no faster than its weights come out of memory, nor than its products at the rate of a large one; ``Rates.seconds``
is that roof. Other work only ever lowers a rate, so each is the best of several tries.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from matrix_products import SQUARE, matrix_rate

READ_BYTES = 256 << 20  # many times what caches hold

T = TypeVar("T")


@dataclass(frozen=True)
class Rates:
    """Rates of the machine.

    Args:
        read: GB/s, all threads reading 2 MiB pages.
        bf16: GFLOP/s of a large product.
        int8: the same of 8-bit integers.
    """

    read: float
    bf16: float
    int8: float

    def better(self, other: "Rates") -> "Rates":
        """Return the higher of two measurements of each."""
        return Rates(max(self.read, other.read), max(self.bf16, other.bf16), max(self.int8, other.int8))

    def seconds(self, num_bytes: float, flops: float, *, quantised: bool) -> float:
        """Return the least time in which so many bytes are read and so many operations done."""
        return max(num_bytes / self.read, flops / (self.int8 if quantised else self.bf16)) / 1e9


class ReadMeter:
    """Memory of its own whose rate of reading can be asked for at any moment: a sum over 256 MiB, three times, some 15 ms in all."""

    num_bytes = READ_BYTES

    def __init__(self) -> None:
        from dsv2.kernels.cpu.memory import HugeMemory

        self._memory = HugeMemory(READ_BYTES)
        self._values = torch.frombuffer(self._memory.view(), dtype=torch.float32)
        self._values.fill_(1.0)

    def rate(self) -> float:
        """Return GB/s at this moment."""
        return READ_BYTES / _best(self._values.sum, 3) / 1e9

    def around(self, work: Callable[[], T]) -> tuple[T, list[float]]:
        """Do work; return what it returned, and the lower and the higher of the rates right before and right after."""
        before = self.rate()
        result = work()
        return result, sorted((before, self.rate()))


def measure_rates(meter: ReadMeter) -> Rates:
    """Measure all three, a second or two."""
    return Rates(meter.rate(), matrix_rate(torch.bfloat16), int8_rate())


def int8_rate() -> float:
    """Return GFLOP/s (two for a multiplication with its addition) of a product of 8-bit integers."""
    left, right = (torch.randint(-100, 100, (SQUARE, SQUARE), dtype=torch.int8) for _ in range(2))
    return 2 * SQUARE**3 / _best(lambda: torch._int_mm(left, right), 12) / 1e9


def _best(work: Callable[[], object], tries: int) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
