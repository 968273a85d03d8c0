"""The verbs of the command line: where each goes, what it takes, and what its help says.

``VERBS`` says where each verb goes, in river order. Below it every verb declares its options in a function that only collects them into
a ``Call``; cli.py then runs the stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from dsv2 import __version__


class Verb(NamedTuple):
    """Where a verb goes, what it does in one line, and what to do when it was interrupted."""

    target: str
    summary: str
    resume: str = "nothing half-written is left; run the same command again"


VERBS: dict[str, Verb] = {
    "tour": Verb(
        "dsv2.tour:run",
        "The whole river on a CPU, in minutes: text to chat.",
        "run the same command again; it continues where it stopped",
    ),
    "tokenizer": Verb("dsv2.data.prepare:train_tokenizer_stage", "Train a tokenizer on text."),
    "prepare": Verb("dsv2.data.prepare:run", "Turn text into token shards for training.", "run the same command again"),
    "pretrain": Verb(
        "dsv2.samples:run",
        "Train a model on token shards.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "sft": Verb(
        "dsv2.samples:sft",
        "Fine-tune a model on conversations.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "reward": Verb(
        "dsv2.rl.reward_training:run",
        "Train a reward model on judged answers.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "dpo": Verb(
        "dsv2.rl.dpo:run",
        "Train a model on pairs of answers, offline.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "grpo": Verb(
        "dsv2.rl.grpo:run",
        "Improve a chat model by rewards on its own answers.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "generate": Verb(
        "dsv2.engine.terminal:generate", "Continue a prompt, or files of them.", "run the same command again; answers of files are kept"
    ),
    "chat": Verb("dsv2.engine.terminal:chat", "Talk to a model in the terminal.", "run the same command again"),
    "convert": Verb("dsv2.checkpoint.convert:run", "Change a model's dtype or files; GGUF; merge."),
    "quantize": Verb("dsv2.engine.quantize:run", "Pack a model into few bits for the engine."),
    "report": Verb("dsv2.report:run", "Write the curves and samples of runs into one HTML file."),
    "info": Verb("dsv2.info:run", "Count a model's parameters, FLOPs and cache bytes.", "run the same command again"),
    "plan": Verb("dsv2.plan:run", "Plan training or serving on a cluster: memory, time, cost.", "run the same command again"),
    "doctor": Verb("dsv2.doctor:run", "Say what this machine offers and what is missing.", "run the same command again"),
}
TRAINING = ("tour", "pretrain", "sft", "reward", "dpo", "grpo")


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed command line: the verb and the keyword arguments of its stage."""

    verb: str
    arguments: dict[str, Any]


# The verbs' options -----------------------------------------------------------------------------------------------------------------

app = typer.Typer(name="dsv2", rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def _verb(*examples: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Make a function the verb of its name; its docstring continues the summary, ``examples`` end the help."""

    def register(function: Callable[..., Call]) -> Callable[..., Call]:
        summary, more = VERBS[function.__name__].summary, " ".join((function.__doc__ or "").split())
        # \b: leave the lines of this paragraph as they are
        epilog = "\b\n" + "\n".join(["Examples:", *(f"  dsv2 {function.__name__} {example}".rstrip() for example in examples)])
        return app.command(function.__name__, help=f"{summary}\n\n{more}", short_help=summary, epilog=epilog)(function)

    return register


def _settings(cache: str, max_len: int | None, threads: int | None) -> dict[str, Any]:
    """Return the settings of the engine that a command line has in common with others."""
    return {"cache": cache, "max_len": max_len, "threads": threads}


def _text(value: str | None) -> str | None:
    """Refuse an argument whose bytes are no UTF-8, which Python hides in surrogates."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"not UTF-8 text at character {error.start}") from error
    return value


_READABLE = "Files or folders (txt, md, jsonl, jsonl.gz, jsonl.zst, parquet), or - for stdin"
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help=f"{_READABLE}.")]
SourcesAndValues = Annotated[
    list[str], typer.Argument(metavar="SOURCE... [KEY=VALUE]", help=f"{_READABLE}; and values to replace in the recipe.")
]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")]
InvalidUtf8 = Annotated[Literal["error", "replace"], typer.Option(help="What to do about bytes that are no UTF-8.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run or tour: its latest checkpoint is taken.")]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens to produce.")]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="0 always takes the likeliest token; without it as generation_config.json says, else 1.")
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0: from all.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Draw from the likeliest tokens that make up probability P.")]
Held = Annotated[
    Literal["auto", "fp32", "bf16", "int8"], typer.Option(help="Of the weights in memory; auto: the first of fp32, bf16, int8 that fits.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Same seed, same text.")]
