"""`dsv2 generate` and `dsv2 chat` on a saved checkpoint: what goes to stdout, what to stderr, and what a pipe and Ctrl-C do."""

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.engine import terminal
from dsv2.engine.engine import Engine
from dsv2.engine.opening import sampling_of
from dsv2.engine.request import SamplingParams
from dsv2.errors import CheckpointError, ConfigError, DataError, RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory, model: Transformer, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tour")
    (folder / "tour.json").write_text("{}")
    save_checkpoint(folder / "pretrain" / "step-2", model, tokenizer)
    return folder


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def reciting(monkeypatch: pytest.MonkeyPatch, reciter: Any, tokenizer: Tokenizer) -> Callable[..., list[Any]]:
    """Let every checkpoint say a text, whatever it is asked; return the requests that it gets."""

    def install(text: str, **settings: Any) -> list[Any]:
        said = tokenizer.encode(text, add_bos=False)
        requests: list[Any] = []

        class Recording(Engine):
            def add(self, request: Any) -> None:
                requests.append(request)
                self._stack._model = reciter([*said, tokenizer.eos_id], prompt_len=len(request.tokens))
                super().add(request)

        monkeypatch.setattr(terminal, "latest_checkpoint", Path)  # which need not exist
        monkeypatch.setattr(terminal, "open_engine", lambda *_, **asked: Recording(reciter([0]), tokenizer, max_batch=1, **settings))
        return requests

    return install


