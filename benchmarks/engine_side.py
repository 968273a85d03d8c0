"""dsv2's side of decode_vs_peers.py: one packed model, what is asked of it timed, beside what the machine gives at that moment.

The memory of a virtual machine may give 36 GB/s for some minutes and 60 in the next. So a decoding figure is made of short blocks of steps,
with the rate of reading taken right before and right after each. A block's share of the roof is judged by the mean of its two rates; the
median over the blocks counts.
"""

import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
from machine_rates import Rates, ReadMeter, measure_rates
from quiet_machine import quietly

BLOCKS = 4
SHORTEST_S = 1.5  # that a figure is measured for: fast models answer again and again
READ_S = 60.0  # a step may take: prompts are read as fast as can be; else slow models read them so gently that answers end before all began
IDS = 4000  # prompts are drawn from so many ids


@dataclass(frozen=True)
class Timed:
    """Some steps of a decoding batch.

    Args:
        step_s: their median.
        read: GB/s of the memory, mean of before and after.
    """

    step_s: float
    read: float


def measure(task: dict) -> dict:
    """Load a packed folder and time what a task names, as {"figures": {name: {"value": tokens/s, ...}}} and more.

    ``task``: folder, tokenizer (folders); batches, prefill, depths (what is timed); prompt, new (tokens of a request).
    """
    from dsv2.engine.weights import load_packed
    from dsv2.tokenizer.tokenizer import Tokenizer

    meter = ReadMeter()
    rates = measure_rates(meter)
    started = time.perf_counter()
    weights = load_packed(Path(task["folder"]))
    load_s = time.perf_counter() - started
    side = _Side(weights, Tokenizer.load(Path(task["tokenizer"])), meter, rates, task)
    figures = dict(side.figures())
    mib, rates = 1 << 20, side.rates
    return {
        "figures": figures,
        "load_s": load_s,
        "matrix_gflops": {"bf16": rates.bf16, "int8": rates.int8},
        "packed_mib": sum(file.stat().st_size for file in Path(task["folder"]).glob("*.safetensors")) / mib,
        "cache_mib": side.largest_cache / mib,
        # the meter's memory is resident from before the model to the end, and nobody's need
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - meter.num_bytes / mib,
    }


