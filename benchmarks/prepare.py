"""Time from raw text to shards: all rules of the recipe `clean`, near-duplicates and decontamination, and where the time goes.

    python benchmarks/prepare.py DATA [--quick] [--mb 100] [--workers 2] [--recipe clean]

DATA holds pretrain/*_train.jsonl.gz, bench/ and tokenizers/deepseek_v2_tokenizer.json.gz (the environment variable DSV2_DATA does, too).
Prints MB of text (UTF-8) per second and the seconds of each step, then the same without rules and the pre-tokeniser alone.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from dsv2.config import load_recipe
from dsv2.data.documents import read_documents
from dsv2.data.prepare import prepare_by_recipe
from dsv2.data.recipe import PrepareRecipe
from dsv2.tokenizer.tokenizer import Tokenizer


def rows_of(file: Path, domain: str) -> Iterator[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf8") as lines:
        for line in lines:
            yield {**json.loads(line), "domain": domain}


def mixed_text(data: Path, target: Path, size: int) -> int:
    """Write rows of all training files, in turns, until `size` bytes of text; return the bytes."""
    streams = []
    for file in sorted((data / "pretrain").glob("*_train.jsonl.gz")):
        domain = file.name.split("_")[0]
        streams.append(rows_of(file, domain))
    written = 0
    with gzip.open(target, "wt", encoding="utf8", compresslevel=1) as out:
        for rows in zip_longest(*streams):
            for row in filter(None, rows):
                written += len(row["text"].encode())
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            if written >= size:
                break
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("DSV2_DATA"))
    parser.add_argument("--quick", action="store_true", help="6 MB instead of 100")
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipe", default="clean")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give DATA, or set DSV2_DATA")
    data = Path(options.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        packed = data / "tokenizers" / "deepseek_v2_tokenizer.json.gz"
        (folder / "tokenizer" / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
        source = folder / "text.jsonl.gz"
        size = mixed_text(data, source, int((6 if options.quick else options.mb) * 1e6))
        rules = load_recipe(options.recipe, PrepareRecipe, folder="prepare")
        for label, recipe, bench in (("rules and decontamination", rules, data / "bench"), ("no rules", PrepareRecipe(), None)):
            start = time.perf_counter()
            report = prepare_by_recipe(
                read_documents([source]), folder / "tokenizer", folder / "out", recipe, benchmarks=bench, workers=options.workers
            )
            seconds = time.perf_counter() - start
            print(f"{label}: {size / 1e6:.1f} MB in {seconds:.1f} s = {size / seconds / 1e6:.2f} MB/s with {options.workers} workers")
            counts = json.loads((folder / "out" / "report.json").read_text())
            steps = counts["time"]["cpu_seconds"]
            total = sum(steps.values())
            print(f"    CPU time {total:.1f} s: {options.workers * size / total / 1e6:.2f} MB/s if {options.workers} cores were idle")
            for step, spent in steps.items():
                print(f"    {step:24s} {spent:8.1f} s  {100 * spent / total:3.0f} %")
            print(f"    {report.num_tokens:,} tokens; dropped: { {rule: seen['documents'] for rule, seen in counts['dropped'].items()} }")
        alone(Tokenizer.load(folder / "tokenizer"), source)


def alone(tokenizer: Tokenizer, source: Path) -> None:
    """Time the tokenizer alone on a few megabytes, in its own threads."""
    texts, size = [], 0
    for document in read_documents([source]):
        texts.append(document.text)
        size += len(document.text.encode())
        if size > 6e6:
            break
    start = time.perf_counter()
    tokenizer.encode_batch(texts)
    print(f"encoding alone, the library's threads: {size / (time.perf_counter() - start) / 1e6:.2f} MB/s")


if __name__ == "__main__":
    main()