def test_generate_gives_the_same_text_from_the_step_the_run_and_the_tour(tour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, messages = [], []
    for path in (tour / "pretrain" / "step-2", tour / "pretrain", tour):
        terminal.generate(path, prompt="The river", max_tokens=12, seed=4)
        captured = capsys.readouterr()
        texts.append(captured.out)
        messages.append(captured.err)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 1
    assert all("tokens/s" in message and f"{3 * (24 + 8) * 4} bytes a token" in message for message in messages)


def test_the_cache_is_as_the_command_line_asks(tour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.generate(tour, prompt="The river", max_tokens=40, temperature=0, cache="bf16", max_len=16, threads=1)
    captured = capsys.readouterr()
    assert f"{3 * (24 + 8) * 2} bytes a token" in captured.err and "16 tokens leaves room for 13 new ones" in captured.err


def test_generate_as_json_is_one_object_with_the_same_text(tour: Path, capsys: pytest.CaptureFixture[str], type_in: Any) -> None:
    terminal.generate(str(tour), prompt="The river", max_tokens=12, seed=4)
    text = capsys.readouterr().out
    type_in(b"The river\n")
    terminal.generate(tour, prompt="-", max_tokens=12, seed=4, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] + "\n" == text
    assert (len(answer["tokens"]), answer["finish_reason"], answer["prompt_tokens"]) == (12, "length", 3)
    assert answer["cache_bytes_per_token"] == 3 * (24 + 8) * 4
    assert answer["prefill_tokens_per_s"] > 0 and answer["decode_tokens_per_s"] > 0


def test_generate_says_when_the_context_is_shorter_than_asked(tour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.generate(tour, prompt="The river", temperature=0, as_json=True)
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["tokens"]) <= 93
    assert "room for 93" in captured.err and "256" in captured.err


def test_generate_refuses_what_it_cannot_do(tour: Path, tmp_path: Path, type_in: Any) -> None:
    with pytest.raises(RequestError, match="holds 96"):
        terminal.generate(tour, prompt="é" * 96)
    with pytest.raises(RequestError, match="top_p"):
        terminal.generate(tour, prompt="a", top_p=2.0)
    with pytest.raises(CheckpointError):
        terminal.generate(tmp_path, prompt="a")
    type_in(b"ok \xff")
    with pytest.raises(DataError, match="offset 3"):
        terminal.generate(tour, prompt="-")


def test_a_piped_chat_answers_line_by_line(reciting: Any, type_in: Any, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    requests = reciting("the boats run")
    type_in("the river\n\n/help\n/nonsense\n 河 /etc\n/reset\nthe sea".encode())
    terminal.chat("anywhere", system="and", seed=5, top_k=9, max_tokens=20)
    captured = capsys.readouterr()
    assert captured.out == "the boats run\n" * 3
    assert "/reset" in captured.err and "unknown command /nonsense" in captured.err and "forgotten" in captured.err
    asked = [tokenizer.decode(request.tokens, skip_special=False) for request in requests]
    marks = {name: marker for marker in tokenizer.special_ids for name in ("User", "Assistant", "begin", "end") if name in marker}
    assert asked[0].endswith(f"and{marks['User']}the river{marks['Assistant']}")
    assert asked[1].endswith(
        f"{marks['Assistant']}the boats run{tokenizer.token_bytes(tokenizer.eos_id).decode()}{marks['User']} 河 /etc{marks['Assistant']}"
    )
    assert asked[2].endswith(f"and{marks['User']}the sea{marks['Assistant']}") and asked[2].count(marks["User"]) == 1
    assert [(request.params.seed, request.params.top_k) for request in requests] == [(5, 9), (6, 9), (7, 9)]


def test_a_full_context_leaves_the_oldest_turns_out_and_says_so(
    reciting: Any, type_in: Any, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = reciting("the sea", max_len=36)
    too_long = "x" * 50
    type_in("\n".join(["the river runs " * 2, "the book says", too_long, "the boats run from the hills", "the old book"]).encode())
    terminal.chat("anywhere", system="and", max_tokens=30)
    captured = capsys.readouterr()
    assert captured.out == "the sea\n" * 4
    assert "left out" in captured.err and "context holds 36" in captured.err
    assert all(len(request.tokens) + request.params.max_tokens <= 36 for request in requests)
    user, assistant = (next(id for name, id in tokenizer.special_ids.items() if role in name) for role in ("User", "Assistant"))
    for request in requests:  # whole exchanges are left out
        roles = [token for token in request.tokens if token in (user, assistant)]
        assert roles == [user, assistant] * (len(roles) // 2)
    last = tokenizer.decode(requests[-1].tokens)
    assert last.startswith("and") and last.endswith("the old book") and "the river runs" not in last and too_long not in last


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    reciting: Any, type_in: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = reciting("the boats run with the river")
    write, written = terminal._write, []

    def write_and_interrupt(text: str) -> None:
        write(text)
        written.append(text)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal, "_write", write_and_interrupt)
    type_in(b"the river\nthe sea")
    before = signal.getsignal(signal.SIGINT)
    terminal.chat("anywhere")
    assert signal.getsignal(signal.SIGINT) is before
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert second == "the boats run with the river" and second.startswith(first) and first != second
    assert "(stopped)" in captured.err
    assert first in tokenizer.decode(requests[1].tokens)  # what was said stays in the conversation


def test_a_second_ctrl_c_raises() -> None:
    with pytest.raises(KeyboardInterrupt), terminal.interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)


def test_an_answer_that_was_cut_says_so(reciting: Any, type_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reciting("the boats run with the river")
    type_in(b"the river")
    terminal.chat("anywhere", max_tokens=2)
    assert "cut after 2 tokens" in capsys.readouterr().err


def test_the_v2_template_gets_its_blank_once(reciting: Any, type_in: Any, tokenizer: Tokenizer) -> None:
    requests = reciting(" the boats run")
    type_in(b"the river\nthe sea")
    terminal.chat("anywhere", template="v2")
    assert tokenizer.decode(requests[1].tokens) == "User: the river\n\nAssistant: the boats runUser: the sea\n\nAssistant:"
    with pytest.raises(ConfigError, match="v9"):
        terminal.chat("anywhere", template="v9")  # type: ignore[arg-type]


def test_a_person_is_asked_and_may_leave(reciting: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reciting("the sea")
    answers: list[Any] = [KeyboardInterrupt(), "the river", EOFError()]

    def typed(prompt: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return str(answer)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    terminal.chat("anywhere")
    captured = capsys.readouterr()
    assert captured.out == "the sea\n" and "Ctrl-D" in captured.err
    answers += ["/exit", "never asked"]
    terminal.chat("anywhere")
    assert answers == ["never asked"]


def test_the_folder_says_how_to_sample_and_options_go_before_it(tour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tour / "pretrain" / "step-2", folder)
    (folder / "manifest.json").unlink()

    def sampling(**given: Any) -> SamplingParams:
        return sampling_of(folder, given)

    assert (sampling().temperature, sampling(seed=3).top_p) == (0.3, 0.95)
    assert "temperature 0.3, top_p 0.95 (generation_config.json)" in capsys.readouterr().err
    assert sampling(temperature=0.0, top_p=1.0) == SamplingParams(temperature=0.0)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    assert sampling() == SamplingParams(temperature=0)
    (folder / "generation_config.json").write_text('{"top_p": "high"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p = 'high' must be a number"):
        sampling()
    (folder / "generation_config.json").unlink()
    assert sampling() == SamplingParams()
