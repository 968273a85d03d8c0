"""dsv2's side of decode_vs_peers.py: one packed model, what is asked of it timed, beside the rates of the machine at that moment."""

import functools
import os
import random
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
from machine_rates import Rates, measure_rates

NEW = 24  # tokens of an answer whose steps are timed
IDS = 4000  # prompts are drawn from so many ids


def measure(task: dict) -> dict:
    """Load a packed folder and time what ``task`` names; return tokens/s by name, roofs, memory."""
    from dsv2.engine.weights import load_packed, packed_scheme

    folder = Path(task["folder"])
    scheme = packed_scheme(folder)
    assert scheme is not None
    before = measure_rates()
    started = time.perf_counter()
    weights = load_packed(folder)
    row: dict = {"load_s": time.perf_counter() - started, "tokens_per_s": {}, "roof": {}}
    for name, speed in _timed(task, weights):
        row["tokens_per_s"][name] = speed
    after = measure_rates()
    rates = Rates(*(max(getattr(before, name), getattr(after, name)) for name in ("read", "bf16", "int8")))
    row["rates"] = {"read": rates.read, "bf16": rates.bf16, "int8": rates.int8}
    for batch in task["batches"]:
        distinct = _distinct_experts(weights, batch) if weights.config.num_moe_layers else 0.0
        num_bytes, flops = step_bytes(weights.config, scheme, distinct), batch * step_flops(weights.config)
        row["roof"][f"decode b{batch}"] = batch / rates.seconds(num_bytes, flops, quantised=scheme in ("4", "mixed", "8"))
        row.setdefault("distinct_experts", {})[f"b{batch}"] = distinct
    row["packed_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def _timed(task: dict, weights) -> Iterator[tuple[str, float]]:
    for batch in task["batches"]:
        yield f"decode b{batch}", decode_speed(weights, batch, task["prompt"], task.get("new", NEW))
    for length in task["prefill"]:
        yield f"prefill {length}", prefill_speed(weights, length, 3 if length <= 512 else 1)
    for depth in task["depths"]:
        yield f"depth {depth}", depth_speed(weights, depth, task.get("new", NEW))


def _engine(weights, batch: int, longest: int):
    from dsv2.engine.engine import Engine

    return Engine(weights, tokenizer(), max_batch=batch, max_len=longest, reuse=False, speculate=False)


@functools.cache
def tokenizer():
    """A tokenizer of ``IDS`` ids and some: text is not what is measured."""
    from dsv2.assets import corpus_path
    from dsv2.data.documents import read_documents
    from dsv2.tokenizer.train import train_tokenizer

    return train_tokenizer([document.text for document in read_documents([corpus_path("validation")])], vocab_size=4096)


def prompts(batch: int, length: int) -> list[tuple[int, ...]]:
    generator = random.Random(batch * 1000 + length)
    return [tuple(generator.randrange(2, IDS) for _ in range(length)) for _ in range(batch)]


def decode_speed(weights, batch: int, prompt: int, new: int) -> float:
    """Tokens/s of ``batch`` answers written together: batch over the median step, sampling and all."""
    from dsv2.engine.request import Request, SamplingParams

    engine = _engine(weights, batch, prompt + 512)
    params = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
    for index, tokens in enumerate(prompts(batch, prompt)):
        engine.add(Request(f"{index}", tokens, params))
    while len(engine.step()) < batch:
        pass
    times = []
    for _ in range(new if batch > 1 else 2 * new):
        start = time.perf_counter()
        assert len(engine.step()) == batch
        times.append(time.perf_counter() - start)
    engine.close()
    return batch / statistics.median(times)


def prefill_speed(weights, length: int, tries: int) -> float:
    """Prompt tokens/s of one request, up to its first new token."""
    from dsv2.engine.request import Request, SamplingParams

    engine = _engine(weights, 1, length + 8)
    times = []
    for index, tokens in enumerate(prompts(tries + 1, length)):
        start = time.perf_counter()
        engine.generate([Request(f"{index}", tokens, SamplingParams(temperature=0.0, max_tokens=1))])
        times.append(time.perf_counter() - start)
    engine.close()
    return length / statistics.median(times[1:])


def depth_speed(weights, depth: int, new: int) -> float:
    """Tokens/s of one sequence behind a cache filled with ``depth`` tokens of noise."""
    from dsv2.engine.blocks import BLOCK_LEN, blocks_for
    from dsv2.engine.cache import LatentStore
    from dsv2.engine.native import NativeStack, Piece
    from dsv2.kernels.cpu.library import CacheFormat

    blocks = list(range(blocks_for(depth + new)))
    store = LatentStore(weights.config, CacheFormat.BF16, len(blocks))
    values = np.frombuffer(store.memory.view(), np.uint16)
    values[:] = (np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)[
        np.arange(len(values)) % (1 << 20)
    ]
    stack = NativeStack(weights, store, threads=2, num_tokens=IDS)
    times = []
    for position in range(depth, depth + new):
        start = time.perf_counter()
        stack.step([Piece([7], position, blocks[: position // BLOCK_LEN + 1], False, [0])])
        times.append(time.perf_counter() - start)
    stack.close()
    return 1 / statistics.median(times)


def _distinct_experts(weights, batch: int, new: int = 6) -> float:
    """Experts that a layer reads in a step of ``batch`` answers, on average: what was chosen is recorded."""
    from dsv2.engine.request import Request, SamplingParams

    engine = _engine(weights, batch, 64)
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    requests = [Request(f"{index}", tokens, params, record_experts=True) for index, tokens in enumerate(prompts(batch, 16))]
    chosen = np.stack([output.experts[-new + 1 :] for output in engine.generate(requests)])  # [answer, step, layer, chosen]
    engine.close()
    steps = [len(np.unique(chosen[:, step, layer])) for step in range(chosen.shape[1]) for layer in range(chosen.shape[2])]
    return statistics.mean(steps)


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
