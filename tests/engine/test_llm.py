"""`dsv2.LLM`: what it takes, what it gives, and that a training loop's weights and log-probabilities are the engine's."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsv2
from dsv2.checkpoint.layout import save_checkpoint
from dsv2.data.batch import IGNORE
from dsv2.engine import stack
from dsv2.engine.engine import Engine
from dsv2.engine.llm import LLM
from dsv2.engine.opening import EngineSettings
from dsv2.engine.quantize import run as quantize
from dsv2.engine.request import Request, SamplingParams
from dsv2.errors import CheckpointError, ConfigError, DataError, RequestError
from dsv2.kernels.cpu import library as native
from dsv2.kernels.cpu.build import Unavailable
from dsv2.kernels.cpu.library import library
from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.chat import render
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.losses import token_nll

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = tuple(int(token) for token in torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Transformer, tokenizer: Tokenizer) -> Path:
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run / "step-2", model, tokenizer)
    return run


@pytest.fixture(scope="module")
def llm(model: Transformer, tokenizer: Tokenizer) -> Iterator[LLM]:
    with LLM(model, tokenizer=tokenizer) as opened:
        yield opened


@pytest.fixture
def live(tokenizer: Tokenizer, small_config: Callable[..., ModelConfig]) -> Transformer:
    """A model of this test alone, with room for whole cached blocks."""
    built = Transformer(small_config(max_position_embeddings=512))
    initialise(built, seed=5)
    return built


def log_softmax(model: Transformer, tokens: tuple[int, ...]) -> torch.Tensor:
    """Return the log-probability of each token after the first, as a training step sees it."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([tokens])).hidden)[0, :-1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_every_setting_of_the_engine_is_handed_on() -> None:
    assert list(EngineSettings.__annotations__) == list(signature(Engine).parameters)[2:]


def test_a_folder_a_run_and_a_model_in_memory_give_the_same(folder: Path, llm: LLM) -> None:
    (truth,) = llm.generate("The river", GREEDY)
    for path in (folder, str(folder / "step-2")):
        with dsv2.LLM(path) as opened:
            (output,) = opened.generate("The river", GREEDY)
            assert (output.tokens, output.text) == (truth.tokens, truth.text)


