"""Packed conversations: only what the assistant writes is learnt, nothing is lost or seen twice, and an empty mask is an error."""

import json

import numpy as np
import pytest

from dsv2.data.conversation_fim import add_fim, fenced_code
from dsv2.data.conversation_rows import ConversationRows, Samples, best_fit, render_samples
from dsv2.data.conversations import Conversation
from dsv2.data.packing import IGNORE
from dsv2.data.rows import ReadingReport
from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.chat import Rendered, render
from dsv2.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a river, a stone and a gate; def f(x): return x\n"] * 20, vocab_size=384)


def conversation(*turns, tools=(), place="chats.jsonl:1"):
    messages = tuple({"role": role, "content": text} for role, text in turns)
    return Conversation(messages, tools, "chats", place)


def rendered(tokenizer, *conversations, seq_len=64, too_long="refuse"):
    report = ReadingReport()
    return render_samples(conversations, tokenizer, template=None, seq_len=seq_len, too_long=too_long, report=report), report


def learnt(tokenizer, samples):
    return [tokenizer.decode(ids[mask].tolist(), skip_special=False) for ids, mask in zip(samples.tokens, samples.learn, strict=True)]


def test_the_labels_are_the_assistants_words_and_its_ends(tokenizer):
    end = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    talk = conversation(
        ("system", "gate"), ("user", "a river"), ("assistant", "a stone"), ("user", "and"), ("assistant", "a gate"), ("user", "lost")
    )
    found, _ = rendered(tokenizer, talk)
    assert learnt(tokenizer, found["chats"]) == [f"a stone{end}a gate{end}"]
    rows = ConversationRows(found["chats"], 64, pad_id=tokenizer.eos_id)
    row = rows.row(0)
    assert tokenizer.decode(row.labels[row.labels != IGNORE].tolist(), skip_special=False) == f"a stone{end}a gate{end}"
    assert "lost" not in tokenizer.decode(row.tokens.tolist())
    assert found["chats"].label_bytes(tokenizer) == len("a stonea gate")


def test_tool_calls_are_learnt_and_their_outputs_are_not(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = conversation(("user", "a river"))
    messages = (*talk.messages, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "a gate"})
    messages = (*messages, {"role": "assistant", "content": "a stone"})
    tools = ({"type": "function", "function": {"name": "f"}},)
    found, report = rendered(tokenizer, Conversation(messages, tools, "chats", "x:1"), seq_len=512)
    (text,) = learnt(tokenizer, found["chats"])
    assert json.dumps({"x": 1}) in text
    assert "a stone" in text
    assert "a gate" not in text
    assert not report.refused


def test_an_empty_mask_names_its_row(tokenizer):
    with pytest.raises(DataError, match=r"chats.jsonl:7: there is nothing to learn in it"):
        rendered(tokenizer, conversation(("user", "a river"), place="chats.jsonl:7"))


def test_long_conversations_are_refused_or_lose_their_end(tokenizer):
    talk = conversation(("user", "a"), ("assistant", "a river, " * 30))
    short = conversation(("user", "a"), ("assistant", "a gate"))
    found, report = rendered(tokenizer, talk, short, seq_len=16)
    assert len(found["chats"]) == 1
    assert report.refused == {"longer than a row of 16 tokens": 1}
    found, report = rendered(tokenizer, talk, short, seq_len=16, too_long="cut")
    assert [len(tokens) for tokens in found["chats"].tokens][0] == 17
    assert found["chats"].cut == 1
    late = conversation(("user", "a river, " * 30), ("assistant", "a gate"))
    found, report = rendered(tokenizer, late, seq_len=16, too_long="cut")
    assert not found
    assert report.refused == {"its first answer begins after a row of 16 tokens": 1}


def test_rows_hold_every_sample_once_and_each_by_itself(tokenizer):
    rng = np.random.default_rng(0)
    samples = Samples()
    for number in range(60):
        length = int(rng.integers(2, 33))
        mask = [False] + [bool(learn) for learn in rng.integers(0, 2, length - 2)] + [True]
        samples.add(Rendered([number + 1] * length, mask), str(number), 32, "refuse", ReadingReport())
    rows = ConversationRows(samples, 32, pad_id=0)
    seen = sorted(sample for index in range(len(rows)) for sample in rows.members(index))
    assert seen == list(range(60))
    assert rows.filled == samples.num_places / (len(rows) * 32)
    labels = 0
    for index in range(len(rows)):
        row = rows.row(index)
        for document in np.unique(row.document_ids):
            inside = row.document_ids == document
            assert len(np.unique(row.tokens[inside])) == 1
            assert row.positions[inside].tolist() == list(range(inside.sum()))
        labels += int((row.labels != IGNORE).sum())
        assert ((row.labels == row.tokens) | (row.labels == IGNORE)).all(), "a label of another sample"
    assert labels == samples.num_labels


@pytest.mark.parametrize("capacity", [7, 50])
def test_best_fit_loses_nothing_and_beats_taking_turns(capacity):
    rng = np.random.default_rng(capacity)
    lengths = rng.integers(1, capacity + 1, 400).tolist()
    bins = best_fit(lengths, capacity)
    assert sorted(item for members in bins for item in members) == list(range(400))
    assert all(sum(lengths[item] for item in members) <= capacity for members in bins)
    in_turn, room = 0, 0
    for length in lengths:
        in_turn, room = (in_turn, room - length) if length <= room else (in_turn + 1, capacity - length)
    assert len(bins) < 0.9 * in_turn
    assert len(bins) <= 11 / 9 * sum(lengths) / capacity + 1  # the bound of best fit decreasing, over the least possible
    with pytest.raises(ConfigError, match="does not fit"):
        best_fit([capacity + 1], capacity)


def test_fill_in_the_middle_takes_its_share_and_learns_the_middle(tokenizer):
    code = "def f(x):\n    return x\n\na = f(1)\n"
    talk = conversation(("user", "a"), ("assistant", f"so:\n```python\n{code}```\n"))
    found, _ = rendered(tokenizer, *[talk] * 9, seq_len=128)
    samples = found["chats"]
    counts = add_fim(samples, list(fenced_code([talk] * 9)), tokenizer, share=0.1, seq_len=128, seed=0)
    assert (counts.used, counts.too_long) == (1, 0)
    text = tokenizer.decode(samples.tokens[-1].tolist())
    middle = tokenizer.decode(samples.tokens[-1][samples.learn[-1]].tolist())
    assert sorted(text) == sorted(code)  # all of it, in another order
    assert middle in code
    with pytest.raises(ConfigError, match=r"takes 10 documents that fit into a row; 2 do, 1 are longer than 128 tokens"):
        add_fim(samples, [*[("a", code)] * 2, ("b", code * 9)], tokenizer, share=0.5, seq_len=128, seed=0)
    documents = [(str(n), f"{n}\n{code}") for n in range(40)]
    add_fim(samples, documents, tokenizer, share=0.5, seq_len=128, seed=0)
    assert max(int(place) for place in samples.places[-10:]) >= 20, "from all documents, not the first"


def test_rendering_is_the_chat_templates_own(tokenizer):
    talk = conversation(("user", "a river"), ("assistant", "a stone"))
    found, _ = rendered(tokenizer, talk)
    ours = render(tokenizer, talk.messages)
    assert found["chats"].tokens[0].tolist() == ours.tokens
    assert found["chats"].learn[0].tolist() == ours.loss_mask
