"""Rows of every usual form become the same messages; what is no conversation is refused with its reason, and damage is an error."""

import gzip
import json

import pytest

from dsv2.data.conversations import read_conversations
from dsv2.data.rows import ReadingReport
from dsv2.errors import DataError

QUESTION, ANSWER = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Elbe."}


def write(folder, rows, name="chats.jsonl"):
    path = folder / name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def read(*paths):
    report = ReadingReport()
    return list(read_conversations(paths, report)), report


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": [QUESTION, ANSWER]}),
        ("prompt", {"prompt": "Name a river.", "completion": "The Elbe."}),
        ("prompt", {"prompt": [QUESTION], "completion": [ANSWER]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "The Elbe."}]}),
        ("alpaca", {"instruction": "Name a river.", "input": "", "output": "The Elbe."}),
    ],
)
def test_every_form_gives_the_same_messages(tmp_path, form, row):
    conversations, report = read(write(tmp_path, [row | {"source": "mine"}]))
    assert conversations[0].messages == (QUESTION, ANSWER)
    assert conversations[0].domain == "chats"
    assert report.read == {form: 1}
    assert report.other_fields == {"source": 1}


def test_alpaca_and_sharegpt_carry_system_text_history_and_input(tmp_path):
    alpaca = {"instruction": "Translate.", "input": "Fluss", "output": "river", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be brief."}
    first, second = read(write(tmp_path, [alpaca, sharegpt]))[0]
    assert [m["content"] for m in first.messages] == ["Be brief.", "Hi", "Hello", "Translate.\n\nFluss", "river"]
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant"]


def test_a_call_that_is_a_turn_joins_the_turn_before_it(tmp_path):
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    turns = [
        QUESTION, ANSWER, {"role": "tool_call", "content": json.dumps(call)}, {"role": "tool_call", "content": json.dumps([call])},
        {"role": "tool", "content": "3"}, {"role": "function_call", "content": json.dumps(call)},
    ]  # fmt: skip
    tools = json.dumps([{"name": "add", "parameters": {}}])
    (conversation,), _ = read(write(tmp_path, [{"messages": turns, "tools": tools}]))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["content"] == "The Elbe."
    assert [len(m.get("tool_calls", ())) for m in conversation.messages] == [0, 2, 0, 1]
    assert conversation.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "only text"}, "no known form; its fields are text"),
        ({"messages": "hello"}, "messages is of type str, not a list"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 5}]}, "content is of type int, not text"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "a", "weight": 0}]}, "a message has the field 'weight'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "the assistant's turns are all empty"),
        ({"messages": [QUESTION, {"role": "tool_call", "content": "add(1)"}]}, "a tool call is no valid JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": "[{]"}, "tools is no valid JSON"),
        ({"prompt": "a \ud800", "completion": "b"}, "half a surrogate pair"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history is not a list of"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_and_reported(tmp_path, row, reason):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]}) + "\n" + json.dumps(row) + "\n")
    conversations, report = read(path)
    assert len(conversations) == 1
    assert any(reason in line and f"(first: {path}:2)" in line for line in report.lines()), report.lines()


def test_files_of_conversations_only_and_damage_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="holds text, not conversations"):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no conversations in .*2 rows refused: no known form"):
        read(write(tmp_path, [{"text": "a"}, {"text": "b"}]))
    packed = write(tmp_path, [{"messages": [QUESTION, ANSWER]}] * 50, "chats.jsonl.gz")
    assert len(read(packed)[0]) == 50
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or cut off"):
        read(packed)
    (tmp_path / "b.jsonl").write_text('{"messages": \n')
    with pytest.raises(DataError, match="b.jsonl:1: invalid JSON"):
        read(tmp_path / "b.jsonl")


def test_parquet_with_its_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [QUESTION | {"name": None}, ANSWER | {"name": None}], "tools": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    (conversation,), report = read(tmp_path / "chats.parquet")
    assert conversation.messages == (QUESTION, ANSWER)
    assert report.read == {"messages": 1}


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": parameters}}}


def test_parquet_teaches_what_jsonl_does(tmp_path):
    """A column has one kind of struct, filled up with nulls: a call would get the arguments of all others."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tools = [tool("weather", city={"type": "string"}, unit={"enum": ["C", None]}), tool("add", a={"type": "number"})]
    calls = ({"name": "weather", "arguments": {"city": "Paris", "days": [1, None]}}, {"name": "add", "arguments": {"a": 1}})
    called = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]} for call in calls]
    rows = [{"messages": [QUESTION, turn], "tools": tools} for turn in called]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    assert "None" in str(parquet.read_table(tmp_path / "chats.parquet").to_pylist()[1]["messages"]), "there is something to drop"
    found, expected = (read(file)[0] for file in (tmp_path / "chats.parquet", write(tmp_path, rows)))
    assert [(c.messages, c.tools) for c in found] == [(c.messages, c.tools) for c in expected]


def test_a_null_that_somebody_wrote_stays(tmp_path):
    call = {"name": "book", "arguments": {"seat": None}}
    turn = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    (conversation,), _ = read(write(tmp_path, [{"messages": [QUESTION, turn]}]))
    assert conversation.messages[1]["tool_calls"][0]["function"] == call
