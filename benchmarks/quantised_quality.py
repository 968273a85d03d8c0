"""What few bits cost: perplexity of a trained model with its weights and its latent cache in every format, against fp32 for both.

    dsv2 tour --out tour                                                            # trains a model, 10 minutes
    python benchmarks/quantised_quality.py tour/pretrain [--rows 48] [--json FILE]  # 2 minutes
    python benchmarks/quantised_quality.py tour/pretrain --quick

Claim: 8-bit weights and an 8-bit cache cost next to nothing, 4-bit experts and a 6-bit cache little. MODEL is a tour, a run or a
checkpoint; held-out text is the validation part of the shipped corpus, the same rows of whole units of 256 tokens for all. Each is scored
by the engine in both readings: as a prompt (log-probabilities of a request), which is expanded, and as an answer, which is absorbed. One
more row rounds the weights of "4" plainly, with the largest weight of a group at 7 steps, instead of searching the scale.

"+-" is one standard error of the change, over the rows, each compared with itself. Prints ``ratio NAME VALUE``: perplexity with fp32 over
perplexity with few bits, in the name's weights, cache and reading; 1 is as good.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does: huge pages for large tensors

import numpy as np
import torch

from dsv2.assets import DOMAINS, corpus_path
from dsv2.checkpoint.convert import open_input
from dsv2.checkpoint.source import Converted, Source, is_int8
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.data.documents import read_documents
from dsv2.engine.blocks import blocks_for
from dsv2.engine.cache import NAMES, LatentStore
from dsv2.engine.engine import Engine
from dsv2.engine.layout import FILE, SCHEMES, Scheme
from dsv2.engine.native import NativeStack, Piece, StackWeights
from dsv2.engine.quantize import pack_folder
from dsv2.engine.request import Request, SamplingParams
from dsv2.engine.sampler import read_logprobs
from dsv2.engine.sequence import EXPANDED_UNIT
from dsv2.engine.weights import load_packed
from dsv2.kernels.formats import GROUP
from dsv2.model.accounting import count_parameters
from dsv2.model.config import ModelConfig
from dsv2.tokenizer.tokenizer import Tokenizer

LONGEST_ROW = 1024  # tokens; shorter where the model's context is
CACHES = tuple(NAMES)
WEIGHTS: tuple[Scheme, ...] = tuple(reversed(SCHEMES))  # the widest first: it is what the others are compared with
READINGS = ("prompt", "answer")
PLAIN = "4, plainly"
SCORED_ROWS = 128  # of logits at a time


@dataclass(frozen=True)
class Window:
    """``tokens``: a row and the label of its last token; ``num_bytes``: of the text that the labels stand for."""

    domain: str
    tokens: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Scored:
    """One configuration in one reading. ``nll``: nats of each window, in order."""

    weights: str
    cache: str
    reading: str
    nll: tuple[float, ...]


def windows_of(tokens: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    """Cut a document into rows of ``length`` tokens, each with the next token behind it; what is left at its end is left out."""
    for start in range(0, len(tokens) - length, length):
        yield tuple(tokens[start : start + length + 1])


def spread(count: int, of: int) -> list[int]:
    """Return ``count`` indices below ``of`` at even distances; all of them if there are no more."""
    return [index * of // count for index in range(count)] if count < of else list(range(of))


def held_out(tokenizer: Tokenizer, length: int, rows: int) -> list[Window]:
    """Return ``rows`` windows of each domain, spread evenly over its validation text."""
    documents = list(read_documents([corpus_path("validation")]))
    chosen: list[Window] = []
    for domain in DOMAINS:
        encoded = ([*tokenizer.encode(each.text), tokenizer.eos_id] for each in documents if each.domain == domain)
        cut = [window for tokens in encoded for window in windows_of(tokens, length)]
        for index in spread(rows, len(cut)):
            labels = (token for token in cut[index][1:] if token != tokenizer.eos_id)  # the end of a document counts, but is no text
            chosen.append(Window(domain, cut[index], sum(len(tokenizer.token_bytes(token)) for token in labels)))
    return chosen


class PlainWeights:
    """A source whose matrices are rounded to 4 bits already, plainly; packing them as 4 bits finds these values again.

    But for kv_b_proj, whose groups run along other columns once it is packed, and the router, which is never rounded.
    """

    def __init__(self, source: Source) -> None:
        self.config, self.specs, self._source = source.config, source.specs, source

    def read(self, name: str) -> torch.Tensor:
        weight = self._source.read(name)
        return weight if weight.ndim == 1 or name.endswith(("kv_b_proj.weight", "mlp.gate.weight")) else rounded_plainly(weight)


def rounded_plainly(weight: torch.Tensor) -> torch.Tensor:
    """Return fp32 values: per group of 32 columns codes from -7 to 7, the largest magnitude at 7, with a bf16 scale."""
    rows, cols = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -cols % GROUP)).unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).float()
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-7, 7)
    return (codes * scale).flatten(1)[:, :cols].contiguous()


def pack(source: Source, folder: Path, scheme: Scheme, room: int) -> tuple[StackWeights, float]:
    """Return a packed model that takes requests of ``room`` tokens, and the bits a weight of its file."""
    folder.mkdir()
    pack_folder(source, folder, scheme)
    weights = load_packed(folder)
    bits = 8 * (folder / FILE).stat().st_size / count_parameters(source.config).total
    longest = max(room, source.config.max_position_embeddings)
    return replace(weights, config=source.config.model_copy(update={"max_position_embeddings": longest})), bits


def score_prompts(weights: StackWeights, tokenizer: Tokenizer, cache: str, windows: Sequence[Window]) -> tuple[list[float], int]:
    """Return the NLL of each window as a prompt, and the bytes a token that the engine states of its cache."""
    room = len(windows[0].tokens) + 1  # the token that every request must be given is drawn, and never run
    engine = Engine(weights, tokenizer, max_batch=2, max_len=room, cache=cache, reuse=False, speculate=False)  # type: ignore[arg-type]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    try:
        outputs = engine.generate([Request(str(index), window.tokens, asked) for index, window in enumerate(windows)])
        return [-sum(entry.logprob for entry in output.prompt_logprobs or ()) for output in outputs], engine.cache_bytes_per_token
    finally:
        engine.close()


def open_absorbed(weights: StackWeights, tokenizer: Tokenizer, cache: str, length: int) -> NativeStack:
    store = LatentStore(weights.config, NAMES[cache], blocks_for(length))
    return NativeStack(weights, store, threads=torch.get_num_threads(), num_tokens=tokenizer.num_tokens)


def absorbed_logprobs(stack: NativeStack, tokenizer: Tokenizer, tokens: Sequence[int], at_once: int) -> list[float]:
    """Return the log-probability of each token but the first, all read in the absorbed way, ``at_once`` tokens a step."""
    blocks, found = range(blocks_for(len(tokens))), []
    for start in range(0, len(tokens) - 1, at_once):
        given = tokens[start : min(start + at_once, len(tokens) - 1)]
        rows = stack.step([Piece(given, start, blocks, False, range(len(given)))])
        labels = tokens[start + 1 : start + 1 + len(given)]
        found += [entry.logprob for entry in read_logprobs(rows.logits, labels, 0, num_tokens=tokenizer.num_tokens)]
    return found


def score_answers(weights: StackWeights, tokenizer: Tokenizer, cache: str, windows: Sequence[Window]) -> list[float]:
    """Return the NLL of each window as the engine sees an answer; steps of many tokens give what steps of one give, which is looked at."""
    stack = open_absorbed(weights, tokenizer, cache, len(windows[0].tokens))
    try:
        first = absorbed_logprobs(stack, tokenizer, windows[0].tokens, 1)
        assert first == absorbed_logprobs(stack, tokenizer, windows[0].tokens, SCORED_ROWS), "token by token is not the same"
        return [-sum(absorbed_logprobs(stack, tokenizer, window.tokens, SCORED_ROWS)) for window in windows]
    finally:
        stack.close()


def number_bits(config: ModelConfig, cache: str) -> float:
    """Bits of a cached number by spec 7, keys included: written down once more, apart from the engine's own arithmetic."""
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    of_latent = {"fp32": 32 * latent, "bf16": 16 * latent, "8": 8 * latent + 16 * math.ceil(latent / 64), "6": latent * (4 + 24 / 32)}
    return (of_latent[cache] + rope * (32 if cache == "fp32" else 16)) / (latent + rope)


