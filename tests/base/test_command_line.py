"""The command line: what is typed arrives at the stage, and what goes wrong ends in `error:`, `hint:` and a code."""

import errno
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dsv2 import __version__
from dsv2.cli import VERBS, Call, main, parse
from dsv2.errors import DataError
from dsv2.kernels.cpu.library import library

Stage = Callable[..., Any]

# The shortest sensible command line of each verb, and one with everything.
SHORT = {
    "tour": "--out o",
    "tokenizer": "a.txt --out o",
    "prepare": "a.txt --tokenizer t --out o",
    "pretrain": "nano --data d --out o",
    "sft": "run --data d --out o",
    "reward": "run --data d --out o",
    "dpo": "run --data d --out o",
    "grpo": "run --out o",
    "generate": "run",
    "chat": "run",
    "convert": "m --out o",
    "quantize": "m --out o",
    "report": "run --out r.html",
    "info": "v2",
    "plan": "train v2",
    "doctor": "",
}
FULL = {
    "tour": "--out o --size small --threads 2 --seed 3 --no-resume",
    "tokenizer": "a.txt - --out o --vocab-size 512 --invalid-utf8 replace",
    "prepare": "a.txt b --tokenizer t --out o --domain en --invalid-utf8 replace --recipe clean --decontaminate d --workers 2",
    "pretrain": "nano a.b=1 --data d c=x --out o --resume --tensorboard",
    "sft": "tour a.b=1 --data d --data e --out o --validation v --fim-documents f --resume --tensorboard",
    "reward": "tour a.b=1 --data d --data e --out o --validation v --resume --tensorboard",
    "dpo": "tour a.b=1 --data d --out o --validation v --validation w --resume --tensorboard",
    "grpo": "tour a.b=1 --data d --data e --out o --resume --tensorboard",
    "generate": "run a.jsonl b.txt --prompt - --out o --max-tokens 5 --temperature 0 --top-k 3 --top-p 0.5 --seed 7 --dtype int8"
    " --max-batch 3 --cache 8 --max-len 64 --threads 2 --verify --json",
    "chat": "run --system hi --template v2 --max-tokens 5 --temperature 0 --top-k 3 --top-p 0.5 --seed 7 --dtype bf16"
    " --cache 6 --threads 1 --verify",
    "quantize": "random:nano --out o --bits 4",
    "convert": "merge a b --out o --to hf --dtype bf16 --weights 0.25,0.75 --max-shard-gb 1",
    "report": "a b --out r.html",
    "info": "run --tensors --json",
    "plan": "serve run gpus=4 cache_bits=8 --search --out p.png --json",
    "doctor": "",
}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Stage], None]:
    """Put a function in the place of a verb's stage."""

    def put(verb: str, function: Stage) -> None:
        module, _, name = VERBS[verb].target.partition(":")
        fake = types.ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize("lines", [SHORT, FULL], ids=["short", "full"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_stage_takes_what_its_verb_sends_and_has_the_same_defaults(verb: str, lines: dict[str, str]) -> None:
    call = parse([verb, *lines[verb].split()])
    assert call is not None
    module, _, name = VERBS[verb].target.partition(":")
    signature = inspect.signature(getattr(import_module(module), name))
    bound = signature.bind(**call.arguments)
    if lines is SHORT:
        for parameter, value in bound.arguments.items():
            default = signature.parameters[parameter].default
            assert default in (inspect.Parameter.empty, value) or (default, value) == ((), []), parameter


def test_options_arrive_as_typed() -> None:
    assert parse(["tour", *FULL["tour"].split()]) == Call(
        "tour", {"out": Path("o"), "size": "small", "seed": 3, "threads": 2, "fresh": True}
    )
    call = parse(["pretrain", *FULL["pretrain"].split()])
    assert call == Call(
        "pretrain",
        {"recipe": "nano", "overrides": ["a.b=1", "c=x"], "data": Path("d"), "out": Path("o"), "resume": True, "tensorboard": True},
    )
    generate = parse(["generate", *FULL["generate"].split()])
    assert generate is not None
    assert generate.arguments["temperature"] == 0
    assert (generate.arguments["top_k"], generate.arguments["seed"], generate.arguments["prompt"]) == (3, 7, "-")


def test_alone_it_lists_the_verbs_in_river_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()]
    assert listed == list(VERBS)
    assert err == ""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert VERBS[verb].summary in out
    about = re.split(r"\n(Arguments|Options):", out)[0]
    assert not re.search(r"\S {2,}\S", about), "the gap of a line break in the source"
    examples = [line.strip() for line in out.partition("Examples:\n")[2].splitlines()]
    assert examples
    for example in examples:
        words = example.partition(" < ")[0].replace("'", "").split()
        assert words[:2] == ["dsv2", verb]


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["pretian"], "there is no verb 'pretian'; verbs: tour, tokenizer, ", "did you mean 'pretrain'?"),
        (["tour"], "missing option '--out'", "run: dsv2 tour --help"),
        (["tour", "--ou", "x"], "no such option: --ou (Possible options: --out)", "run: dsv2 tour --help"),
        (["tour", "--out", "x", "--seed", "y"], "invalid value for '--seed': ", "run: dsv2 tour --help"),
        (["tour", "--out", "x", "more"], "got unexpected extra argument", "run: dsv2 tour --help"),
        (["generate", "--prompt", "x"], "missing argument 'PATH'", "run: dsv2 generate --help"),
        (
            ["generate", "x", "--prompt", "a\udcff"],
            "invalid value for '--prompt': not UTF-8 text at character 1",
            "run: dsv2 generate --help",
        ),
        (["chat", "x", "--template", "v3"], "invalid value for '--template': 'v3' is not one of 'v2', 'v2.5'", "run: dsv2 chat --help"),
        (["--loud"], "no such option: --loud", "run: dsv2 --help"),
    ],
)
def test_a_wrong_command_line_says_what_and_what_to_do(argv: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = fails(capsys, *argv)
    assert lines[0].startswith(f"error: {error}")
    assert lines[1:] == [f"hint: {hint}"]


def test_a_stage_gets_its_arguments_and_torch_its_variable(stage: Callable[[str, Stage], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    seen: dict[str, Any] = {}

    def fake(**arguments: Any) -> object:
        seen.update(arguments, thp=os.environ.get("THP_MEM_ALLOC_ENABLE"))
        return object()  # a stage may return its report

    stage("info", fake)
    assert main(["info", "v2"]) == 0
    assert seen == {"target": "v2", "tensors": False, "as_json": False, "thp": "1"}
    stage("info", lambda **_: 3)
    assert main(["info", "v2"]) == 3


def test_training_does_not_align_its_tensors_to_huge_pages(stage: Callable[[str, Stage], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    seen = []
    stage("pretrain", lambda **_: seen.append(os.environ["THP_MEM_ALLOC_ENABLE"]))
    assert main(["pretrain", *SHORT["pretrain"].split()]) == 0
    assert seen == ["0"]


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (DataError("a.txt is empty", hint="give another"), 2, ["error: a.txt is empty", "hint: give another"]),
        (DataError("a.txt is empty"), 2, ["error: a.txt is empty"]),
        (
            ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow.parquet"),
            2,
            ["error: dsv2 tour needs pyarrow, which is not installed", "dsv2[data]"],
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "o/w"),
            2,
            ["error: the disk is full: [Errno 28] No space left on device: 'o/w'", "free some space"],
        ),
        (KeyboardInterrupt(), 130, ["interrupted", "hint: run the same command again; it continues where it stopped"]),
    ],
)
def test_what_a_stage_raises_becomes_a_message(
    stage: Callable[[str, Stage], None], capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, says: list[str]
) -> None:
    def fake(**_: Any) -> None:
        raise raised

    stage("tour", fake)
    assert main(["tour", "--out", "o"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == len(says)
    assert all(text in line for text, line in zip(says, err.splitlines(), strict=True))


@pytest.mark.parametrize("bug", [ValueError("bug"), ModuleNotFoundError("No module named 'dsv2.x'", name="dsv2.x"), OSError("bug")])
def test_a_bug_keeps_its_traceback(stage: Callable[[str, Stage], None], bug: Exception) -> None:
    def fake(**_: Any) -> None:
        raise bug

    stage("doctor", fake)
    with pytest.raises(type(bug)):
        main(["doctor"])


STAGE_THAT_PRINTS = """
import sys, types, dsv2.cli
sys.modules["dsv2.doctor"] = types.SimpleNamespace(run=lambda: print("x" * 1_000_000))
sys.exit(dsv2.cli.main(["doctor"]))
"""


@pytest.mark.parametrize(("sink", "code", "says"), [("| true", 141, ""), ("> /dev/full", 2, "error: the disk is full")])
def test_stdout_that_takes_nothing(sink: str, code: int, says: str) -> None:
    command = f'"$PYTHON" -c "$CODE" {sink}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHON": sys.executable, "CODE": STAGE_THAT_PRINTS}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr[: len(says)]) == (code, says)
    assert "Traceback" not in done.stderr


def test_doctor_reports_on_stdout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSV2_DATA", str(tmp_path / "nowhere"))
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    facts = {line.split("  ")[0]: line.partition("  ")[2].strip() for line in out.splitlines()}
    assert set(facts) >= {"dsv2", "python", "torch", "memory", "disk", "extra serve", "extra data", "huge pages", "DSV2_DATA"}
    assert "threads" in facts["torch"]
    assert facts["DSV2_DATA"].endswith("nowhere (no such folder)")
    assert err == ""


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DSV2_CPU": "plain"}, "native, plain (DSV2_CPU), compiled by "),
        ({"DSV2_CPU": "torch"}, "torch's: DSV2_CPU = torch"),
        ({"DSV2_CPU": "mmx"}, "none: DSV2_CPU = 'mmx' is not one of: "),
        ({"CXX": "/nowhere/c++"}, "torch's: /nowhere/c++ does not run"),
    ],
)
def test_doctor_says_which_kernels_run_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    library.cache_clear()
    assert main(["doctor"]) == 0
    library.cache_clear()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels ")]
    if "native" in says and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert line.partition("  ")[2].strip().startswith(says)
