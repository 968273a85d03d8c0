"""What the verbs' options have in common: the program itself, how a verb is declared, options that several verbs take."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dsv2 import __version__
from dsv2.verbs.table import VERBS, Call

app = typer.Typer(name="dsv2", rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def verb(*examples: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Make a function the verb of its name; its docstring continues the summary, ``examples`` end the help."""

    def register(function: Callable[..., Call]) -> Callable[..., Call]:
        summary, more = VERBS[function.__name__].summary, " ".join((function.__doc__ or "").split())
        # \b: leave the lines of this paragraph as they are
        epilog = "\b\n" + "\n".join(["Examples:", *(f"  dsv2 {function.__name__} {example}".rstrip() for example in examples)])
        return app.command(function.__name__, help=f"{summary}\n\n{more}", short_help=summary, epilog=epilog)(function)

    return register


def engine_settings(cache: str, max_len: int | None, threads: int | None) -> dict[str, Any]:
    """Return the settings of the engine that a command line has in common with others."""
    return {"cache": cache, "max_len": max_len, "threads": threads}


def text(value: str | None) -> str | None:
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
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare the hashes of the model's files with its manifest's, a packed one's while it is read.")
]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; without it torch decides.")]
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


@app.callback(invoke_without_command=True, epilog="`dsv2 VERB --help` explains a verb. To begin: dsv2 tour --out tour")
def _about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """DeepSeek-V2 as software: the whole life of a model, from raw text to a chat. The verbs, in the order the data flows:"""
    if version:
        print(__version__)
        raise typer.Exit()