def checked_bytes(config: ModelConfig, cache: str, measured: int) -> int:
    """Compare the cache's bytes a token with the formula; return them."""
    expected = config.num_hidden_layers * config.latent_dim * number_bits(config, cache) / 8
    assert measured == expected, f"cache {cache}: {measured} bytes a token, not {expected}"
    return measured


def change_of(nll: Sequence[float], base: Sequence[float], labels: int) -> tuple[float, float]:
    """Return the change of perplexity in percent and its standard error, over windows of ``labels`` labels each."""
    differences = (np.array(nll) - np.array(base)) / labels
    ratio, error = math.exp(differences.mean()), differences.std(ddof=1) / math.sqrt(len(differences))
    return 100 * (ratio - 1), 100 * ratio * float(error)


def bits_per_byte(nll: Sequence[float], windows: Sequence[Window]) -> dict[str, float]:
    """Return it by domain, and under "mean" their mean."""
    result = {}
    for domain in DOMAINS:
        mine = [(value, window.num_bytes) for value, window in zip(nll, windows, strict=True) if window.domain == domain]
        result[domain] = sum(value for value, _ in mine) / (math.log(2) * sum(size for _, size in mine))
    return result | {"mean": sum(result.values()) / len(result)}


def row_length(config: ModelConfig) -> int:
    """Return the longest row of whole units that are read in the expanded way."""
    length = min(LONGEST_ROW, config.max_position_embeddings) // EXPANDED_UNIT * EXPANDED_UNIT
    if length == 0:
        sys.exit(f"the model's context is {config.max_position_embeddings} tokens; rows of at least {EXPANDED_UNIT} are scored")
    return length