CacheBits = Annotated[
    Literal["auto", "fp32", "bf16", "8", "6"], typer.Option(help="Bits of a number in the latent cache; auto: as the weights.")
]
MaxLen = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens of prompt and answer that the cache is made for; without it all it can hold.")
]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; without it torch decides.")]


@app.callback(invoke_without_command=True, epilog="`dsv2 VERB --help` explains a verb. To begin: dsv2 tour --out tour")
def _about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """DeepSeek-V2 as software: the whole life of a model, from raw text to a chat. The verbs, in the order the data flows:"""
    if version:
        print(__version__)
        raise typer.Exit()


@_verb("--out tour", "--size long --out tour-long", "--size smoke --out smoke")
def tour(
    out: OutFolder,
    size: Annotated[str, typer.Option(metavar="NAME", help="Size of the model and length of its training.")] = "standard",
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; without it torch decides.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, threads and machine: same weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue a tour found in DIR, or start it afresh.")] = True,
) -> Call:
    """Trains a tokenizer and a small DeepSeek-V2 on the text that ships with dsv2, and leaves DIR/report.html to look at."""
    return Call("tour", {"out": out, "size": size, "seed": seed, "threads": threads, "fresh": not resume})


@_verb("books/ --out data/tokenizer", "a.jsonl.gz b.txt --vocab-size 8192 --out data/tokenizer")
def tokenizer(
    sources: Sources,
    out: OutFolder,
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Size of the model's vocabulary; a multiple of 128.")] = 4096,
    invalid_utf8: InvalidUtf8 = "error",
) -> Call:
    """Byte-level BPE with DeepSeek's splitting rules and special tokens; transformers' AutoTokenizer reads the result."""
    return Call("tokenizer", {"sources": sources, "out": out, "vocab_size": vocab_size, "invalid_utf8": invalid_utf8})


@_verb(
    "books/ --tokenizer data/tokenizer --out data/train",
    "- --domain en --tokenizer data/tokenizer --out data/train < text.txt",
    "web/ code/ --recipe clean --decontaminate bench/ --workers 8 --tokenizer data/tokenizer --out data/train",
    "code/ duplicates.threshold=0.8 --recipe coder-v2-lite --tokenizer data/tokenizer --out data/train",
)
def prepare(
    sources: SourcesAndValues,
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Tokenizer to encode with.")],
    out: OutFolder,
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", callback=_text, help="Domain of documents that name none; else the file's or folder's.")
    ] = None,
    invalid_utf8: InvalidUtf8 = "error",
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Rules: plain, clean, coder-v2, coder-v2-lite, or a TOML file; docs/data.md.")
    ] = None,
    decontaminate: Annotated[Path | None, typer.Option(metavar="DIR", help="Drop documents that share text with these benchmarks.")] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; the result is the same for any number.")] = 1,
) -> Call:
    """Writes memory-mapped token ids with the documents' borders, and a manifest with counts and hashes. With a recipe: cleaned, without
    duplicates, and report.md says what was dropped and where the time went; interrupted, it then goes on from there.
    """
    given = {"sources": sources, "tokenizer": tokenizer, "out": out, "domain": domain, "invalid_utf8": invalid_utf8}
    return Call("prepare", {**given, "recipe": recipe, "decontaminate": decontaminate, "workers": workers})


