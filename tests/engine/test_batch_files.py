"""`dsv2 generate PATH FILE... --out ANSWERS`: files of prompts in, a file of answers out, whatever interrupts it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.cli import main
from dsv2.engine import batch
from dsv2.engine.llm import LLM
from dsv2.engine.prompt_files import read_prompts
from dsv2.engine.request import SamplingParams
from dsv2.errors import ConfigError, DataError
from dsv2.files import locked
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

TURN = [{"role": "user", "content": "the sea"}]
SAMPLING = {"max_tokens": 5, "seed": 3, "temperature": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Transformer, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "step-2", model, tokenizer)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> list[Path]:
    rows = [
        {"prompt": "the river", "id": "a", "max_tokens": 9, "ignore_eos": True},  # ends after the next one
        {"messages": TURN, "temperature": 0, "id": 7},
        {"tokens": [0, 3, 5], "n": 2, "seed": 1, "logprobs": 1},
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "two.txt").write_bytes("\ufeffthe book\r\n\n河流\n".encode())
    return [tmp_path / "one.jsonl", tmp_path / "two.txt"]


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_answers_are_those_of_the_engine_in_the_order_of_the_prompts(
    run: Path, prompts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers" / "all.jsonl"
    arguments = ["--out", str(out), "--max-tokens", "5", "--seed", "3", "--temperature", "1", "--top-p", "1", "--max-batch", "2"]
    assert main(["generate", str(run), *map(str, prompts), *arguments]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "6/6 answers (100%)" in stderr and "tokens/s" in stderr and "cache: 256 tokens in fp32" in stderr
    found = answers(out)
    assert [row["id"] for row in found] == ["a", 7, *[f"{prompts[0]}:3"] * 2, f"{prompts[1]}:1", f"{prompts[1]}:3"]
    assert os.listdir(out.parent) == ["all.jsonl"]

    def params(**fields: Any) -> SamplingParams:
        return SamplingParams(**({"max_tokens": 5} | fields))

    with LLM(run) as llm:
        truth = llm.generate("the river", params(seed=3, max_tokens=9, ignore_eos=True)) + llm.chat(TURN, params(temperature=0))
        truth += llm.generate([0, 3, 5], params(n=2, seed=1, logprobs=1))
        truth += llm.generate("the book", params(seed=6)) + llm.generate("河流", params(seed=7))
    for row, output in zip(found, truth, strict=True):
        assert (row["index"], row["text"], tuple(row["tokens"])) == (output.index, output.text, output.tokens)
        assert (row["finish_reason"], row["prompt_tokens"]) == (output.finish_reason, output.prompt_tokens)
        assert ("logprobs" in row) == (output.logprobs is not None)
    assert [entry["token"] for entry in found[2]["logprobs"]] == found[2]["tokens"]


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a batch end in the middle, after so many prompts were answered."""

    def install(count: int) -> None:
        add = batch.AnswerFile.add

        def adding(self: Any, number: int, rows: Any) -> None:
            add(self, number, rows)
            if len(self.present) == count:
                raise Killed

        monkeypatch.setattr(batch.AnswerFile, "add", adding)

    return install


