"""The peers' side of decode_vs_peers.py: llama.cpp through its own benchmark programs, transformers in a process of ours.

llama.cpp runs unpatched, on GGUF files that dsv2 exports; of the ways to load a file, the fastest is looked for. transformers reads the
checkpoint that dsv2 writes, in bf16, with sdpa attention, and decodes in a bare loop of forward passes that feeds back the likeliest token
(``generate`` would be slower still).
"""

import json
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path

from machine_rates import ReadMeter
from quiet_machine import children_s, quietly

# How llama.cpp gets at its weights: out of the mapped file or read into memory; with huge pages for memory or without.
LOADINGS = {"mapped": (True, False), "mapped, huge pages": (True, True), "read": (False, False), "read, huge pages": (False, True)}


class PeerFailed(Exception):
    """A peer ended with an error, which is reported in place of its figures."""


class LlamaCpp:
    """llama.cpp's benchmark programs.

    Args:
        bin: folder with llama-bench and llama-batched-bench.
        threads: of each run.
    """

    def __init__(self, bin: Path, threads: int) -> None:
        self._bench, self._batched, self._threads = bin / "llama-bench", bin / "llama-batched-bench", threads
        for program in (self._bench, self._batched):
            if not os.access(program, os.X_OK):
                raise SystemExit(f"error: no program {program}\nhint: --llama takes the folder bin of a build of llama.cpp")
        self._modes = "--load-mode" in self._said("--help")  # before 2026-10: -mmp, and --no-mmap in the other program
        self._meter = ReadMeter()
        said = self._said("--version").splitlines()
        self.version = next((line for line in said if line.startswith("version")), "unknown version")

    def _said(self, flag: str) -> str:
        done = subprocess.run([self._bench, flag], capture_output=True, text=True)
        return done.stdout + done.stderr

    def single(self, file: Path, loading: str, *arguments: str) -> dict:
        """Run llama-bench; return {"prefill N" or "decode b1" or "depth N": {"value": tokens/s}}, medians over its repetitions."""
        flags = [] if LOADINGS[loading][0] else ["-lm", "none"] if self._modes else ["-mmp", "0"]
        said, taken = self._run([str(self._bench), "-m", str(file), "-t", str(self._threads), "-o", "json", *flags, *arguments], loading)
        figures = {}
        for row in json.loads(said[said.index("[") :]):
            depth, prompt = row["n_depth"], row["n_prompt"]
            name = f"depth {depth}" if depth else f"prefill {prompt}" if prompt else "decode b1"
            figures[name] = {"value": statistics.median(row["samples_ts"]), "loading": loading} | taken
        return figures

    def together(self, file: Path, loading: str, *, prompt: int, new: int, batches: list[int]) -> dict:
        """Run llama-batched-bench; return {"decode bN": {"value": tokens/s of all answers together}}."""
        flags = [] if LOADINGS[loading][0] else ["-lm", "none"] if self._modes else ["--no-mmap"]
        context = max(batches) * (prompt + new) + 64
        command = [str(self._batched), "-m", str(file), "-t", str(self._threads), "-tb", str(self._threads), "-c", str(context), *flags]
        command += ["-npp", str(prompt), "-ntg", str(new), "-npl", ",".join(map(str, batches)), "--output-format", "jsonl"]
        said, taken = self._run(command, loading)
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return {f"decode b{row['pl']}": {"value": row["speed_tg"], "loading": loading} | taken for row in rows}

    def try_loadings(self, file: Path) -> dict[str, dict]:
        """Return the figure of one answer for each way of loading."""
        return {loading: self.single(file, loading, "-p", "0", "-n", "32", "-r", "3")["decode b1"] for loading in LOADINGS}

    def _run(self, command: list[str], loading: str) -> tuple[str, dict]:
        huge = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if LOADINGS[loading][1] else {}

        def work() -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, capture_output=True, text=True, env=os.environ | huge)

        (done, reads), others = quietly(lambda: self._meter.around(work), children_s)
        if done.returncode:
            raise PeerFailed(f"{Path(command[0]).name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return done.stdout, {"others": others, "reads": reads}


def measure_transformers(task: dict) -> dict:
    """Time transformers on a checkpoint; figures as ``engine_side.measure`` gives them.

    ``task``: folder; experts (implementation), compiled; batches, prefill; prompt, new (tokens of a request).
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    meter = ReadMeter()
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task["folder"], dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=task["experts"]
    ).eval()
    row: dict = {"load_s": time.perf_counter() - started, "figures": {}}
    loop = _Loop(model, compiled=task["compiled"])
    for batch in task["batches"]:
        loop.warm_up(batch, task["prompt"], task["new"])
        (value, reads), others = quietly(lambda batch=batch: meter.around(lambda: loop.decode(batch, task["prompt"], task["new"])))
        row["figures"][f"decode b{batch}"] = {"value": value, "reads": reads, "others": others}
    for length in task["prefill"]:
        loop.prompt(length if task["compiled"] else min(length, 512))
        value, others = quietly(lambda length=length: loop.prefill(length))
        row["figures"][f"prefill {length}"] = {"value": value, "others": others}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - meter.num_bytes / (1 << 20)
    return row


class _Loop:
    """A loop around a transformers model.

    Args:
        model: the model.
        compiled: by torch.compile, with a static cache.
    """

    SHORTEST_S = 1.5

    def __init__(self, model, *, compiled: bool) -> None:
        import torch

        self._model, self._compiled = model, compiled
        self._forward = torch.compile(model) if compiled else model
        self._random = torch.Generator().manual_seed(1)

    def _start(self, batch: int, length: int, new: int, forward):
        """Return the first new tokens [batch, 1] of random prompts, and the cache behind them."""
        import torch
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        cache = StaticCache(config=config, max_cache_len=length + new) if self._compiled else DynamicCache(config=config)
        ids = torch.randint(2, config.vocab_size, (batch, length), generator=self._random)
        with torch.inference_mode():
            logits = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True), cache

    def _steps(self, batch: int, prompt: int, new: int) -> list[float]:
        import torch

        tokens, cache = self._start(batch, prompt, new, self._model)
        times = []
        with torch.inference_mode():
            for position in range(prompt, prompt + new):
                start = time.perf_counter()
                at = torch.full((1, 1), position)
                logits = self._forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, position_ids=at).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
                times.append(time.perf_counter() - start)
        return times

    def warm_up(self, batch: int, prompt: int, new: int) -> None:
        """Do what is done once; the length of a static cache is compiled in."""
        self._steps(batch, prompt, new if self._compiled else 3)

    def decode(self, batch: int, prompt: int, new: int) -> float:
        """Return tokens/s of ``batch`` answers in lockstep: batch over the median step."""
        times: list[float] = []
        while sum(times) < self.SHORTEST_S:
            times += self._steps(batch, prompt, new)
        return batch / statistics.median(times)

    def prompt(self, length: int) -> None:
        """Read one prompt."""
        self._start(1, length, 8, self._forward)

    def prefill(self, length: int) -> float:
        """Return prompt tokens/s of one prompt, up to its first new token."""
        times: list[float] = []
        while len(times) < (3 if length <= 512 else 1) or sum(times) < self.SHORTEST_S:
            start = time.perf_counter()
            self.prompt(length)
            times.append(time.perf_counter() - start)
        return length / statistics.median(times)