class _Side:
    def __init__(self, weights, tokenizer, meter: ReadMeter, rates: Rates, task: dict) -> None:
        from dsv2.engine.weights import packed_scheme

        self._weights, self._tokenizer, self._meter, self.rates, self._task = weights, tokenizer, meter, rates, task
        self._scheme = packed_scheme(Path(task["folder"])) or ""
        self.largest_cache = 0  # bytes

    def figures(self) -> Iterator[tuple[str, dict]]:
        prompt, new = self._task["prompt"], self._task["new"]
        for batch in self._task["batches"]:
            self.rates = self.rates.better(measure_rates(self._meter))  # in some processes the first products run at half their rate
            figure, others = quietly(lambda batch=batch: self._decode(batch, prompt, new if batch > 1 else 2 * new))
            yield f"decode b{batch}", figure | {"others": others}
        for length in self._task["prefill"]:
            value, others = quietly(lambda length=length: self._prefill(length))
            yield f"prefill {length}", {"value": value, "others": others}
        for depth in self._task["depths"]:
            (figure, reads), others = quietly(lambda depth=depth: self._meter.around(lambda: self._depth(depth, new)))
            yield f"depth {depth}", figure | {"reads": reads, "others": others}

    def _engine(self, batch: int, longest: int):
        from dsv2.engine.engine import Engine

        settings = {"max_batch": batch, "max_len": longest, "reuse": False, "speculate": False}
        engine = Engine(self._weights, self._tokenizer, max_step_s=READ_S, **settings)
        self.largest_cache = max(self.largest_cache, engine.cache.num_bytes)
        return engine

    def _decode(self, batch: int, prompt: int, new: int) -> dict:
        """Tokens/s of ``batch`` answers written together, sampling and all, and how near the roof that is."""
        engine = self._engine(batch, prompt + new + spare_steps(batch))
        timed: list[Timed] = []
        distinct: list[float] = []
        began = time.perf_counter()
        while not timed or time.perf_counter() - began < SHORTEST_S:
            more, experts = self._answers(engine, batch, prompt, new)
            timed += more
            distinct.append(experts)
        engine.close()
        config, experts = self._weights.config, statistics.mean(distinct)
        num_bytes, flops = step_bytes(config, self._scheme, experts), batch * step_flops(config)
        quantised = self._scheme in ("4", "mixed", "8")
        least = [replace(self.rates, read=block.read).seconds(num_bytes, flops, quantised=quantised) for block in timed]
        middle = statistics.median
        return {
            "value": batch / middle(block.step_s for block in timed),
            "roof": batch / middle(least),
            "of_roof": middle(seconds / block.step_s for seconds, block in zip(least, timed, strict=True)),
            "read": middle(block.read for block in timed),
            "reads": [min(block.read for block in timed), max(block.read for block in timed)],
            "distinct_experts": experts,
            "bytes": num_bytes,
        }

    def _answers(self, engine, batch: int, prompt: int, new: int) -> tuple[list[Timed], float]:
        """Time ``new`` steps of a batch in blocks; return them and the experts that a layer read in a step, on average."""
        from dsv2.engine.request import Request, SamplingParams

        config = self._weights.config
        recorded = batch > 1 and config.num_moe_layers > 0
        params = SamplingParams(temperature=0.0, max_tokens=new + spare_steps(batch), ignore_eos=True)
        for index, tokens in enumerate(prompts(batch, prompt)):
            engine.add(Request(f"{index}", tokens, params, record_experts=recorded))
        steps = spare_steps(batch) - 1  # then the first answer goes on to the end of what is timed
        if not any(len(engine.step()) == batch for _ in range(steps)):
            raise RuntimeError(f"{batch} requests are not written together after {steps} steps")
        timed = []
        for _ in range(BLOCKS):
            before = self._meter.rate()
            step_s = median_s(lambda: engine.step(), new // BLOCKS)
            timed.append(Timed(step_s, (before + self._meter.rate()) / 2))
        outputs = [engine.abort(f"{index}") for index in range(batch)]
        if not recorded:
            return timed, float(config.num_experts_per_tok or 0)
        chosen = np.stack([output.experts[-(new // BLOCKS * BLOCKS) :] for output in outputs])  # [answer, step, layer, chosen]
        return timed, statistics.mean(len(np.unique(rows)) for step in chosen.swapaxes(0, 1) for rows in step.swapaxes(0, 1))

    def _prefill(self, length: int) -> float:
        """Prompt tokens/s of one request, up to its first new token."""
        from dsv2.engine.request import Request, SamplingParams

        engine = self._engine(1, length + 8)
        params = SamplingParams(temperature=0.0, max_tokens=1)
        engine.generate([Request("first", prompts(1, min(length, 256))[0], params)])
        times: list[float] = []
        while len(times) < (3 if length <= 512 else 1) or sum(times) < SHORTEST_S:
            tokens = prompts(1, length, seed=len(times))[0]
            start = time.perf_counter()
            engine.generate([Request(f"{len(times)}", tokens, params)])
            times.append(time.perf_counter() - start)
        engine.close()
        return length / statistics.median(times)

    def _depth(self, depth: int, new: int) -> dict:
        """Tokens/s of one sequence behind a cache filled with ``depth`` tokens of noise, and what of the speed with an empty one that is.

        The two take turns, so that memory has the same rate for both.
        """
        from dsv2.engine.blocks import BLOCK_LEN, blocks_for
        from dsv2.engine.cache import LatentStore
        from dsv2.engine.native import NativeStack, Piece
        from dsv2.kernels.cpu.library import CacheFormat

        blocks = list(range(blocks_for(depth + new)))
        store = LatentStore(self._weights.config, CacheFormat.BF16, len(blocks))
        fill_with_noise(np.frombuffer(store.memory.view(), np.uint16))
        self.largest_cache = max(self.largest_cache, store.memory.size)
        stack = NativeStack(self._weights, store, threads=2, num_tokens=IDS)

        def steps_s(start: int) -> float:
            positions = iter(range(start, start + new))

            def step() -> None:
                position = next(positions)
                stack.step([Piece([7], position, blocks[: position // BLOCK_LEN + 1], False, [0])])

            return median_s(step, new)

        turns, began = [], time.perf_counter()
        while not turns or time.perf_counter() - began < SHORTEST_S:
            turns.append((steps_s(0), steps_s(depth)))
        stack.close()
        return {"value": 1 / statistics.median(deep for _, deep in turns), "kept": statistics.median(empty / deep for empty, deep in turns)}


def spare_steps(batch: int) -> int:
    """Return how many tokens the first answer of a batch may be ahead when the last one begins: a step reads a part of the prompts only."""
    return 64 + 4 * batch


def median_s(work: Callable[[], object], times: int) -> float:
    """Return the median time of a piece of work."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def fill_with_noise(values: np.ndarray) -> None:
    """Write N(0, 1) in bf16 over memory, a million numbers again and again."""
    noise = (np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for start in range(0, len(values), len(noise)):
        values[start : start + len(noise)] = noise[: len(values) - start]


def prompts(batch: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = random.Random(batch * 1000 + length + (seed << 32))
    return [tuple(generator.randrange(2, IDS) for _ in range(length)) for _ in range(batch)]


def step_bytes(config, scheme: str, distinct: float) -> float:
    """Bytes of weights that a decoding step reads: everything once, of a layer's experts the chosen ones, no embedding."""
    from dsv2.engine.layout import slots

    total = 0.0
    for slot in slots(config, scheme):
        size, field = sum(spec.num_bytes for spec in slot.specs().values()), slot.name.rpartition(".")[2]
        absorbed_twice = field == "up" and scheme in ("4", "mixed", "8")  # only the expanded reading multiplies by this copy
        if field == "embedding" or absorbed_twice:
            continue
        total += size * distinct / config.n_routed_experts if field.startswith("expert_") else size
    return total


def step_flops(config) -> float:
    """Operations per token, two for each weight at work, the head's included."""
    from dsv2.model.accounting import count_parameters

    return 2.0 * count_parameters(config).activated_without_embedding
