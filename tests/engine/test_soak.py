"""Many mixed requests through a cache that is far too small, with cancels: every one ends as it should, and nothing stays behind."""

import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dsv2.engine.answer import joined
from dsv2.engine.engine import Engine
from dsv2.engine.request import Constraint, Output, Request, SamplingParams
from dsv2.engine.scheduler import Scheduler
from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

MAX_BATCH, LONGEST, MOST_NEW = 32, 400, 40
MOST_GROWTH = 4_000_000  # bytes of memory in the second half of the soak
CONSTRAINTS = [Constraint("regex", "[ab]{3,9}"), Constraint("regex", "(the|and) [0-9]+"), Constraint("json_schema", {"type": "integer"})]


@pytest.fixture(scope="module")
def model(small_config: Callable[..., ModelConfig]) -> Transformer:
    built = Transformer(small_config(max_position_embeddings=512))
    initialise(built, seed=11)
    return built


def random_params(chance: random.Random) -> SamplingParams:
    """One of every kind of parameter now and then."""
    given: dict[str, Any] = {"seed": chance.randrange(2**40), "max_tokens": chance.randint(1, MOST_NEW)}
    given["temperature"] = chance.choice([0, 0.5, 1, 1.5])
    choices: list[dict[str, Any]] = [
        {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.02}, {"frequency_penalty": 1, "presence_penalty": -0.5}, {"repetition_penalty": 1.2},
        {"stop": ("e", "the river"), "temperature": 1}, {"stop": ("s",), "include_stop": True}, {"stop_token_ids": (7, 90)},
        {"ignore_eos": True}, {"logprobs": 3}, {"prompt_logprobs": 1}, {"logit_bias": {5: 4.0}}, {"min_tokens": 1},
    ]  # fmt: skip
    for choice in chance.sample(choices, chance.randint(0, 3)):
        given |= choice
    if chance.random() < 0.1:
        given["n"] = chance.randint(2, 4)
    if chance.random() < 0.02:
        given = {"seed": given["seed"], "max_tokens": MOST_NEW, "constraint": chance.choice(CONSTRAINTS)}
    return SamplingParams(**given)


def random_requests(chance: random.Random, count: int, num_tokens: int) -> list[Request]:
    """Prompts of 1 to 400 tokens that share beginnings."""
    bases = [[chance.randrange(num_tokens) for _ in range(LONGEST)] for _ in range(8)]
    requests = []
    for number in range(count):
        length, kept = chance.randint(1, LONGEST), chance.randint(0, LONGEST)
        prompt = (chance.choice(bases)[:kept] + [chance.randrange(num_tokens) for _ in range(LONGEST)])[:length]
        extra: dict[str, Any] = {"priority": chance.choice([0, 0, 0, -2, 3]), "cache_salt": chance.choice(["", "", "a", "b"])}
        if chance.random() < 0.05:
            extra["deadline_s"] = chance.choice([1e-6, 0.2, 2.0])
        if chance.random() < 0.05:
            extra["record_experts"] = True
        requests.append(Request(str(number), tuple(prompt), random_params(chance), **extra))
    return requests


@dataclass
class Ends:
    """What became of the requests."""

    whole: dict[str, Output] = field(default_factory=dict)  # of those that shall be compared
    aborted: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    halfway: "Footprint | None" = None
    num_steps: int = 0


@dataclass(frozen=True)
class Footprint:
    """What the process holds."""

    rss_bytes: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> "Footprint":
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))


def require_sound(request: Request, output: Output, tokenizer: Tokenizer) -> None:
    """Check that a whole answer ended for the reason that it states, and carries what was asked for."""
    params, tokens, reason = request.params, output.tokens, output.finish_reason
    ends = {*params.stop_token_ids, *([] if params.ignore_eos else [tokenizer.eos_id])}
    assert len(tokens) <= params.max_tokens and not ends & set(tokens[:-1]) and output.prompt_tokens == len(request.tokens)
    stopped = not params.min_tokens and any(stop in output.text for stop in params.stop)  # one that is complete too early does not count
    if reason == "length":
        assert len(tokens) == params.max_tokens and tokens[-1] not in ends and not stopped
    elif reason == "stop":
        text = tokenizer.decode(list(tokens))
        assert tokens[-1] in ends or any(stop in text for stop in params.stop) or params.constraint is not None
        assert params.include_stop or not stopped
    else:
        assert reason == "deadline" and request.deadline_s is not None
    assert (output.logprobs is not None) == (params.logprobs is not None)
    assert output.logprobs is None or [entry.token for entry in output.logprobs] == list(tokens)
    if reason != "deadline":
        assert output.prompt_logprobs is None or len(output.prompt_logprobs) == len(request.tokens) - 1
        assert not request.record_experts or (output.experts is not None and len(output.experts) == len(request.tokens) + len(tokens) - 1)