def test_prompts_are_text_or_ids_one_or_many(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The river")
    (truth,) = llm.generate("The river", GREEDY)
    assert truth.prompt_tokens == len(ids)
    for prompt in (ids, tuple(ids), np.array(ids), torch.tensor(ids), ["The river"], [ids], [torch.tensor(ids)], torch.tensor([ids])):
        (output,) = llm.generate(prompt, GREEDY)
        assert output.tokens == truth.tokens
    mixed = llm.generate(["the sea", ids, "The river"], [GREEDY, replace(GREEDY, n=2), replace(GREEDY, max_tokens=2)])
    assert [(output.index, len(output.tokens)) for output in mixed] == [(0, 6), (0, 6), (1, 6), (0, 2)]
    assert mixed[1].tokens == mixed[2].tokens == truth.tokens
    assert llm.generate([]) == []


def test_more_prompts_than_the_engine_holds_keep_their_order(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [(i % 7, i) for i in range(100)]
    outputs = llm.generate(prompts, replace(GREEDY, max_tokens=2), progress=True)
    assert [output.tokens for output in outputs] == [llm.generate(prompt, replace(GREEDY, max_tokens=2))[0].tokens for prompt in prompts]
    assert "100/100 answers (100%)" in capsys.readouterr().err


def test_without_parameters_the_folder_decides_and_the_context_ends(folder: Path, llm: LLM) -> None:
    with LLM(folder) as opened:
        assert (opened.default_params.temperature, opened.default_params.top_p) == (0.3, 0.95)
        (output,) = opened.generate(LONG[:90], replace(opened.default_params, max_tokens=6, seed=1))
        assert output.tokens == llm.generate(LONG[:90], SamplingParams(temperature=0.3, top_p=0.95, max_tokens=6, seed=1))[0].tokens
    assert llm.default_params == SamplingParams()
    assert len(llm.generate(LONG[:90])[0].tokens) <= 6  # of a context of 96


@pytest.mark.parametrize(
    ("prompts", "params", "complaint"),
    [
        (None, None, "prompts is of type NoneType"),
        (b"The river", None, "prompts is of type bytes"),
        (["a", None], None, r"prompts\[1\] is of type NoneType"),
        ([{"role": "user"}], None, r"prompts\[0\] is of type dict"),
        (["a", []], None, r"prompts\[1\] of call \d+' has an empty prompt"),
        (["a", [0, 10**6]], None, r"prompts\[1\] of call \d+': tokens holds id 1000000"),
        (["a", LONG], None, r"prompts\[1\] of call \d+': prompt of 200 tokens \+ max_tokens = 1 exceeds the context of 96"),
        ("a", SamplingParams(max_tokens=96), "max_tokens = 96 exceeds"),
        (["a", "b"], [GREEDY], "1 SamplingParams for 2 prompts"),
        ("a", {"temperature": 0}, "params holds a str, not SamplingParams"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(llm: LLM, prompts: Any, params: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        llm.generate(prompts, params)
    assert not llm.engine.has_work


def test_a_model_in_memory_is_as_it_is(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        LLM(model)
    with pytest.raises(ConfigError, match="stay as they are"):
        LLM(model, tokenizer=tokenizer, dtype="bf16")
    with pytest.raises(ConfigError, match="has no files"):
        LLM(model, tokenizer=tokenizer, verify=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        LLM(tmp_path)


def test_chat_renders_and_answers_with_content(reciter: Any, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "the river"}]
    said = [*tokenizer.encode(" the sea", add_bos=False), tokenizer.eos_id]
    for template, content in (("v2", "the sea"), ("v2.5", " the sea")):
        prompt = render(tokenizer, turns, template=template, add_generation_prompt=True).tokens
        with LLM(reciter(said, prompt_len=len(prompt)), tokenizer=tokenizer) as llm:
            one, two = llm.chat([turns, turns], template=template)
            assert one.text == two.text == content and one.finish_reason == "stop" and one.prompt_tokens == len(prompt)
            assert llm.chat(turns, template=template)[0].tokens == one.tokens
            with pytest.raises(DataError, match=r"conversations\[1\]: message 0 has role 'poet'"):
                llm.chat([turns, [{"role": "poet", "content": ""}]])
            with pytest.raises(DataError, match="no messages"):
                llm.chat([])


def test_a_stream_adds_up_and_closing_it_frees_its_cache(llm: LLM) -> None:
    (truth,) = llm.generate("The river", GREEDY)
    stream = llm.stream("The river", GREEDY)
    first = next(stream)
    assert llm.generate("The river", GREEDY)[0].tokens == truth.tokens  # others may be asked meanwhile
    assert (*first.tokens, *(token for output in stream for token in output.tokens)) == truth.tokens
    stream = llm.stream("The river", GREEDY)
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work and llm.engine._scheduler.pool.num_used == 0
    with pytest.raises(RequestError, match="here are 2"):
        llm.stream(["a", "b"])
    with pytest.raises(RequestError, match="exceeds the context"):
        llm.stream(LONG)  # before anything is asked of it


def test_one_thread_at_a_time(llm: LLM) -> None:
    inside, leave, errors = threading.Event(), threading.Event(), list[Exception]()

    def hold() -> None:
        with llm._alone():
            inside.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    try:
        llm.generate("a", GREEDY)
    except RequestError as error:
        errors.append(error)
    leave.set()
    other.join()
    assert "another thread" in str(errors[0]) and "AsyncLLM" in str(errors[0])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_bach": 4}, "no setting 'max_bach'"),
        ({"max_batch": 0}, "max_batch = 0 is not a whole number of at least 1"),
        ({"max_batch": "4"}, "max_batch = '4'"),
        ({"max_len": 100.5}, "max_len = 100.5"),
        ({"cache": "7"}, "cache = '7' is not one of: auto, fp32"),
        ({"cache_gb": float("nan")}, "cache_gb = nan is not a finite number > 0"),
        ({"backend": "jax"}, "backend = 'jax'"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(settings: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(tmp_path / "nowhere", **settings)
    assert complaint in caught.value.message


def test_a_cache_beyond_memory_is_refused_and_bits_may_be_a_number(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"cache_gb = 1e\+06 is more than the [\d.]+ GB"):
        LLM(model, tokenizer=tokenizer, cache_gb=1e6)
    with LLM(model, tokenizer=tokenizer, cache=8) as llm:  # type: ignore[arg-type]
        assert "8 bits" in str(llm.engine.cache)


def test_why_torch_computes_is_said(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quantize(str(folder), out=tmp_path / "packed", scheme="bf16")
    monkeypatch.setattr(stack, "library", library.__wrapped__)  # which looks at the environment once
    monkeypatch.setattr(native, "library", library.__wrapped__)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    capsys.readouterr()
    LLM(model, tokenizer=tokenizer).close()
    assert "torch computes in place of the native kernels: " in capsys.readouterr().err
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("DSV2_CPU", "torch")
    LLM(model, tokenizer=tokenizer).close()
    assert not capsys.readouterr().err
    with pytest.raises(Unavailable, match="a packed model needs the native kernels: DSV2_CPU = torch"):
        LLM(tmp_path / "packed")
    monkeypatch.setenv("DSV2_CPU", "avx521")
    with pytest.raises(ConfigError, match="DSV2_CPU = 'avx521' is not one of"):
        LLM(model, tokenizer=tokenizer)


def test_a_closed_one_says_so(model: Transformer, tokenizer: Tokenizer) -> None:
    llm = LLM(model, tokenizer=tokenizer)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        llm.generate("a", GREEDY)
    with pytest.raises(RequestError, match="closed"):
        llm.engine.generate([Request("r", (0,), GREEDY)])


def test_a_fork_is_told_to_open_its_own(model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the memory but not the threads: to step or to join them would never end."""
    llm = LLM(model, tokenizer=tokenizer, backend="native")
    library, pid = llm.engine._stack._lib, os.getpid()  # type: ignore[attr-defined]
    handle = llm.engine._stack._handle  # type: ignore[attr-defined]
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: pid + 1)
        fork.setattr(library, "dsv2_close", lambda _: pytest.fail("joins threads that are not there"))
        with pytest.raises(RequestError, match="fork"):
            llm.generate("a", GREEDY)
        llm.close()
    library.dsv2_close(handle)


# Log-probabilities ------------------------------------------------------------------------------------------------------------------


def test_scores_are_the_trainers(live: Transformer, tokenizer: Tokenizer) -> None:
    with LLM(live, tokenizer=tokenizer) as llm:
        whole, short = llm.score([LONG, LONG[:3]])
        assert whole.tokens == LONG[1:] and len(short.logprobs) == 2
        torch.testing.assert_close(torch.tensor(whole.logprobs), log_softmax(live, LONG), rtol=0, atol=1e-5)
        hidden = live(torch.tensor([LONG])).hidden
        nll = token_nll(live, hidden, torch.tensor([[*LONG[1:], IGNORE]]))
        assert -whole.sum == pytest.approx(nll.item(), abs=1e-5 * len(LONG))
        best = live.logits(hidden)[0, :-1, : tokenizer.num_tokens].argmax(-1)
        assert whole.greedy == tuple((best == torch.tensor(LONG[1:])).tolist()) and not whole.is_greedy
        (written,) = llm.generate(LONG, GREEDY)
        (again,) = llm.score(LONG, written.tokens)
        assert again.is_greedy and again.tokens == written.tokens


def test_choices_share_what_stands_before_them(live: Transformer, tokenizer: Tokenizer) -> None:
    """As an evaluation with several choices asks: the common part is computed once, and nothing else changes."""
    choices = [LONG[150:153], (7,), "the sea", LONG[150:199]]
    context = LONG[:150]
    ids = [tuple(tokenizer.encode(c, add_bos=False)) if isinstance(c, str) else c for c in choices]
    with LLM(live, tokenizer=tokenizer) as llm, LLM(live, tokenizer=tokenizer, reuse=False, max_batch=1) as alone:
        for _ in range(2):
            scores = llm.score([context] * 4, choices)
            assert [score.tokens for score in scores] == ids
            for score, choice in zip(scores, ids, strict=True):
                truth = log_softmax(live, (*context, *choice))[149:]
                torch.testing.assert_close(torch.tensor(score.logprobs), truth, rtol=0, atol=1e-5)
                assert score == alone.score([context], [choice])[0]
        requests = llm.builder.scored([context] * 4, ids, "")
        assert [output.cached_tokens for output in llm.engine.generate(requests)] == [128] * 4
        assert llm.score(LONG[:200])[0].logprobs == alone.score(LONG[:200])[0].logprobs  # all of it wanted: nothing is taken unread


@pytest.mark.parametrize(
    ("prompts", "completions", "complaint"),
    [
        ([0], None, r"prompts\[0\]: a score needs .* here are 1 and 0"),
        (["a", "b"], ["c"], "1 completions for 2 prompts"),
        ("a", "", r"completions\[0\]: .* and 0"),
        (LONG[:96], None, "exceeds the context"),
        ([[]], [[1]], r"prompts\[0\]: a score needs .* here are 0 and 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm: LLM, prompts: Any, completions: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        llm.score(prompts, completions)


# A live model: reinforcement learning ----------------------------------------------------------------------------------------------


def optimiser_step(model: Transformer) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.tensor([LONG[:100]])
    token_nll(model, model(tokens).hidden, torch.tensor([[*LONG[1:100], IGNORE]])).div(99).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def test_a_rollout_after_an_optimiser_step_uses_the_new_weights_without_a_copy(live: Transformer, tokenizer: Tokenizer) -> None:
    params = replace(GREEDY, max_tokens=24, logprobs=0, temperature=1.0, seed=1)
    with LLM(live, tokenizer=tokenizer, backend="native") as llm:
        weights = llm.engine._stack.weights  # type: ignore[attr-defined]
        assert weights.embedding.data == live.model.embed_tokens.weight.data_ptr()
        assert weights.layers[1].expert_down.data == live.model.layers[1].mlp.experts.down_proj.data_ptr()  # type: ignore[union-attr]
        for step in range(3):
            (output,) = llm.generate(LONG[:150], params, record_experts=True)
            assert output.cached_tokens == 0, "a latent of the old weights"
            whole = (*LONG[:150], *output.tokens)
            assert output.logprobs is not None and output.experts is not None
            sampled = torch.tensor([entry.logprob for entry in output.logprobs])
            torch.testing.assert_close(sampled, log_softmax(live, whole)[149:], rtol=0, atol=1e-5)
            (score,) = llm.score(LONG[:150], output.tokens)
            torch.testing.assert_close(torch.tensor(score.logprobs), sampled, rtol=0, atol=1e-5)
            with torch.no_grad():
                stats = live(torch.tensor([whole[:-1]])).router_stats
            assert (output.experts == torch.stack([layer.experts[0] for layer in stats], dim=1).numpy()).all()
            with LLM(live, tokenizer=tokenizer) as fresh:
                assert fresh.generate(LONG[:150], params)[0].tokens == output.tokens, step
            optimiser_step(live)
            llm.weights_changed()


def test_weights_that_got_other_memory_are_found(live: Transformer, tokenizer: Tokenizer) -> None:
    other = Transformer(live.config)
    initialise(other, seed=6)
    with LLM(live, tokenizer=tokenizer) as llm, LLM(other, tokenizer=tokenizer) as truth:
        before = llm.generate(LONG[:70], GREEDY)[0].tokens
        live.load_state_dict(other.state_dict(), assign=True)
        llm.weights_changed()
        assert llm.generate(LONG[:70], GREEDY)[0].tokens == truth.generate(LONG[:70], GREEDY)[0].tokens != before