def test_an_interrupted_batch_goes_on_and_ends_with_the_same_file(
    run: Path, prompts: list[Path], tmp_path: Path, killed_after: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out, part = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    batch.generate_files(run, prompts, whole, sampling=SAMPLING)
    for count in (1, 3):
        killed_after(count)
        with pytest.raises(Killed):
            batch.generate_files(run, prompts, out, sampling=SAMPLING, max_batch=1)
        monkeypatch.undo()
        assert not out.exists()
        with part.open("ab") as file:
            file.write(b'{"number": 4, "ans')  # a line that a killed process was writing
    asked: list[str] = []
    add = LLM.__init__

    def opening(self: Any, *args: Any, **settings: Any) -> None:
        add(self, *args, **settings)
        add_request = self.engine.add
        self.engine.add = lambda request: (asked.append(request.request_id), add_request(request))[1]

    monkeypatch.setattr(LLM, "__init__", opening)
    batch.generate_files(run, prompts, out, sampling=SAMPLING)
    assert asked == ["3", "4"]
    assert out.read_bytes() == whole.read_bytes() and not part.exists()
    assert "3 of 5 prompts are answered" in capsys.readouterr().err


def test_what_was_left_by_another_run_is_not_mixed_in(
    run: Path, prompts: list[Path], tmp_path: Path, killed_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    killed_after(2)
    with pytest.raises(Killed):
        batch.generate_files(run, prompts, out, sampling=SAMPLING)
    left = part.read_bytes()
    with pytest.raises(ConfigError, match=r"another run: sampling was .*'seed': 3"):
        batch.generate_files(run, prompts, out, sampling=SAMPLING | {"seed": 4})
    with pytest.raises(ConfigError, match="another run: prompts was"):
        batch.generate_files(run, prompts[:1], out, sampling=SAMPLING)
    with monkeypatch.context() as patch:  # other weights at the same place
        patch.setattr(batch, "weights_id", lambda _: "others")
        with pytest.raises(ConfigError, match="another run: weights was"):
            batch.generate_files(run, prompts, out, sampling=SAMPLING)
    with locked(part), pytest.raises(ConfigError, match="another process"):
        batch.generate_files(run, prompts, out, sampling=SAMPLING)
    assert part.read_bytes() == left
    part.write_bytes(b"something else\n")
    with pytest.raises(DataError, match="not written by dsv2"):
        batch.generate_files(run, prompts, out, sampling=SAMPLING)


def test_answers_are_never_overwritten_and_a_last_act_is_made_up_for(run: Path, prompts: list[Path], tmp_path: Path) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, **_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            batch.generate_files(run, prompts, out, sampling=SAMPLING)
    first = out.read_bytes()
    assert part.exists()
    batch.generate_files(run, prompts, out, sampling=SAMPLING)
    assert out.read_bytes() == first and not part.exists()
    with pytest.raises(ConfigError, match="exists"):
        batch.generate_files(run, prompts, out, sampling=SAMPLING)
    assert out.read_bytes() == first and not part.exists()


def test_a_bias_is_a_json_object(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "logit_bias": {"5": 1, "3": -2}}')
    (line,) = read_prompts([tmp_path / "p.jsonl"], SamplingParams())
    assert line.params.logit_bias == ((3, -2.0), (5, 1.0))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batch, "LLM", None)  # nothing is loaded before all lines are found good
    yield


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a"', "no JSON: "),
        ("[1]", "a JSON list, not an object"),
        ('{"promt": "a"}', "the field 'promt' is unknown"),
        ('{"id": 1}', "it has none of prompt, messages, tokens"),
        ('{"prompt": "a", "tokens": [1]}', "it has prompt and tokens of"),
        ('{"prompt": ["a"]}', "prompt is a JSON list, not a text"),
        ('{"messages": "a"}', "messages is a JSON str, not a list"),
        ('{"prompt": "a", "tools": []}', "tools goes with messages, not with prompt"),
        ('{"prompt": "a", "temperature": -1}', "temperature = -1 is not"),
        ('{"prompt": "a", "stop": "b"}', "stop is a JSON text, not a list of texts"),
        ('{"prompt": "a", "constraint": {"type": "regex"}}', "constraint has the fields type"),
        ('{"prompt": "a", "constraint": {"kind": "poem"}}', "constraint.kind = 'poem'"),
        ('{"prompt": "a", "id": true}', "id = True is neither"),
        ('{"prompt": "a", "id": "first"}', r"id 'first' is that of .*:1 as well"),
        ('{"prompt": "\udcff"}', "not UTF-8: byte 0xff at offset 12"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_bad_line_is_named_before_anything_runs(run: Path, tmp_path: Path, line: str, complaint: str) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b'{"prompt": "a", "id": "first"}\n\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=rf"p\.jsonl:3: {complaint}"):
        batch.generate_files(run, [file], out, sampling={})
    assert os.listdir(tmp_path) == ["p.jsonl"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"tokens": [0] * 96}, "the prompt takes 96 tokens; the context holds 96"),
        ({"prompt": "a", "max_tokens": 96}, r"prompt of 2 tokens \+ max_tokens = 96 exceeds"),
        ({"tokens": [10**6]}, "tokens holds id 1000000"),
        ({"tokens": []}, "empty prompt"),
        ({"messages": [{"role": "poet"}]}, "message 0 has role 'poet'"),
        ({"messages": TURN, "template": "v9"}, "template 'v9' is unknown"),
    ],
)
def test_a_line_that_does_not_fit_the_model_is_named_before_anything_runs(
    run: Path, tmp_path: Path, line: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(line))
    monkeypatch.setattr(batch, "_answer", None)
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{complaint}"):
        batch.generate_files(run, [file], out, sampling={})
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_the_common_length_shrinks_to_the_room_there_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"tokens": ' + str([0] * 90) + ', "ignore_eos": true}\n{"prompt": "a", "max_tokens": 3}\n')
    batch.generate_files(run, [tmp_path / "p.jsonl"], tmp_path / "out.jsonl", sampling={"max_tokens": 80})
    assert [len(row["tokens"]) for row in answers(tmp_path / "out.jsonl")] == [6, 3]
    assert "leaves 1 prompts less room than 80 new ones" in capsys.readouterr().err


def test_a_line_that_fails_alone_has_its_error_in_the_answers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "a", "constraint": {"kind": "regex", "source": "("}}, {"prompt": "a", "max_tokens": 3}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch.generate_files(run, [tmp_path / "p.jsonl"], tmp_path / "out.jsonl", sampling={"max_tokens": 9})
    bad, good = answers(tmp_path / "out.jsonl")
    assert bad["finish_reason"] == "error" and "cannot be used" in bad["error"] and "error" not in good
    assert "1 prompts could not be answered" in capsys.readouterr().err


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").touch()
    (tmp_path / "p.txt").write_text("\n \n")
    for name, complaint in (("p.csv", "neither .jsonl nor .txt"), ("q.txt", "there is no file"), ("p.txt", "there is no prompt")):
        with pytest.raises(DataError, match=complaint):
            read_prompts([tmp_path / name], SamplingParams())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "neither --prompt nor a file"),
        (["p.txt"], "need --out"),
        (["p.txt", "--out", "o", "--prompt", "a"], "neither --prompt nor --json"),
        (["p.txt", "--out", "o", "--json"], "neither --prompt nor --json"),
        (["--prompt", "a", "--out", "o"], "--out and --max-batch go with files"),
        (["--prompt", "a", "--max-batch", "2"], "--out and --max-batch go with files"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", *arguments]) == 2
    assert complaint in capsys.readouterr().err
