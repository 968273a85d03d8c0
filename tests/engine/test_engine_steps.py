"""What the engine does with requests, on a model that recites a script, so that every token is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.engine.engine import Engine
from dsv2.engine.request import Output, Request, SamplingParams
from dsv2.errors import CheckpointError, ConfigError, RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=40)


def ask(name: str = "r", prompt_len: int = 1, **fields: Any) -> Request:
    return Request(name, (0,) * prompt_len, SamplingParams(**({"temperature": 0, "max_tokens": 40} | fields)))


@pytest.fixture
def saying(tokenizer: Tokenizer, reciter: Callable[..., Transformer]) -> Callable[..., Engine]:
    """Return a function from a text to an engine whose model says it, and then EOS, after a prompt of one token."""

    def build(text: str, **settings: Any) -> Engine:
        # without drafts a step gives one token; whether they pay is a matter of measured time
        return Engine(reciter([*tokenizer.encode(text, add_bos=False), tokenizer.eos_id]), tokenizer, **{"speculate": False} | settings)

    return build


def test_an_answer_ends_at_eos_which_is_among_the_tokens_but_not_in_the_text(saying: Any, tokenizer: Tokenizer) -> None:
    (output,) = saying("the river").generate([ask(prompt_len=1)])
    assert (output.text, output.finish_reason, output.prompt_tokens) == ("the river", "stop", 1)
    assert output.tokens == (*tokenizer.encode("the river", add_bos=False), tokenizer.eos_id)
    assert output.logprobs is None


def test_max_tokens_counts_every_token(saying: Any, tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the river runs", add_bos=False)
    for limit in range(1, len(whole) + 2):
        (output,) = saying("the river runs").generate([ask(max_tokens=limit)])
        assert len(output.tokens) == min(limit, len(whole) + 1)
        assert output.finish_reason == ("stop" if limit == len(whole) + 1 else "length")


def test_ignore_eos_goes_on_but_heeds_the_other_stops(saying: Any, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    (output,) = saying("sea").generate([ask(max_tokens=30, ignore_eos=True)])
    assert output.tokens.count(eos) >= 2 and len(output.tokens) == 30 and output.finish_reason == "length"
    (output,) = saying("sea").generate([ask(ignore_eos=True, stop_token_ids=(eos,))])
    assert (output.text, output.finish_reason) == ("sea", "stop")
    (output,) = saying("sea").generate([ask(ignore_eos=True, stop=("ea",))])
    assert (output.text, output.finish_reason) == ("s", "stop")


def test_a_stop_id_ends_the_answer_and_is_not_in_the_text(saying: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("to the sea, and", add_bos=False)
    (output,) = saying("to the sea, and").generate([ask(stop_token_ids=(ids[2],))])
    assert output.tokens == tuple(ids[:3])
    assert output.text == tokenizer.decode(ids[:2]) and output.finish_reason == "stop"


def test_min_tokens_and_a_kept_stop_string(saying: Any, tokenizer: Tokenizer) -> None:
    (output,) = saying("the sea and the sea").generate([ask(stop=("sea",), include_stop=True)])
    assert (output.text, output.finish_reason) == ("the sea", "stop")
    first = len(tokenizer.encode("the sea", add_bos=False))
    (output,) = saying("the sea and the sea").generate([ask(stop=("sea",), include_stop=True, min_tokens=first)])
    assert (output.text, output.finish_reason) == ("the sea and the sea", "stop")
    (output,) = saying("sea").generate([ask(min_tokens=7, max_tokens=7, logit_bias={5: 1.0})])
    assert tokenizer.eos_id not in output.tokens and 5 in output.tokens and output.finish_reason == "length"


def test_streamed_text_never_shows_a_stop_string_or_half_a_character(saying: Any) -> None:
    text = "the book 河流入海 says it; the boats run"
    pieces = list(saying(text).stream(ask(max_tokens=90, stop=("boats sink", "run", "says so"))))
    assert "".join(piece.text for piece in pieces) == "the book 河流入海 says it; the boats "
    assert pieces[-1].finish_reason == "stop" and all(piece.finish_reason is None for piece in pieces[:-1])
    assert all("\ufffd" not in piece.text and len(piece.tokens) == 1 for piece in pieces)
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert not shown.endswith(("boats s", "says s", "ru"))


def test_text_held_back_for_a_stop_string_comes_when_the_answer_ends_otherwise(saying: Any, tokenizer: Tokenizer) -> None:
    for fields in ({}, {"max_tokens": len(tokenizer.encode("the sea", add_bos=False))}):
        pieces = list(saying("the sea").stream(ask(stop=("sea and land",), **fields)))
        assert "".join(piece.text for piece in pieces) == "the sea"
        assert pieces[-1].text.endswith("sea")


def test_log_probabilities_come_with_every_token(saying: Any, tokenizer: Tokenizer) -> None:
    engine = saying("the sea")
    pieces = list(engine.stream(ask("streamed", logprobs=3)))
    whole, none = engine.generate([ask("whole", logprobs=3), ask("none")])
    assert none.logprobs is None
    assert whole.logprobs is not None and [entry.token for entry in whole.logprobs] == list(whole.tokens)
    assert whole.logprobs == tuple(entry for piece in pieces for entry in piece.logprobs or ())
    assert all(len(entry.top) == 3 and entry.top[0][0] == entry.token and entry.logprob == pytest.approx(0) for entry in whole.logprobs)


def test_requests_join_wait_and_leave(saying: Any) -> None:
    engine = saying("river " * 6, max_batch=2, speculate=False)  # a token a step
    lengths = {"a": 3, "b": 9, "c": 2, "d": 5}
    for name in "ab":
        engine.add(ask(name, max_tokens=lengths[name]))
    got: dict[str, int] = {}
    started: dict[str, int] = {}
    step = 0
    while engine.has_work:
        outputs = engine.step()
        step += 1
        assert len(outputs) <= 2
        if step == 2:
            engine.add(ask("c", max_tokens=lengths["c"]))
            engine.add(ask("d", max_tokens=lengths["d"]))
        for output in outputs:
            started.setdefault(output.request_id, step)
            got[output.request_id] = got.get(output.request_id, 0) + 1
            assert (output.finish_reason == "length") == (got[output.request_id] == lengths[output.request_id])
    assert got == lengths
    assert started == {"a": 1, "b": 1, "c": 4, "d": 6}  # c takes the place of a in the step after, d that of c
    assert engine.step() == []
    engine.add(ask("a", max_tokens=1))  # a name is free again


def test_outputs_come_in_the_order_of_the_requests(saying: Any) -> None:
    requests = [ask(f"r{i}", max_tokens=1 + (7 * i) % 5) for i in range(9)]
    outputs = saying("river " * 6, max_batch=3).generate(requests)
    assert [(output.request_id, len(output.tokens)) for output in outputs] == [(r.request_id, r.params.max_tokens) for r in requests]


def test_streaming_keeps_what_others_gain(saying: Any) -> None:
    engine = saying("the river runs from the hills")
    engine.add(ask("other", max_tokens=5))
    first, second = engine.stream(ask("first")), engine.stream(ask("second", max_tokens=7))
    texts = {"first": "", "second": "", "other": ""}
    for a, b in zip(first, second, strict=False):
        for output in (a, b):
            texts[output.request_id] += output.text
    for output in (*first, *second):
        texts[output.request_id] += output.text
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.text
    (alone,) = saying("the river runs from the hills").generate([ask(max_tokens=5)])
    assert texts["first"] == "the river runs from the hills" and texts["other"] == alone.text
    assert texts["second"] and texts["first"].startswith(texts["second"])


def test_an_abort_gives_the_held_text_and_frees_the_row(saying: Any) -> None:
    engine = saying("the sea and the sea", max_batch=1)
    engine.add(ask("a", stop=("the sea and the land",), logprobs=0))
    engine.add(ask("waits"))
    held = [output for _ in range(4) for output in engine.step()]
    assert [output.text for output in held] == [""] * 4
    last = engine.abort("a")
    assert last is not None and (last.finish_reason, last.tokens, last.logprobs) == ("abort", (), ())
    assert last.text and "the sea and the sea".startswith(last.text)
    waiting = engine.abort("waits")
    assert waiting == Output("waits", (), "", "abort", None, 1)
    assert not engine.has_work and engine.abort("a") is None
    assert engine.generate([ask("a")])[0].finish_reason == "stop"


def test_closing_a_stream_aborts_its_request(saying: Any) -> None:
    engine = saying("the river runs")
    stream = engine.stream(ask())
    next(stream)
    stream.close()
    assert not engine.has_work
    stream = engine.stream(ask())
    next(stream)
    engine.abort("r")
    assert list(stream) == []


@pytest.mark.parametrize(
    ("request_", "numbers"),
    [
        (Request("r", (0,) * 90, SamplingParams(max_tokens=7)), ("90", "7", "96")),
        (Request("r", (0,) * 200, SamplingParams(max_tokens=1)), ("200", "96")),
        (Request("r", (0, 10**6), GREEDY), ("tokens", "1000000")),
        (Request("r", (0,), SamplingParams(stop_token_ids=(10**6,), max_tokens=1)), ("stop_token_ids", "1000000")),
        (Request("taken", (0,), GREEDY), ("'taken'",)),
        (Request("r", (0,), SamplingParams(logit_bias={10**6: 1}, max_tokens=1)), ("logit_bias", "1000000")),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_numbers(saying: Any, request_: Request, numbers: tuple[str, ...]) -> None:
    engine = saying("sea")
    engine.add(ask("taken"))
    with pytest.raises(RequestError) as caught:
        engine.add(request_)
    assert all(number in caught.value.message for number in numbers)
    with pytest.raises(RequestError):
        engine.generate([ask("good"), request_])
    engine.add(ask("good"))  # the refused call left nothing behind
    engine.add(Request("fits", (0,) * 90, SamplingParams(temperature=0, max_tokens=6)))


def test_an_engine_is_refused_what_its_model_cannot_do(tokenizer: Tokenizer, reciter: Any, small_config: Any) -> None:
    model = reciter([0])
    for settings in ({"max_batch": 0}, {"max_len": 0}, {"max_len": 97}):
        with pytest.raises(ConfigError, match=str(*settings.values())):
            Engine(model, tokenizer, **settings)
    model.config = small_config(vocab_size=128)
    with pytest.raises(CheckpointError, match="128"):
        Engine(model, tokenizer)


def test_only_ids_that_have_a_token_are_taken(saying: Any, tokenizer: Tokenizer) -> None:
    engine = saying("sea")
    engine.add(Request("last", (tokenizer.num_tokens - 1,), GREEDY))
    with pytest.raises(RequestError, match=f"id {tokenizer.num_tokens};"):
        engine.add(Request("padding", (tokenizer.num_tokens,), GREEDY))


@pytest.mark.parametrize("prompt_len", [3, 7], ids=["in decode", "in prefill"])
def test_logits_that_are_no_numbers_end_their_request_alone(tokenizer: Tokenizer, reciter: Any, prompt_len: int) -> None:
    words = tokenizer.encode("the river runs to", add_bos=False)
    engine = Engine(reciter([*words[:4], None, *words[4:], *words, *words], prompt_len=3), tokenizer)  # no numbers after 7 tokens
    engine.add(ask("well", prompt_len=9, max_tokens=6))
    got = engine.step()
    engine.add(ask("ill", prompt_len=prompt_len))
    with pytest.raises(CheckpointError, match="'ill'"):
        while True:
            got += engine.step()
    while engine.has_work:
        got += engine.step()
    assert len([output for output in got if output.request_id == "ill"]) == 7 - prompt_len
    mine = [output for output in got if output.request_id == "well"]
    assert len(mine) == 6 and mine[-1].finish_reason == "length"
    with pytest.raises(CheckpointError, match="'ill'"):
        engine.generate([ask("well", prompt_len=9, max_tokens=9), ask("ill", prompt_len=prompt_len)])
    assert not engine.has_work


def test_a_dropped_request_spoils_no_later_one(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=2)
    engine.add(ask("long", prompt_len=20, ignore_eos=True))
    engine.add(ask("ill", prompt_len=10, ignore_eos=True))
    engine.step()
    (block,) = next(answer.seq.blocks for answer in engine._answers.values() if answer.request.request_id == "ill")
    entries = np.frombuffer(engine._stack.store.memory.view(), np.float32)
    entries[: engine.cache.num_blocks * 64 * 32].reshape(-1, 64, 32)[block, 5] = np.nan  # of the first layer
    with pytest.raises(CheckpointError, match="'ill'"):
        engine.step()
    engine.add(ask("next", prompt_len=2, max_tokens=3, ignore_eos=True))
    got = [output for _ in range(4) for output in engine.step()]
    assert [output.finish_reason for output in got if output.request_id == "next"] == [None, None, "length"]


def test_an_engine_leaves_no_trace_in_the_model(model: Transformer, tokenizer: Tokenizer) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.tensor([[0, 3, 5]])
    Engine(model, tokenizer).generate([ask(max_tokens=3)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.logits(model(tokens).hidden).sum().backward()  # nothing of inference mode is left in it
    model.zero_grad(set_to_none=True)