@_verb(
    "nano --data data --out runs/nano",
    "nano learning_rate.peak=3e-4 --data data --out runs/nano",
    "nano --data data --out runs/nano --resume",
)
def pretrain(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a TOML file.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Holds tokenizer/, train/ and, if wanted, validation/.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run: checkpoints, metrics.jsonl, resolved recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to replace in the recipe.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint of the run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard as well.")] = False,
) -> Call:
    """The recipe says what to train and how; KEY=VALUE replaces single values, such as learning_rate.warmup_steps=100."""
    arguments = {"recipe": recipe, "overrides": overrides or [], "data": data, "out": out, "resume": resume, "tensorboard": tensorboard}
    return Call("pretrain", arguments)


@_verb(
    "runs/nano --data chats.jsonl --out runs/chat",
    "tour model.start=runs/tour --data chats.jsonl --validation held-out.jsonl --out runs/chat",
    "v2 model.start=deepseek-ai/DeepSeek-V2-Lite lora.rank=16 lora.alpha=32 --data chats.parquet --out runs/lora",
    "coder-v2-lite model.start=runs/coder --data chats/ --fim-documents code/ --out runs/coder-chat",
    "runs/nano --data chats.jsonl --out runs/chat --resume",
)
def sft(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|PATH", help="A recipe's name or TOML file, with model.start=PATH; or the model, for the recipe default."
        ),
    ],
    data: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="Conversations (jsonl, jsonl.gz, parquet); may be repeated.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run: checkpoints, metrics.jsonl, resolved recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to replace in the recipe.")] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE|DIR", help="Held-out conversations; without it a share of --data.")
    ] = None,
    fim_documents: Annotated[
        list[Path] | None, typer.Option(metavar="FILE|DIR", help="Code for data.fim_share; without it the code in the answers.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint of the run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard as well.")] = False,
) -> Call:
    """The loss is on what the assistant writes and on the tokens that end its turns; samples are packed and see only themselves. A row has
    "messages", "prompt" and "completion", "conversations" (ShareGPT) or "instruction" and "output" (Alpaca), with "tools" where it calls
    any; what cannot be read is refused and reported. lora.rank=N trains adapters instead of all weights. docs/sft.md.
    """
    given = {"target": target, "overrides": overrides or [], "data": data, "validation": validation or [], "out": out}
    return Call("sft", {**given, "fim_documents": fim_documents or [], "resume": resume, "tensorboard": tensorboard})


StageTarget = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|PATH", help="A recipe's name or TOML file, with model.start=PATH; or the model, for the recipe default."
    ),
]
Preferences = Annotated[list[Path], typer.Option("--data", metavar="FILE|DIR", help="Judged answers (jsonl, parquet); may be repeated.")]
HeldOut = Annotated[
    list[Path] | None, typer.Option("--validation", metavar="FILE|DIR", help="Held-out ones; without it a share of --data.")
]
RunFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run: checkpoints, metrics.jsonl, resolved recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to replace in the recipe.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint of the run.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard as well.")]


