"""Options of the verbs from text to an aligned model."""

from pathlib import Path
from typing import Annotated

import typer

from dsv2.verbs.options import (
    HeldOut,
    InvalidUtf8,
    OutFolder,
    Overrides,
    Preferences,
    Resume,
    RunFolder,
    Sources,
    SourcesAndValues,
    StageTarget,
    Tensorboard,
    text,
    verb,
)
from dsv2.verbs.table import Call


@verb("--out tour", "--size long --out tour-long", "--size smoke --out smoke")
def tour(
    out: OutFolder,
    size: Annotated[str, typer.Option(metavar="NAME", help="Size of the model and length of its training.")] = "standard",
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; without it torch decides.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, threads and machine: same weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue a tour found in DIR, or start it afresh.")] = True,
) -> Call:
    """Trains a tokenizer and a small DeepSeek-V2 on the text that ships with dsv2, and leaves DIR/report.html to look at."""
    return Call("tour", {"out": out, "size": size, "seed": seed, "threads": threads, "fresh": not resume})


@verb("books/ --out data/tokenizer", "a.jsonl.gz b.txt --vocab-size 8192 --out data/tokenizer")
def tokenizer(
    sources: Sources,
    out: OutFolder,
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Size of the model's vocabulary; a multiple of 128.")] = 4096,
    invalid_utf8: InvalidUtf8 = "error",
) -> Call:
    """Byte-level BPE with DeepSeek's splitting rules and special tokens; transformers' AutoTokenizer reads the result."""
    return Call("tokenizer", {"sources": sources, "out": out, "vocab_size": vocab_size, "invalid_utf8": invalid_utf8})


@verb(
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
        str | None, typer.Option(metavar="NAME", callback=text, help="Domain of documents that name none; else the file's or folder's.")
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


@verb(
    "nano --data data --out runs/nano",
    "nano learning_rate.peak=3e-4 --data data --out runs/nano",
    "nano --data data --out runs/nano --resume",
)
def pretrain(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a TOML file.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Holds tokenizer/, train/ and, if wanted, validation/.")],
    out: RunFolder,
    overrides: Overrides = None,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> Call:
    """The recipe says what to train and how; KEY=VALUE replaces single values, such as learning_rate.warmup_steps=100."""
    arguments = {"recipe": recipe, "overrides": overrides or [], "data": data, "out": out, "resume": resume, "tensorboard": tensorboard}
    return Call("pretrain", arguments)


@verb(
    "runs/nano --data chats.jsonl --out runs/chat",
    "tour model.start=tour/pretrain --data chats.jsonl --validation held-out.jsonl --out runs/chat",
    "v2 model.start=deepseek-ai/DeepSeek-V2-Lite lora.rank=16 lora.alpha=32 --data chats.parquet --out runs/lora",
    "coder-v2-lite model.start=runs/coder --data chats/ --fim-documents code/ --out runs/coder-chat",
    "runs/nano --data chats.jsonl --out runs/chat --resume",
)
def sft(
    target: StageTarget,
    data: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="Conversations (jsonl, jsonl.gz, parquet); may be repeated.")],
    out: RunFolder,
    overrides: Overrides = None,
    validation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE|DIR", help="Held-out conversations; without it a share of --data.")
    ] = None,
    fim_documents: Annotated[
        list[Path] | None, typer.Option(metavar="FILE|DIR", help="Code for data.fim_share; without it the code in the answers.")
    ] = None,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> Call:
    """The loss is on what the assistant writes and on the tokens that end its turns; samples are packed and see only themselves. A row has
    "messages", "prompt" and "completion", "conversations" (ShareGPT) or "instruction" and "output" (Alpaca), with "tools" where it calls
    any; what cannot be read is refused and reported. lora.rank=N trains adapters instead of all weights. docs/sft.md.
    """
    given = {"target": target, "overrides": overrides or [], "data": data, "validation": validation or [], "out": out}
    return Call("sft", {**given, "fim_documents": fim_documents or [], "resume": resume, "tensorboard": tensorboard})


@verb(
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


@verb(
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


@verb(
    "arithmetic model.start=runs/chat --out runs/grpo",
    "v2-reasoning model.start=runs/chat --data problems.jsonl --out runs/reasoning",
    "v2-preference model.start=runs/reasoning reward.0.folder=runs/help reward.1.folder=runs/safe --data requests.jsonl --out runs/kind",
    "arithmetic model.start=runs/chat preset=v2 rollout.group_size=16 --out runs/grpo-v2",
    "arithmetic model.start=runs/chat --out runs/grpo --resume",
)
def grpo(
    target: StageTarget,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run: checkpoints, metrics.jsonl, rollouts.jsonl.")],
    overrides: Overrides = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|DIR", help="Prompts (jsonl, jsonl.gz, parquet); may be repeated. None for a task of ours."),
    ] = None,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> Call:
    """Each step the model answers some prompts several times, the answers are scored, and those above their group's mean become likelier.
    A row of --data has "messages" or "prompt", and what its rewards want, such as "answer" or "tests". Objectives: preset=v2, deepseekmath,
    dr_grpo or dapo; [objective] changes single fields. Runs on the CPU, also where there is a GPU. docs/grpo.md.
    """
    arguments = {"target": target, "overrides": overrides or [], "data": data or [], "out": out}
    return Call("grpo", arguments | {"resume": resume, "tensorboard": tensorboard})