def figures(scored: Scored, base: Scored, windows: Sequence[Window]) -> dict[str, object]:
    labels = len(windows[0].tokens) - 1
    change, error = change_of(scored.nll, base.nll, labels)
    perplexity = math.exp(sum(scored.nll) / (labels * len(windows)))
    named = {name: value for name, value in asdict(scored).items() if name != "nll"}
    return named | {"bits_per_byte": bits_per_byte(scored.nll, windows), "perplexity": perplexity, "change": change, "error": error}


def measure(source: Source, tokenizer: Tokenizer, windows: Sequence[Window]) -> tuple[list[Scored], dict[str, float], dict[str, int]]:
    """Score every configuration; return also the bits a weight of every scheme and the bytes a token of every cache."""
    scored: list[Scored] = []
    weight_bits: dict[str, float] = {}
    token_bytes: dict[str, int] = {}
    packed: list[tuple[str, Scheme, Source, Sequence[str]]] = [(scheme, scheme, source, CACHES) for scheme in WEIGHTS]
    packed.append((PLAIN, "4", PlainWeights(source), CACHES[:1]))
    with tempfile.TemporaryDirectory() as place:
        for number, (name, scheme, given, caches) in enumerate(packed):
            weights, weight_bits[name] = pack(given, Path(place) / str(number), scheme, len(windows[0].tokens) + 1)
            for cache in caches:
                began = time.perf_counter()
                prompts, token_bytes[cache] = score_prompts(weights, tokenizer, cache, windows)
                answers = score_answers(weights, tokenizer, cache, windows)
                for reading, nll in zip(READINGS, (prompts, answers), strict=True):
                    scored.append(Scored(name, cache, reading, tuple(nll)))
                print(f"weights {name}, cache {cache}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return scored, weight_bits, token_bytes


def show(results: dict) -> None:
    """Print the table in Markdown, and a ratio a line."""
    columns = ["weights", "bits a weight", "cache", "bits a number", *DOMAINS, "mean", "perplexity", "change", "change as an answer"]
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    configurations = iter(results["configurations"])
    for prompt, answer in zip(configurations, configurations, strict=True):
        cells = [prompt["weights"], f"{results['weight_bits'][prompt['weights']]:.2f}", prompt["cache"]]
        cells.append(f"{results['number_bits'][prompt['cache']]:.2f}")
        cells += [f"{prompt['bits_per_byte'][name]:.4f}" for name in (*DOMAINS, "mean")]
        cells += [f"{prompt['perplexity']:.3f}", *(f"{each['change']:+.3f} +- {each['error']:.3f} %" for each in (prompt, answer))]
        print("| " + " | ".join(cells) + " |")
    print()
    for each in results["configurations"]:
        name = f"perplexity_{each['weights']}_cache_{each['cache']}_{each['reading']}".replace(", ", "_")
        print(f"ratio {name} {1 / (1 + each['change'] / 100):.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a tour, run or checkpoint, not packed")
    parser.add_argument("--rows", type=int, default=48, help="of each domain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--quick", action="store_true", help="4 rows of each domain")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = open_input(arguments.model)
    source = Converted(given.source, torch.float32) if is_int8(given.source) else given.source
    tokenizer = Tokenizer.load(latest_checkpoint(arguments.model))
    length = row_length(source.config)
    windows = held_out(tokenizer, length, 4 if arguments.quick else arguments.rows)
    counts = {domain: sum(window.domain == domain for window in windows) for domain in DOMAINS}
    print(f"{len(windows) * length:,} tokens in rows of {length}: " + ", ".join(f"{domain} {count}" for domain, count in counts.items()))
    scored, weight_bits, token_bytes = measure(source, tokenizer, windows)
    base = {each.reading: each for each in scored[: len(READINGS)]}  # fp32 for both
    results = {
        "tokens": len(windows) * length, "row": length, "rows": counts, "torch": torch.__version__, "weight_bits": weight_bits,
        "number_bits": {cache: number_bits(source.config, cache) for cache in CACHES},
        "token_bytes": {cache: checked_bytes(source.config, cache, size) for cache, size in token_bytes.items()},
        "configurations": [figures(each, base[each.reading], windows) for each in scored],
    }  # fmt: skip
    between = np.abs(np.array(base["answer"].nll) - np.array(base["prompt"].nll)).max() / length
    print(f"fp32 for both: the two readings differ by at most {between:.0e} nats a token in any row")
    for cache, size in results["token_bytes"].items():
        print(f"cache {cache}: {size} bytes a token over {source.config.num_hidden_layers} layers, as the formula says")
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
