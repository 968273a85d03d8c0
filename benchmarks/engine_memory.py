"""What the engine holds in memory with a full cache: at most the packed file, the cache and 600 MiB.

    python benchmarks/engine_memory.py tour random:small random:v2-lite [--scheme mixed] [--cache auto] [--requests 4] [--len 2048]
    python benchmarks/engine_memory.py --quick                          # random:nano, short requests

MODEL is packed first into a temporary folder (--at FOLDER: there, and kept), unless it is a packed folder. A fresh process then opens it
with a cache for exactly the requests that it gets: different prompts of random tokens and 32 decoded ones each, until the cache is full.
Its resident set at the end and at its peak are what the kernel counts (VmRSS, VmHWM), in MiB, Python, torch and the tokenizer included. A
model without a tokenizer gets one of 4096 ids trained on the shipped corpus, or --tokenizer FILE. Prints ``ratio NAME VALUE``: file,
cache and 600 MiB over the peak; above 1 the claim holds.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ALLOWANCE_MIB = 600
ANSWER_LEN = 32  # tokens of a request that are decoded; the others are its prompt
MIB = 1 << 20


def resident() -> dict[str, float]:
    """Return VmRSS and VmHWM of this process in MiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:")}


def packed(target: str, at: Path, scheme: str) -> Path:
    """Return a packed folder, made in ``at`` if the target is none and it is not there."""
    from dsv2.engine.quantize import run
    from dsv2.engine.weights import packed_scheme

    if Path(target).is_dir() and packed_scheme(Path(target)) is not None:
        return Path(target)
    folder = at / f"{target.replace(':', '-').replace('/', '-')}-{scheme}"
    if packed_scheme(folder) is None:
        run(target, out=folder, scheme=scheme)
    return folder


def small_tokenizer(at: Path) -> Path:
    """Return the folder of a tokenizer trained on some of the shipped corpus."""
    from dsv2.assets import corpus_path
    from dsv2.data.documents import read_documents
    from dsv2.tokenizer.train import train_tokenizer

    train_tokenizer([document.text for document in read_documents([corpus_path("train")])][:100], vocab_size=4096).save(at / "tokenizer")
    return at / "tokenizer"


def serve(folder: Path, tokenizer_at: Path, cache: str, requests: int, length: int) -> dict:
    """Open a packed model, fill its cache and return what that took, sizes in MiB."""
    import torch

    from dsv2.engine.engine import Engine
    from dsv2.engine.layout import FILE
    from dsv2.engine.request import Request, SamplingParams
    from dsv2.engine.weights import load_packed, packed_scheme
    from dsv2.tokenizer.tokenizer import Tokenizer

    torch.set_num_threads(2)
    before = resident()["VmRSS"]
    weights, tokenizer = load_packed(folder), Tokenizer.load(tokenizer_at)
    length = min(length, weights.config.max_position_embeddings)
    engine = Engine(weights, tokenizer, max_batch=requests, max_len=length, cache=cache)
    draw = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=ANSWER_LEN, ignore_eos=True)
    prompts = [[draw.randrange(tokenizer.num_tokens) for _ in range(length - ANSWER_LEN)] for _ in range(requests)]
    outputs = engine.generate([Request(str(index), tuple(prompt), params) for index, prompt in enumerate(prompts)])
    used = sum(output.prompt_tokens + len(output.tokens) for output in outputs)
    assert used == engine.cache.num_tokens, f"{used} tokens do not fill a cache of {engine.cache.num_tokens}"
    held = resident()
    return {
        "scheme": packed_scheme(folder), "file": (folder / FILE).stat().st_size / MIB, "cache": engine.cache.num_bytes / MIB,
        "cache_tokens": engine.cache.num_tokens, "before": before, "rss": held["VmRSS"], "peak": held["VmHWM"],
    }  # fmt: skip


def measure(target: str, arguments: argparse.Namespace) -> dict:
    """Measure one model in a process of its own."""
    with contextlib.ExitStack() as stack:
        at = arguments.at or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = packed(target, at, arguments.scheme)
        tokenizer = arguments.tokenizer or (folder if (folder / "tokenizer.json").exists() else small_tokenizer(at))
        command = [sys.executable, __file__, str(folder), "--child", "--tokenizer", str(tokenizer), "--cache", arguments.cache]
        command += ["--requests", str(arguments.requests), "--len", str(arguments.len)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="a packed folder; a tour, run, checkpoint, model id or random:PRESET, which is packed")
    parser.add_argument("--scheme", default="mixed", help="of models that are packed here")
    parser.add_argument("--cache", default="auto", help="auto, fp32, bf16, 8 or 6")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--len", type=int, default=2048, help="tokens of a request, a multiple of 64; less where the context is shorter")
    parser.add_argument("--tokenizer", type=Path, help="a folder or tokenizer.json")
    parser.add_argument("--at", type=Path, help="folder for packed models, which stay there")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(serve(Path(arguments.models[0]), arguments.tokenizer, arguments.cache, arguments.requests, arguments.len)))
        return
    if arguments.quick:
        arguments.models, arguments.len = arguments.models or ["random:nano"], 256
    if not arguments.models:
        parser.error("name a model, or --quick")
    print("| model | weights | packed file | cache | tokens | resident | peak | beyond file and cache | before the model |")
    print("|" + " --- |" * 9)
    ratios = []
    for target in arguments.models:
        found = measure(target, arguments)
        together = found["file"] + found["cache"]
        sizes = [f"{found[name]:,.1f}" for name in ("file", "cache")] + [f"{found['cache_tokens']:,.0f}"]
        sizes += [f"{size:,.0f}" for size in (found["rss"], found["peak"], found["peak"] - together, found["before"])]
        print("| " + " | ".join([target, found["scheme"], *sizes]) + " |", flush=True)
        ratios.append((Path(target).name, (together + ALLOWANCE_MIB) / found["peak"]))
    for target, ratio in ratios:
        print(f"ratio memory_{target} {ratio:.3f}")


if __name__ == "__main__":
    main()