def run(engine: Engine, requests: list[Request], chance: random.Random, compared: set[str]) -> Ends:
    """Add all, step until nothing is left; for one in ten that end another is aborted, whether it runs, waits or is being compiled."""
    ends, by_name = Ends(), {request.request_id: request for request in requests}
    parts: dict[str, dict[int, list[Output]]] = {name: {} for name in by_name}
    left = {name: request.params.n for name, request in by_name.items()}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            name = output.request_id
            assert name in left, "something came after the end"
            mine = parts[name].setdefault(output.index, [])
            assert not mine or mine[-1].finish_reason is None, "an answer ended twice"
            mine.append(output)
            if output.finish_reason is None:
                continue
            whole = joined(mine)
            require_sound(by_name[name], whole, engine.tokenizer)
            ends.reasons[output.finish_reason] += 1
            if name in compared and output.index == by_name[name].params.n - 1:
                ends.whole[name] = whole
            left[name] -= 1
            if not left[name]:
                del left[name], parts[name]
        while left and len(requests) - len(left) > 9 * len(ends.aborted) + 9:
            name = chance.choice(list(left))
            last = engine.abort(name)
            assert last is not None and last.finish_reason == "abort"
            ends.aborted.add(name)
            del left[name], parts[name]
        ends.num_steps += 1
        if ends.num_steps % 50 == 0:
            engine._scheduler.check()
        if ends.halfway is None and len(left) <= len(requests) // 2:
            ends.halfway = Footprint.now()
    assert not left
    return ends


def soak(
    model: Transformer, tokenizer: Tokenizer, count: int, *, compare: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Ends, Footprint, int]:
    """Run ``count`` requests; return their ends, the footprint behind them and the number of preemptions."""
    pytest.importorskip("llguidance")
    preempted: list[int] = []
    stop_last = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self: preempted.append(1) or stop_last(self))
    chance = random.Random(7)
    requests = random_requests(chance, count, tokenizer.num_tokens)
    demand = MAX_BATCH * sum(len(request.tokens) + request.params.max_tokens for request in requests) // count  # tokens of a full batch
    bytes_per_token = model.config.num_hidden_layers * model.config.latent_dim * 4
    engine = Engine(model, tokenizer, max_batch=MAX_BATCH, cache_gb=demand / 10 * bytes_per_token / 1e9)
    compared = {request.request_id for request in chance.sample(requests, compare)}
    ends = run(engine, requests, chance, compared)
    engine._scheduler.check()
    assert engine._scheduler.pool.num_used == 0 and not engine._scheduler.has_work
    behind = Footprint.now()
    assert sum(ends.reasons.values()) >= count - len(ends.aborted)
    alone = Engine(model, tokenizer, max_batch=1, reuse=False, speculate=False)
    for request in requests:
        if request.request_id in ends.whole and request.deadline_s is None:
            found, truth = ends.whole[request.request_id], alone.generate([request])[-1]
            assert (found.tokens, found.text, found.finish_reason) == (truth.tokens, truth.text, truth.finish_reason), request
    return ends, behind, len(preempted)


def test_mixed_requests_with_cancels_in_a_small_cache(model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, _, preempted = soak(model, tokenizer, 60, compare=12, monkeypatch=monkeypatch)
    assert preempted and {"stop", "length"} <= set(ends.reasons) and 4 <= len(ends.aborted) <= 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_thousand_requests_leave_nothing_behind(model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    ends, behind, preempted = soak(model, tokenizer, 2000, compare=60, monkeypatch=monkeypatch)
    half = ends.halfway
    assert half is not None
    growth = behind.rss_bytes - half.rss_bytes
    print(f"{time.monotonic() - started:.0f} s, {ends.num_steps} steps, {preempted} preemptions, {len(ends.aborted)} aborted")
    print(f"{dict(ends.reasons)}; memory {half.rss_bytes / 1e6:.1f} MB after half, {growth / 1e6:+.2f} MB in the second; {behind}")
    assert growth < MOST_GROWTH
    assert (behind.threads, behind.files) == (half.threads, half.files)
    assert set(ends.reasons) == {"stop", "length", "deadline"} and preempted > 20 and 150 < len(ends.aborted) < 250
