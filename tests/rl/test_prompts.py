"""Prompts of files: their tools are part of what the policy reads, and the readers of all stages refuse alike."""

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest

from dsv2.data.conversation_rows import render_samples
from dsv2.data.conversations import read_conversations
from dsv2.data.preference_rows import render_preferences
from dsv2.data.preferences import read_preferences
from dsv2.data.rows import ReadingReport
from dsv2.engine.llm import LLM
from dsv2.errors import DataError
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.outcomes import lacks_tests
from dsv2.rl.prompts import Prompts, open_prompts
from dsv2.rl.rollout import draw
from dsv2.tokenizer.chat import render
from dsv2.tokenizer.tokenizer import Tokenizer

ADD = {"name": "add", "parameters": {}}
QUESTION, ANSWER = {"role": "user", "content": "What is 12 + 34?"}, {"role": "assistant", "content": "46"}


def written(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def opened(file: Path, tokenizer: Tokenizer, **task: object) -> Prompts:
    recipe = GrpoRecipe.model_validate(
        {
            "run": {"steps": 1, "seq_len": 512}, "learning_rate": {"peak": 1e-3, "warmup_steps": 0},
            "reward": [{"name": "length", "most_tokens": 6}], "task": {"held_out": 0, **task}, "rollout": {"max_tokens": 2},
        }
    )  # fmt: skip
    return open_prompts(recipe, tokenizer, [file])


def test_the_policy_reads_the_tools_of_a_prompt(tmp_path: Path, policy: Transformer, tokenizer: Tokenizer) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": QUESTION["content"], "tools": json.dumps([ADD]), "answer": 46})
    prompts = opened(file, tokenizer)
    (example,) = prompts.take(0, 1)
    assert example == {"messages": [QUESTION], "tools": [{"type": "function", "function": ADD}], "answer": 46}
    assert prompts.report[1:] == ("fields that only rewards may read: answer (1)",)
    model = Transformer(policy.config.model_copy(update={"max_position_embeddings": 512}))
    initialise(model, 0)
    with LLM(model, tokenizer=tokenizer, max_len=512) as llm:
        (rollout,) = draw(llm, [example], group_size=1, max_tokens=2, seed="0")
    expected = render(tokenizer, [QUESTION], tools=example["tools"], add_generation_prompt=True).tokens
    assert list(rollout.prompt_tokens) == expected
    assert "- `add`" in tokenizer.decode(expected)


def test_tools_that_the_template_cannot_write_are_refused_alike_in_all_stages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    v2, tools, reports = tokenizer.with_template("v2"), {"tools": [ADD]}, {}
    pair, chat, prompt = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}
    files = [written(tmp_path / f"{n}.jsonl", row, row | tools) for n, row in enumerate((chat, pair, prompt))]
    for file, read, render_rows in (
        (files[0], read_conversations, render_samples), (files[1], read_preferences, render_preferences),
    ):  # fmt: skip
        report = ReadingReport()
        render_rows(list(read([file], report)), v2, template=None, seq_len=512, too_long="refuse", report=report)
        reports[file] = report.lines()
    reports[files[2]] = opened(files[2], v2, max_refused=0.5).report
    for file, lines in reports.items():
        assert list(lines)[1:] == [f"1 rows refused: it has tools, which the template v2 cannot write (first: {file}:2)"]


def test_files_without_a_prompt_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("What is 12 + 34?")
    with pytest.raises(DataError, match=r"a.txt holds text, not prompts"):
        opened(tmp_path / "a.txt", tokenizer)
    with pytest.raises(DataError, match=r"no prompts in .*b.jsonl: 1 rows refused: .*nothing to answer \(first: .*b.jsonl:1\)"):
        opened(written(tmp_path / "b.jsonl", {"messages": [QUESTION, ANSWER]}), tokenizer, max_refused=1)


def test_a_parquet_holds_what_json_has_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Such a row is hashed, compared and written to rollouts.jsonl like any other; tests of several forms share a column."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": "1?", "tests": {"test_list": ["assert 1"]}, "answer": Decimal("42.00"), "at": datetime(2026, 11, 26), "bits": b"\xff"},
        {"prompt": "2?", "tests": {"inputs": [""], "outputs": ["1"]}, "answer": Decimal("0.25"), "bits": "é".encode()},
        {"prompt": "3?", "level": float("nan")},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(("level", *rows[0])) | row for row in rows]), tmp_path / "a.parquet")
    prompts = opened(tmp_path / "a.parquet", tokenizer)
    first, second, third = sorted(prompts.take(0, 3), key=lambda example: example["messages"][0]["content"])
    seen = [(one["answer"], one.get("at"), one.get("bits")) for one in (first, second)]
    assert seen == [(42, "2026-11-26T00:00:00", None), (0.25, None, "é")]
    assert [lacks_tests(one) for one in (first, second)] == ["", ""] and third.keys() == {"messages"}
    assert json.loads(json.dumps([first, second, third], allow_nan=False)) == [first, second, third] and prompts.fingerprint
    assert "or left out: answer: Decimal (2), bits: bytes (2), at: datetime (1), level: float (1)" in prompts.report[-1]
