"""Options of the verbs that use, change and describe models."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dsv2.verbs.options import (
    CacheBits,
    Checkpoint,
    Held,
    MaxLen,
    MaxTokens,
    OutFolder,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    Verify,
    engine_settings,
    text,
    verb,
)
from dsv2.verbs.table import Call


@verb(
    "runs/nano --prompt 'Once upon a time'",
    "runs/nano --prompt - --temperature 0 < prompt.txt",
    "v2-lite prompts.jsonl more.txt --out answers.jsonl --max-batch 16",
)
def generate(
    path: Checkpoint,
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Files of prompts, .jsonl or .txt: a prompt a line.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", callback=text, help="Text to continue; - reads it from stdin.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="File for the answers to files of prompts.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Held = "auto",
    cache: CacheBits = "auto",
    max_len: MaxLen = None,
    threads: Threads = None,
    verify: Verify = False,
    max_batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Answers to files written at once; 8 without it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, tokens and the reason of the end.")] = False,
) -> Call:
    """Streams the continuation to stdout. Lines of a .jsonl file are {"prompt": TEXT}, {"messages": [...]} or {"tokens": [...]}, with "id"
    and sampling fields such as "temperature", "n", "stop" or "logprobs" where wanted; all are checked before any runs. The answers are JSON
    lines in the order of the prompts; an interrupted batch goes on where it stopped. With --seed each line has its own, counted from N.
    """
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    asked = {"path": path, "prompt": prompt, "files": files or [], "out": out}
    settings = engine_settings(cache, max_len, threads) | ({} if max_batch is None else {"max_batch": max_batch})
    return Call("generate", {**asked, **sampling, "dtype": dtype, "verify": verify, "as_json": json, **settings})


@verb("runs/nano", "runs/nano --system 'You answer in one sentence.' --temperature 0.3")
def chat(
    path: Checkpoint,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", callback=text, help="What the model is told before the conversation.")
    ] = None,
    template: Annotated[
        Literal["v2", "v2.5"] | None, typer.Option(help="How a conversation is written; without it as the tokenizer says.")
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Held = "auto",
    cache: CacheBits = "auto",
    max_len: MaxLen = None,
    threads: Threads = None,
    verify: Verify = False,
) -> Call:
    """In the chat, /help lists what can be typed. From a pipe, every line of stdin is a turn."""
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = engine_settings(cache, max_len, threads)
    asked = {"path": path, "system": system, "template": template}
    return Call("chat", {**asked, **sampling, "dtype": dtype, "verify": verify, **settings})


@verb(
    "deepseek-ai/DeepSeek-V2-Lite --dtype int8 --out v2-lite-int8",
    "runs/nano --out nano",
    "runs/nano --dtype q8_0 --out nano.gguf",
    "merge chat/ coder/ --weights 0.5,0.5 --out merged",
    "random:v2-lite --out random-v2-lite",
)
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[merge] SOURCE...", help="A model folder, run, tour, model id on the hub, or random:PRESET; several after 'merge'."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR|FILE.gguf", help="Folder or GGUF file to write.")],
    to: Annotated[Literal["hf", "gguf"] | None, typer.Option(help="Form of the result; without it FILE.gguf means gguf.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "int8", "q8_0", "q4_0"] | None,
        typer.Option(help="Of the weights; without it as they are (gguf: bf16). int8: folders; q8_0, q4_0: GGUF."),
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="W,W", help="Of a merge, with the sum 1; without it equal.")] = None,
    max_shard_gb: Annotated[float, typer.Option(metavar="GB", help="Largest file of a folder, 1e9 bytes.")] = 5.0,
) -> Call:
    """Streams tensor by tensor, so a model larger than memory is converted too. The result is a folder that transformers and vLLM read
    (int8: dsv2 alone), or a GGUF file for llama.cpp. A merge is the plain weighted mean, which is ours: V2.5's method is not public.
    """
    try:
        parts = None if weights is None else [float(part) for part in weights.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights = {weights!r} must be numbers with commas between them") from error
    arguments = {"targets": sources, "out": out, "to": to, "dtype": dtype, "weights": parts, "max_shard_gb": max_shard_gb}
    return Call("convert", arguments)


@verb(
    "deepseek-ai/DeepSeek-V2-Lite --out v2-lite-packed", "runs/nano --bits 8 --out nano-8bit", "random:v2-lite --bits 4 --out random-4bit"
)
def quantize(
    target: Annotated[str, typer.Argument(metavar="PATH", help="A model folder, run, tour, model id on the hub, or random:PRESET.")],
    out: OutFolder,
    bits: Annotated[
        Literal["4", "mixed", "8", "bf16", "fp32"],
        typer.Option(help="Of a weight; mixed: experts 4, attention, shared experts, head and embedding 8. Groups of 32 share a scale."),
    ] = "mixed",
) -> Call:
    """Streams matrix by matrix, so a model larger than memory is packed too. generate, chat and serve read the result in seconds."""
    return Call("quantize", {"target": target, "out": out, "scheme": bits})


@verb("runs/nano --out report.html", "runs/a runs/b --out compare.html", "runs/grpo --out grpo.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of training runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="File to write.")],
) -> Call:
    """The file holds everything that it shows: loss, bits per byte by domain, load of the experts, samples; accuracy and calibration of
    reward models; rewards, KL and lengths of GRPO runs. A GRPO run also leaves FILE-rollouts.html, to browse its rollouts.
    """
    return Call("report", {"runs": runs, "out": out})


@verb("v2", "runs/nano", "v2 --tensors", "v2-lite --json")
def info(
    target: Annotated[str, typer.Argument(metavar="PATH|PRESET", help="A model folder, a run, a tour, a config.json, or a preset's name.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape instead; with --json as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> Call:
    """Exact arithmetic with its formulas, no weights are read: parameters, cache, memory, context, and what the model can do."""
    return Call("info", {"target": target, "tensors": tensors, "as_json": json})


@verb(
    "train v2",
    "train v2 pp=8 dp=32 recompute=full",
    "train v2 --search gpus=1024 --out scaling.png",
    "serve v2",
    "serve v2-lite hardware=a100 gpus=1 cache_bits=8 --json",
)
def plan(
    what: Annotated[Literal["train", "serve"], typer.Argument(metavar="train|serve", help="What to plan.")],
    target: Annotated[str, typer.Argument(metavar="PATH|PRESET", help="A model folder, a run, a tour, a config.json, or a preset's name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Hardware, layout, traffic; docs/plan.md.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Try every layout, keep what KEY=VALUE states, explain the best.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png|DIR", help="Draw: training from 8 to 16,384 GPUs, or serving by context.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> Call:
    """Memory, bubble, all-to-all, MFU, GPU-hours; or cache, requests, tokens/s, price: how each comes about, and what it assumes."""
    arguments = {"what": what, "target": target, "overrides": overrides or [], "search": search, "out": out, "as_json": json}
    return Call("plan", arguments)


@verb("")
def doctor() -> Call:
    """Python, torch, memory, disk, optional packages: what to send along with a question."""
    return Call("doctor", {})
