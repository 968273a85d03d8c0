"""Held-out bits per byte of optimizer.kind = muon and of adamw: same data, model and machine, at equal tokens and at equal wall time.

    python benchmarks/muon_vs_adamw.py --recipe tour --out runs/muon-tour
    python benchmarks/muon_vs_adamw.py --recipe nano --override learning_rate.warmup_steps=50 --data DATA \\
        --tokens 5_000_000 --sweep-tokens 1_200_000 --adamw-peaks 1e-3,2e-3,4e-3 --out runs/muon-nano
    python benchmarks/muon_vs_adamw.py --quick --out runs/muon-quick

DATA holds NAME_train.jsonl.gz and NAME_val.jsonl.gz, NAME being the domain; without it the shipped corpus is used. In order:

1. What a whole step costs with each, in pairs of steps on the same batch, and what the optimiser alone costs.
2. For each its best peak at --sweep-tokens; while the best is the lowest or highest tried, the next one is tried too.
3. For each seed: AdamW on --tokens, Muon on --tokens, and Muon on as many tokens as the time of AdamW's run allows by the cost of 1.
   Schedules end with the tokens, so each run is whole.

A warm-up longer than --sweep-tokens would compare warm-ups: override it. Runs go through the training stage (a recipe and overrides) and
lie in --out; the same command goes on after an interruption. Seconds are those of training steps as logged, without validation and
checkpoints. Prints `ratio NAME VALUE`, above 1: Muon is better; and writes
results.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dsv2.assets import corpus_path
from dsv2.config import load_recipe
from dsv2.data.documents import Document, read_documents
from dsv2.data.loader import Loader
from dsv2.data.packing import Rows
from dsv2.data.prepare import prepare
from dsv2.files import atomic_write_json
from dsv2.metrics import read_metrics
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.corpus import Corpus
from dsv2.train.optimizer import make_optimizer
from dsv2.train.precision import autocast_dtype, make_deterministic, resolve_precision
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.step import TrainingDiverged, train_step

KINDS = ("adamw", "muon")
MOST_PEAKS = 6
TOKENIZER_BYTES = 10_000_000  # of each domain, to train the tokenizer on
HELD_OUT_BYTES = 200_000  # of each domain, of DATA


def documents(data: Path | None, split: str, most_bytes: float) -> Iterator[Document]:
    """Yield the documents of a split, of each domain at most so many bytes."""
    if data is None:
        yield from read_documents([corpus_path("train" if split == "train" else "validation")])
        return
    for file in sorted(data.glob(f"*_{split}.jsonl.gz")):
        size = 0
        for document in read_documents([file], domain=file.name.split("_")[0]):
            size += len(document.text.encode())
            if size > most_bytes:
                break
            yield document


def corpus_of(options: argparse.Namespace) -> Corpus:
    """Return the corpus in OUT/data, made on the first call with a tokenizer of the preset's size."""
    folder = options.out / "data"
    if not (folder / "validation").is_dir():
        vocab_size = recipe_of(options).model_config_for(None).vocab_size
        texts = (document.text for document in documents(options.data, "train", TOKENIZER_BYTES))
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
        tokenizer.save(folder / "tokenizer")
        prepare(documents(options.data, "train", options.mb * 1e6), tokenizer, folder / "train")
        prepare(documents(options.data, "val", HELD_OUT_BYTES), tokenizer, folder / "validation")
    return Corpus.open(folder)


def recipe_of(options: argparse.Namespace, *overrides: str) -> PretrainRecipe:
    return load_recipe(options.recipe, PretrainRecipe, folder="pretrain", overrides=[*options.override, *overrides])


# What a step costs ------------------------------------------------------------------------------------------------------------------