@_verb(
    "runs/chat --data pairs.jsonl --out runs/reward",
    "tour model.start=runs/chat --data pairs.jsonl --validation held-out.jsonl --out runs/reward",
    "runs/chat loss.kind=logistic data.weights.code=2 --data code.jsonl --data maths.jsonl --out runs/reasoning",
)
def reward(
    target: StageTarget,
    data: Preferences,
    out: RunFolder,
    overrides: Overrides = None,
    validation: HeldOut = None,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> Call:
    """The chat model with one number on its last hidden state. A row has "messages" with "chosen" and "rejected", or ends in an answer that
    has a "label" or a "score"; what cannot be read is refused and reported. Accuracy and calibration are in the report. docs/reward.md.
    """
    given = {"target": target, "overrides": overrides or [], "data": data, "validation": validation or [], "out": out}
    return Call("reward", {**given, "resume": resume, "tensorboard": tensorboard})


@_verb(
    "runs/chat --data pairs.jsonl --out runs/dpo",
    "tour model.start=runs/chat loss.beta_dpo=0.3 --data pairs.jsonl --out runs/dpo",
)
def dpo(
    target: StageTarget,
    data: Preferences,
    out: RunFolder,
    overrides: Overrides = None,
    validation: HeldOut = None,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> Call:
    """The reference is the model as it begins; its log-probabilities are computed once and kept in the run's folder. docs/dpo.md."""
    given = {"target": target, "overrides": overrides or [], "data": data, "validation": validation or [], "out": out}
    return Call("dpo", {**given, "resume": resume, "tensorboard": tensorboard})


@_verb(
    "arithmetic model.start=runs/chat --out runs/grpo",
    "v2-reasoning model.start=runs/chat --data problems.jsonl --out runs/reasoning",
    "arithmetic model.start=runs/chat preset=v2 rollout.group_size=16 --out runs/grpo-v2",
    "arithmetic model.start=runs/chat --out runs/grpo --resume",
)
def grpo(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|PATH", help="A recipe's name or TOML file, with model.start=PATH; or the model, for the recipe default."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run: checkpoints, metrics.jsonl, rollouts.jsonl.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to replace in the recipe.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Prompts (jsonl); may be repeated. None for a task of ours.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint of the run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard as well.")] = False,
) -> Call:
    """Each step the model answers some prompts several times, the answers are scored, and those above their group's mean become likelier.
    A row of --data has "messages" or "prompt", and what its rewards want, such as "answer" or "tests". Objectives: preset=v2, deepseekmath,
    dr_grpo or dapo, or [objective] field by field. docs/grpo.md.
    """
    arguments = {"target": target, "overrides": overrides or [], "data": data or [], "out": out}
    return Call("grpo", arguments | {"resume": resume, "tensorboard": tensorboard})


@_verb(
    "runs/nano --prompt 'Once upon a time'",
    "runs/nano --prompt - --temperature 0 < prompt.txt",
    "v2-lite prompts.jsonl more.txt --out answers.jsonl --max-batch 16",
)
def generate(
    path: Checkpoint,
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Files of prompts, .jsonl or .txt: a prompt a line.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", callback=_text, help="Text to continue; - reads it from stdin.")] = None,
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
    max_batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Answers to files written at once; 8 without it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, tokens and the reason of the end.")] = False,
) -> Call:
    """Streams the continuation to stdout. Lines of a .jsonl file are {"prompt": TEXT}, {"messages": [...]} or {"tokens": [...]}, with "id"
    and sampling fields such as "temperature", "n", "stop" or "logprobs" where wanted; all are checked before any runs. The answers are JSON
    lines in the order of the prompts; an interrupted batch goes on where it stopped. With --seed each line has its own, counted from N.
    """
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    asked = {"path": path, "prompt": prompt, "files": files or [], "out": out}
    settings = _settings(cache, max_len, threads) | ({} if max_batch is None else {"max_batch": max_batch})
    return Call("generate", {**asked, **sampling, "dtype": dtype, "as_json": json, **settings})


@_verb("runs/nano", "runs/nano --system 'You answer in one sentence.' --temperature 0.3")
def chat(
    path: Checkpoint,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", callback=_text, help="What the model is told before the conversation.")
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
) -> Call:
    """In the chat, /help lists what can be typed. From a pipe, every line of stdin is a turn."""
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = _settings(cache, max_len, threads)
    return Call("chat", {"path": path, "system": system, "template": template, **sampling, "dtype": dtype, **settings})


@_verb(
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


@_verb(
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


@_verb("runs/nano --out report.html", "runs/a runs/b --out compare.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of training runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="File to write.")],
) -> Call:
    """The file holds everything that it shows: loss, bits per byte by domain, load of the experts, samples."""
    return Call("report", {"runs": runs, "out": out})


@_verb("v2", "runs/nano", "v2 --tensors", "v2-lite --json")
def info(
    target: Annotated[str, typer.Argument(metavar="PATH|PRESET", help="A model folder, a run, a tour, a config.json, or a preset's name.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape instead; with --json as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> Call:
    """Exact arithmetic with its formulas, no weights are read: parameters, cache, memory, context, and what the model can do."""
    return Call("info", {"target": target, "tensors": tensors, "as_json": json})


@_verb(
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


@_verb("")
def doctor() -> Call:
    """Python, torch, memory, disk, optional packages: what to send along with a question."""
    return Call("doctor", {})
