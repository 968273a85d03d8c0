"""The engine on a real model: batched = alone, in any order, joining at any time; prefixes, preemption and drafts change no text."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import count, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.engine.answer import Answer
from dsv2.engine.engine import Engine
from dsv2.engine.native import Answered, Piece
from dsv2.engine.pieces import pieces_of
from dsv2.engine.request import Output, Request, SamplingParams
from dsv2.engine.sequence import Chunk
from dsv2.engine.sequence import Sequence as Row
from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer

REQUESTS = [
    ("The river", SamplingParams(seed=1, max_tokens=20)),
    ("河流", SamplingParams(seed=2, max_tokens=9, top_k=20)),
    ("the boats run with", SamplingParams(temperature=0, max_tokens=15, logprobs=2)),
    ("", SamplingParams(seed=3, max_tokens=25, top_p=0.9, ignore_eos=True)),
    ("and " * 20, SamplingParams(seed=1, max_tokens=12, temperature=0.7)),
    ("The river", SamplingParams(seed=9, max_tokens=20)),
]


def numbered(tokenizer: Tokenizer, order: list[int]) -> list[Request]:
    return [Request(str(i), tuple(tokenizer.encode(REQUESTS[i][0])), REQUESTS[i][1]) for i in order]


@pytest.fixture(scope="module")
def alone(model: Transformer, tokenizer: Tokenizer) -> dict[str, Output]:
    return {r.request_id: Engine(model, tokenizer, max_batch=1).generate([r])[0] for r in numbered(tokenizer, list(range(len(REQUESTS))))}


def same(output: Output, truth: Output) -> None:
    assert (output.tokens, output.text, output.finish_reason) == (truth.tokens, truth.text, truth.finish_reason)
    if truth.logprobs is not None and output.logprobs is not None:
        assert [e.logprob for e in output.logprobs] == pytest.approx([e.logprob for e in truth.logprobs], abs=1e-4)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(len(REQUESTS))), st.integers(1, 6), st.lists(st.integers(0, 6), min_size=6, max_size=6))
def test_a_request_gives_the_same_text_whatever_else_runs(
    model: Transformer, tokenizer: Tokenizer, alone: dict[str, Output], order: list[int], max_batch: int, gaps: list[int]
) -> None:
    """In any order, at any batch size, with any number of steps between arrivals."""
    engine = Engine(model, tokenizer, max_batch=max_batch)
    parts: dict[str, list[Output]] = {name: [] for name in alone}

    def step() -> None:
        for output in engine.step():
            parts[output.request_id].append(output)

    for request, gap in zip(numbered(tokenizer, order), gaps, strict=True):
        engine.add(request)
        for _ in range(gap):
            step()
    while engine.has_work:
        step()
    for name, outputs in parts.items():
        whole = Output(
            name,
            tuple(token for output in outputs for token in output.tokens),
            "".join(output.text for output in outputs),
            outputs[-1].finish_reason,
            None,
            outputs[0].prompt_tokens,
        )
        same(whole, alone[name])


def test_whole_outputs_are_the_same_batched(model: Transformer, tokenizer: Tokenizer, alone: dict[str, Output]) -> None:
    for output in Engine(model, tokenizer, max_batch=4).generate(numbered(tokenizer, [5, 0, 3, 1, 4, 2])):
        same(output, alone[output.request_id])


def test_without_a_seed_two_answers_differ(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    a, b = engine.generate([Request(name, (0,), SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True)) for name in "ab"])
    assert a.tokens != b.tokens


def test_published_shapes_run(tokenizer: Tokenizer, small_config: Callable[..., ModelConfig]) -> None:
    """The nano preset as it is, but for its vocabulary."""
    model = Transformer(preset("nano", vocab_size=tokenizer.vocab_size))
    initialise(model, seed=0)
    engine = Engine(model, tokenizer, max_batch=2)
    assert engine.max_len == model.config.max_position_embeddings
    outputs = engine.generate([Request(str(i), (0,), SamplingParams(max_tokens=4, seed=i, ignore_eos=True)) for i in range(3)])
    assert [len(output.tokens) for output in outputs] == [4, 4, 4]
    assert engine.cache_bytes_per_token == model.config.num_hidden_layers * model.config.latent_dim * 4


LONG = tuple(int(token) for token in torch.randint(0, 300, (700,), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def long_model(tokenizer: Tokenizer, small_config: Callable[..., ModelConfig]) -> Transformer:
    model = Transformer(small_config(max_position_embeddings=1024))
    initialise(model, seed=5)
    return model


def long_requests() -> list[Request]:
    """Prompts of 60 to 600 tokens that share beginnings, some drawn, some greedy, some repeating themselves."""
    prompts = [LONG[:600], LONG[:300], LONG[:320] + (1, 2), LONG[:70], (5, 6, 7, 8) * 20, LONG[10:400], LONG[:513]]
    return [
        Request(str(i), prompt, SamplingParams(seed=i, temperature=0.8 * (i % 2), max_tokens=24, ignore_eos=True, logprobs=0))
        for i, prompt in enumerate(prompts)
    ]


def texts(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    found = [output.tokens for output in engine.generate(requests)]
    assert engine._scheduler.pool.num_used == 0
    engine._scheduler.check()
    return found


def test_prefixes_preemption_drafts_and_batches_change_no_text(long_model: Transformer, tokenizer: Tokenizer) -> None:
    requests = long_requests()
    alone = [texts(Engine(long_model, tokenizer, max_batch=1, reuse=False, speculate=False), [request])[0] for request in requests]
    full = 1024 * long_model.config.num_hidden_layers * 32 * 4 / 1e9  # GB of a cache for one long request
    for settings_ in (
        {"max_batch": 7, "reuse": False, "speculate": False},
        {"max_batch": 7, "max_step_s": 1e-4},
        {"max_batch": 3, "cache_gb": full},
        {"max_batch": 7, "cache_gb": full, "speculate": True, "reuse": False},
        {"max_batch": 2, "backend": "torch"},
    ):
        engine = Engine(long_model, tokenizer, **settings_)  # type: ignore[arg-type]
        assert texts(engine, requests) == alone, settings_
        if "reuse" not in settings_:
            again = engine.generate(requests)
            assert [output.tokens for output in again] == alone
            assert engine.cache.num_blocks < 20 or [output.cached_tokens for output in again] == [576, 256, 320, 64, 64, 384, 512]


def test_a_cached_prefix_has_the_bits_that_would_be_computed(long_model: Transformer, tokenizer: Tokenizer) -> None:
    """In bf16 the two readings of a block differ: what a short prompt read absorbed is not taken by a longer one that reads it expanded."""
    model = deepcopy(long_model).to(torch.bfloat16)
    params = SamplingParams(seed=4, max_tokens=100, ignore_eos=True, prompt_logprobs=0, prompt_logprobs_from=640)
    request = Request("long", LONG, params)
    (alone,) = Engine(model, tokenizer, reuse=False).generate([request])
    for before, cached in ((320, 256), (700, 576)):
        engine = Engine(model, tokenizer)
        engine.generate([Request("before", LONG[:before], SamplingParams(max_tokens=1))])
        (output,) = engine.generate([request])
        assert (output.tokens, output.prompt_logprobs) == (alone.tokens, alone.prompt_logprobs)
        assert output.cached_tokens == cached


def test_nothing_is_guessed_for_an_answer_that_lost_its_blocks(
    long_model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its known tokens are computed again first; guesses made meanwhile would be compared with logits of others."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    patient = [Request("a", LONG[:80], params), Request("b", LONG[100:190], params)]
    urgent = Request("urgent", LONG[:500], SamplingParams(seed=1, max_tokens=30, ignore_eos=True), priority=1)
    requests = [*patient, urgent]
    alone = {request.request_id: texts(Engine(long_model, tokenizer, speculate=False), [request])[0] for request in requests}
    monkeypatch.setattr(Answer, "draft", lambda answer, costs: alone[answer.request.request_id][answer.num_new :][:2])  # right guesses
    gb = (640 + 1) * long_model.config.num_hidden_layers * 32 * 4 / 1e9
    engine = Engine(long_model, tokenizer, max_batch=3, cache_gb=gb, reuse=False)
    for request in patient:
        engine.add(request)
    found: dict[str, tuple[int, ...]] = {request.request_id: () for request in requests}
    for step in count():
        if step == 20:
            engine.add(urgent)  # both give up their blocks, and start together again
        for output in engine.step():
            found[output.request_id] += output.tokens
        if not engine.has_work:
            break
    assert found == alone


def test_several_answers_to_one_prompt_share_it(long_model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(long_model, tokenizer, max_batch=4)
    params = SamplingParams(seed=3, n=4, max_tokens=8, ignore_eos=True)
    outputs = engine.generate([Request("r", LONG[:200], params)])
    assert [output.index for output in outputs] == [0, 1, 2, 3] and len({output.tokens for output in outputs}) == 4
    assert sorted(output.cached_tokens for output in outputs) == [0, 192, 192, 192]


def test_prompt_log_probabilities_are_those_of_the_model(long_model: Transformer, tokenizer: Tokenizer) -> None:
    prompt = LONG[:400]
    engine = Engine(long_model, tokenizer)
    with torch.inference_mode():
        logits = long_model.logits(long_model(torch.tensor([prompt])).hidden)[0]
    truth = logits.log_softmax(-1)[torch.arange(399), torch.tensor(prompt[1:])]
    for _ in range(2):  # the second time nothing may be taken from the cache
        (output,) = engine.generate([Request("r", prompt, SamplingParams(prompt_logprobs=2, max_tokens=1))])
        assert output.prompt_logprobs is not None and [entry.token for entry in output.prompt_logprobs] == list(prompt[1:])
        torch.testing.assert_close(torch.tensor([entry.logprob for entry in output.prompt_logprobs]), truth, rtol=1e-5, atol=1e-5)


def test_recorded_experts_are_those_of_the_model(long_model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(long_model, tokenizer, max_batch=2)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    plain, output = engine.generate([Request("a", LONG[:300], params), Request("b", LONG[:300], params, record_experts=True)])
    assert plain.experts is None and output.experts is not None and output.tokens == plain.tokens
    with torch.inference_mode():
        stats = long_model(torch.tensor([[*LONG[:300], *output.tokens[:-1]]])).router_stats
    assert (output.experts == torch.stack([layer.experts[0] for layer in stats], dim=1).numpy()).all()


@pytest.mark.parametrize("record", ["experts", "prompt_logprobs"])
def test_a_prompt_is_recorded_once_for_all_its_answers(
    long_model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    params = SamplingParams(seed=3, max_tokens=4, ignore_eos=True, prompt_logprobs=0 if record == "prompt_logprobs" else None)
    records = record == "experts"
    (one,) = Engine(long_model, tokenizer).generate([Request("r", LONG[:200], params, record_experts=records)])
    engine = Engine(long_model, tokenizer, max_batch=4, speculate=False)
    computed: list[int] = []
    step = engine._stack.step

    def counting(pieces: list[Piece], *, want_experts: bool = False) -> Answered:
        computed.append(sum(len(piece.tokens) for piece in pieces))
        return step(pieces, want_experts=want_experts)

    monkeypatch.setattr(engine._stack, "step", counting)
    outputs = engine.generate([Request("r", LONG[:200], replace(params, n=4), record_experts=records)])
    assert sum(computed) <= 200 + 3 * 8 + 4 * 4
    assert len({output.tokens for output in outputs}) == 4 and outputs[0].tokens == one.tokens
    for output in outputs:
        assert output.prompt_logprobs == one.prompt_logprobs
        if records:
            assert output.experts is not None and one.experts is not None and output.experts.shape == one.experts.shape
            assert (output.experts[:200] == one.experts[:200]).all()
    engine._scheduler.check()


def test_changed_weights_are_used_at_once_and_old_latents_forgotten(tokenizer: Tokenizer, small_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(small_config(max_position_embeddings=1024))
    initialise(model, seed=5)
    engine = Engine(model, tokenizer, max_batch=2)
    before = texts(engine, [long_requests()[0]])
    initialise(model, seed=6)
    engine.weights_changed()
    after = texts(engine, [long_requests()[0]])
    assert after == texts(Engine(model, tokenizer, reuse=False), [long_requests()[0]]) != before


def test_a_deadline_ends_an_answer(long_model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(long_model, tokenizer)
    (output,) = engine.generate([Request("r", LONG[:64], SamplingParams(max_tokens=900, ignore_eos=True), deadline_s=0.05)])
    assert output.finish_reason == "deadline" and len(output.tokens) < 900
    assert engine._scheduler.pool.num_used == 0


def test_the_reading_follows_the_position() -> None:
    """Whole units of 256 prompt tokens expanded, the rest of the prompt, the answer and drafts absorbed, however chunks are cut."""
    seq = Row(1, list(range(700)), 800)
    seq.tokens += [7, 8, 9]
    seq.blocks = list(range(12))
    seq.draft = (4, 5)
    cuts = [0, 64, 320, 576, 702, 705]
    pieces = [piece for a, b in pairwise(cuts) for piece in pieces_of(Chunk(seq, a, b - a, b >= 703), a)]
    assert [(piece.position, len(piece.tokens), piece.expanded) for piece in pieces] == [
        (0, 64, True), (64, 256, True), (320, 192, True), (512, 64, False), (576, 126, False), (702, 3, False),
    ]  # fmt: skip
    assert [list(piece.wanted) for piece in pieces] == [[], [], [], [], [], [0, 1, 2]]
    assert list(pieces[-1].tokens) == [9, 4, 5]