def step_cost(options: argparse.Namespace, corpus: Corpus) -> dict[str, float]:
    """Time whole steps in pairs, one of each kind on the same batch, the order changing; the first two pairs do not count."""
    sides = {}
    for kind in KINDS:
        recipe = recipe_of(options, f"optimizer.kind={kind}")
        autocast = autocast_dtype(resolve_precision(recipe.run.precision, torch.device("cpu")))
        model = Transformer(recipe.model_config_for(corpus.tokenizer))
        initialise(model, recipe.run.seed)
        optimizer = make_optimizer(model, recipe.optimizer, products=autocast)
        sides[kind] = (model.train(), optimizer, Stopwatch(optimizer))
    batches = Loader(Rows(corpus.train, recipe.run.seq_len), seed=0).batches(0, lambda consumed: recipe.batch.sequences)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.pairs + 2):
        micro = next(batches).split(recipe.batch.micro_sequences)
        for kind in KINDS if number % 2 else KINDS[::-1]:
            model, optimizer, _ = sides[kind]
            start = time.perf_counter()
            train_step(
                model, optimizer, micro, lr=recipe.learning_rate.peak / 10, clip_norm=recipe.optimizer.clip_norm,
                balance=recipe.balance, autocast=autocast,
            )  # fmt: skip
            times[kind].append(time.perf_counter() - start)
    pairs = list(zip(*(seconds[2:] for seconds in times.values()), strict=True))
    ratios = sorted(muon / adamw for adamw, muon in pairs)
    return {
        "muon_over_adamw": statistics.median(ratios),
        "lower_quartile": ratios[len(ratios) // 4],
        "upper_quartile": ratios[3 * len(ratios) // 4],
        **{f"{kind}_step_s": statistics.median(times[kind][2:]) for kind in KINDS},
        **{f"{kind}_optimizer_s": statistics.median(sides[kind][2].seconds[2:]) for kind in KINDS},
    }


class Stopwatch:
    """Times every ``optimizer.step()`` from outside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds: list[float] = []
        optimizer.register_step_pre_hook(self.start)
        optimizer.register_step_post_hook(self.stop)

    def start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


# Runs -------------------------------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, corpus: Corpus, name: str, kind: str, peak: float, seed: int, tokens: int) -> dict[str, Any]:
    """Train a run to its end, or read what it ended with."""
    recipe = recipe_of(
        options, f"optimizer.kind={kind}", f"learning_rate.peak={peak!r}", f"run.seed={seed}", f"run.tokens={tokens}",
        "run.validate_every=1_000_000", "run.checkpoint_every=200", "run.keep=1",
    )  # fmt: skip
    row: dict[str, Any] = {"run": name, "kind": kind, "peak": peak, "seed": seed, "tokens": tokens}
    try:
        pretrain(recipe, corpus, options.out / name)
    except TrainingDiverged as error:
        return row | {"bits_per_byte": float("inf"), "diverged": error.message}
    lines = read_metrics(options.out / name / "metrics.jsonl")
    last = [line for line in lines if line["kind"] == "train"][-1]
    domains = [line for line in lines if line["kind"] == "validation"][-1]["bits_per_byte"]
    mean = statistics.mean(domains.values())
    row |= {"tokens": last["tokens"], "seconds": last["elapsed_s"], "bits_per_byte": mean, "domains": domains}
    print(f"{name}: {mean:.4f} bits per byte after {last['tokens']:,} tokens, {last['elapsed_s']:.0f} s", flush=True)
    return row


def sweep(options: argparse.Namespace, corpus: Corpus, kind: str) -> list[dict[str, Any]]:
    """Return the runs of a kind over peaks, in the order of the peaks, the best of them not at an edge unless there were too many."""
    peaks = sorted(getattr(options, f"{kind}_peaks"))
    done: dict[float, dict[str, Any]] = {}
    while True:
        for peak in peaks:
            if peak not in done:
                done[peak] = train(options, corpus, f"sweep-{kind}-{peak:g}", kind, peak, 0, options.sweep_tokens)
        best = peaks.index(best_peak(list(done.values())))
        if 0 < best < len(peaks) - 1 or len(peaks) in (1, MOST_PEAKS):
            return [done[peak] for peak in peaks]
        further = peaks[0] ** 2 / peaks[1] if best == 0 else peaks[-1] ** 2 / peaks[-2]
        peaks = sorted([*peaks, float(f"{further:.3g}")])


def best_peak(rows: list[dict[str, Any]]) -> float:
    best: float = min(rows, key=lambda row: row["bits_per_byte"])["peak"]
    return best


def whole_batches(options: argparse.Namespace, tokens: float) -> int:
    recipe = recipe_of(options)
    size = recipe.batch.sequences * recipe.run.seq_len
    return max(1, round(tokens / size)) * size


# Report -----------------------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any], name: str) -> None:
    """Print the table and the ratios."""
    cost = results["cost"]
    print(f"\n{name}: {results['parameters']:,} parameters, {results['threads']} threads, {results['precision']}")
    for kind in KINDS:
        print(f"{kind}: step {cost[f'{kind}_step_s'] * 1e3:.1f} ms, of it optimiser {cost[f'{kind}_optimizer_s'] * 1e3:.1f} ms")
    spread = f"{cost['lower_quartile']:.3f} to {cost['upper_quartile']:.3f}"
    print(f"a step of muon over one of adamw: {cost['muon_over_adamw']:.3f} (middle half of the pairs: {spread})")
    print("\n| what | optimiser | peak | seed | tokens | seconds | bits per byte |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in [*results["sweep"], *results["final"]]:
        what = row["run"].split("-")[0] if row["run"].startswith("sweep") else row["compared"]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        print(f"| {what} | {row['kind']} | {row['peak']:g} | {row['seed']} | {row['tokens']:,} | {seconds} | {row['bits_per_byte']:.4f} |")
    print(f"\nratio muon_{name}_step_time {1 / cost['muon_over_adamw']:.3f}")
    for what in ("equal tokens", "equal wall time"):
        theirs = {row["seed"]: row for row in results["final"] if row["compared"] == "baseline"}
        ours = {row["seed"]: row for row in results["final"] if row["compared"] == what}
        gains = [theirs[seed]["bits_per_byte"] / ours[seed]["bits_per_byte"] for seed in theirs]
        each = ", ".join(f"{gain:.4f}" for gain in gains)
        print(f"ratio muon_{name}_bits_per_byte_at_{what.replace(' ', '_')} {statistics.mean(gains):.4f}  (by seed: {each})")
        seconds = [ours[seed]["seconds"] / theirs[seed]["seconds"] for seed in theirs if "seconds" in ours[seed]]
        print(f"  seconds as logged, muon over adamw: {', '.join(f'{value:.3f}' for value in seconds)}")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tour", help="a shipped recipe of pre-training, or a path")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for both")
    parser.add_argument("--data", type=Path, help="folder of NAME_train.jsonl.gz and NAME_val.jsonl.gz")
    parser.add_argument("--mb", type=float, default=15, help="megabytes of text of each domain of DATA")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, help="of the AdamW runs; absent: the recipe's")
    parser.add_argument("--sweep-tokens", type=int, default=600_000)
    parser.add_argument("--adamw-peaks", type=numbers, default=[1.5e-3, 3e-3, 6e-3])
    parser.add_argument("--muon-peaks", type=numbers, default=[3e-3, 6e-3, 1.2e-2])
    parser.add_argument("--seeds", type=int, default=2, help="seeds 1, 2, ... of the comparison; the sweep has seed 0")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of timed steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a minute model and a few steps: does the script work?")
    options = parser.parse_args()
    if options.quick:
        options.recipe, options.sweep_tokens, options.pairs = "tour-smoke", 2048, 4
    options.tokens = whole_batches(options, options.tokens or recipe_of(options).run.tokens)
    options.sweep_tokens = whole_batches(options, options.sweep_tokens)
    return options


def main() -> None:
    options = arguments()
    make_deterministic(options.threads)
    corpus = corpus_of(options)
    name, file = Path(options.recipe).stem, options.out / "results.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    cost = before.get("cost") or step_cost(options, corpus)  # kept: the length of the last runs depends on it
    recipe = recipe_of(options)
    config = recipe.model_config_for(corpus.tokenizer)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    results: dict[str, Any] = {
        "recipe": options.recipe, "overrides": options.override, "threads": options.threads, "torch": torch.__version__,
        "precision": resolve_precision(recipe.run.precision, torch.device("cpu")), "parameters": parameters, "cost": cost,
        "sweep": [], "final": [],
    }  # fmt: skip
    atomic_write_json(file, results)
    swept = {kind: sweep(options, corpus, kind) for kind in KINDS}
    results["sweep"] = list(chain.from_iterable(swept.values()))
    best = {kind: best_peak(rows) for kind, rows in swept.items()}
    shorter = whole_batches(options, options.tokens / cost["muon_over_adamw"])
    for seed in range(1, options.seeds + 1):
        for compared, kind, tokens in (
            ("baseline", "adamw", options.tokens),
            ("equal wall time", "muon", shorter),
            ("equal tokens", "muon", options.tokens),
        ):
            row = train(options, corpus, f"final-{kind}-{tokens}-seed{seed}", kind, best[kind], seed, tokens)
            results["final"].append(row | {"compared": compared})
            atomic_write_json(file, results)
    report(results, name)


if __name__ == "__main__":
    main()
