"""`dsv2.AsyncLLM`: callers share batches, leave when they like, and every accepted request ends exactly once."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

import dsv2
from dsv2.engine.async_llm import AsyncLLM
from dsv2.engine.constrain import GrammarCompiler
from dsv2.engine.engine import Engine
from dsv2.engine.llm import LLM
from dsv2.engine.request import Constraint, Output, Request, SamplingParams
from dsv2.engine.thread import EngineThread, Overloaded
from dsv2.errors import CheckpointError, ConfigError, RequestError
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = replace(GREEDY, max_tokens=80)
LONG = tuple(range(3, 83))  # more than a block
PROMPTS = ["the river", "the sea", "", "the old book says it"]


@pytest.fixture
def opened(model: Transformer, tokenizer: Tokenizer) -> Callable[..., Any]:
    """Return a context manager: an AsyncLLM, aborted at its end."""

    @asynccontextmanager
    async def build(**settings: Any) -> AsyncIterator[AsyncLLM]:
        llm = AsyncLLM(settings.pop("model", model), tokenizer=tokenizer, **settings)
        try:
            yield llm
        finally:
            await llm.close(drain=False)

    return build


async def in_engine(llm: AsyncLLM, read: Callable[[Engine], Any]) -> Any:
    return await asyncio.wrap_future(llm._thread.call(read))


async def until(llm: AsyncLLM, condition: Callable[[Engine], bool]) -> None:
    async with asyncio.timeout(20):
        while not await in_engine(llm, condition):
            await asyncio.sleep(0.001)


def slow_down(llm: AsyncLLM) -> None:
    """Make an endless answer take 0.4 s, so that who wants to leave early finds it unfinished on a busy machine, too."""
    stack = llm._thread._engine._stack
    step = stack.step
    stack.step = lambda pieces, **wanted: (time.sleep(0.005), step(pieces, **wanted))[1]


def test_many_coroutines_share_batches_and_get_what_they_would_get_alone(opened: Any, model: Transformer, tokenizer: Tokenizer) -> None:
    sizes: list[int] = []

    async def main() -> list[Any]:
        async with opened(max_batch=16) as llm:
            step = llm._thread._engine._stack.step

            def counted(pieces: Any, **options: Any) -> Any:
                sizes.append(len(pieces))
                return step(pieces, **options)

            llm._thread._engine._stack.step = counted
            return await asyncio.gather(
                *(llm.generate(prompt, GREEDY) for prompt in PROMPTS * 5),
                llm.generate(PROMPTS, replace(GREEDY, n=2)),
                llm.score(PROMPTS[:2], ["the", "sea"]),
                llm.chat([{"role": "user", "content": "the sea"}], GREEDY),
            )

    *singles, listed, scores, chat = asyncio.run(main())
    with LLM(model, tokenizer=tokenizer) as llm:
        truth = [output.tokens for output in llm.generate(PROMPTS, GREEDY)]
        assert [output.tokens for outputs in singles for output in outputs] == truth * 5
        assert [output.tokens for output in listed] == [tokens for tokens in truth for _ in range(2)]
        assert scores == llm.score(PROMPTS[:2], ["the", "sea"])
        assert chat[0].tokens == llm.chat([{"role": "user", "content": "the sea"}], GREEDY)[0].tokens
    assert max(sizes) > 8


def test_streams_add_up(opened: Any, model: Transformer, tokenizer: Tokenizer) -> None:
    async def read(llm: AsyncLLM, prompt: str) -> tuple[int, ...]:
        return tuple([token async for output in llm.stream(prompt, GREEDY) for token in output.tokens])

    async def main() -> list[Any]:
        async with opened() as llm:
            with pytest.raises(RequestError, match="here are 2"):
                await anext(llm.stream(PROMPTS[:2]))
            return await asyncio.gather(*(read(llm, prompt) for prompt in PROMPTS))

    with LLM(model, tokenizer=tokenizer) as llm:
        assert asyncio.run(main()) == [output.tokens for output in llm.generate(PROMPTS, GREEDY)]


def test_who_leaves_frees_the_cache_and_disturbs_nobody(opened: Any) -> None:
    async def main() -> None:
        async with opened(max_batch=4) as llm:
            slow_down(llm)
            staying = asyncio.create_task(llm.generate("the river", ENDLESS))
            cancelled = asyncio.create_task(llm.generate(["the sea", "and"], ENDLESS))
            await until(llm, lambda engine: len(engine._answers) == 3)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            async with aclosing(llm.stream("the book", ENDLESS)) as stream:
                async for _ in stream:
                    break
            async for _ in llm.stream("the hills", ENDLESS):
                break  # without aclosing: closed when it is collected
            gc.collect()
            await asyncio.sleep(0)
            await until(llm, lambda engine: len(engine._answers) <= 1)
            assert len((await staying)[0].tokens) == 80
            assert await in_engine(llm, lambda engine: (engine.has_work, engine._scheduler.pool.num_used)) == (False, 0)
            assert llm._thread._num_accepted == 0

    asyncio.run(main())


def test_what_is_refused_or_fails_ends_its_own_call_alone(opened: Any, reciter: Any, tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("the river runs to", add_bos=False)
    broken = reciter([*words[:4], None, *words * 4], prompt_len=3)  # no numbers after 7 tokens

    async def main() -> None:
        async with opened(model=broken, max_batch=4) as llm:
            well = asyncio.create_task(llm.generate([0] * 9, replace(GREEDY, max_tokens=20)))
            ill = asyncio.create_task(llm.generate([[0] * 3, [0] * 9], replace(GREEDY, max_tokens=20)))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="exceeds the context"):
                await llm.generate([0] * 200)
            refused = await llm.generate([0] * 9, SamplingParams(constraint=Constraint("regex", "("), max_tokens=9, n=2))
            assert [output.finish_reason for output in refused] == ["error"] * 2 and "cannot be used" in str(refused[1].error)
            with pytest.raises(CheckpointError, match=r"prompts\[0\] of call 2'.* not finite"):
                await ill
            assert len((await well)[0].tokens) == 20
            assert not await in_engine(llm, lambda engine: engine.has_work)

    asyncio.run(main())


def test_a_step_that_fails_ends_what_is_there_and_serves_what_comes(opened: Any) -> None:
    async def main() -> None:
        async with opened() as llm:
            stack = llm._thread._engine._stack
            step, stack.step = stack.step, None
            for outcome in await asyncio.gather(llm.generate("a", GREEDY), llm.generate("b", GREEDY), return_exceptions=True):
                assert isinstance(outcome, TypeError)
            stack.step = step
            assert len((await llm.generate("a", GREEDY))[0].tokens) == 6
            assert llm._thread._num_accepted == 0

    asyncio.run(main())


def test_too_many_are_refused_and_later_ones_are_not(opened: Any) -> None:
    async def main() -> None:
        async with opened(max_requests=3, max_batch=1) as llm:
            gate = threading.Event()
            llm._thread.call(lambda engine: gate.wait(20))
            tasks = [asyncio.create_task(llm.generate("a", GREEDY)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="3 requests are under way; with 1 more they exceed 3"):
                await llm.generate("b", GREEDY)
            gate.set()
            await asyncio.gather(*tasks)
            await llm.generate(["b"] * 3, GREEDY)
            with pytest.raises(Overloaded):
                await llm.generate(["b"] * 4, GREEDY)
            assert not await in_engine(llm, lambda engine: engine.has_work)

    asyncio.run(main())


def test_a_bound_below_one_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="max_requests = 0"):
        AsyncLLM(model, tokenizer=tokenizer, max_requests=0)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_ends_every_accepted_request(opened: Any, drain: bool) -> None:
    async def main() -> None:
        async with opened(max_batch=2) as llm:
            tasks = [asyncio.create_task(llm.generate(prompt, replace(ENDLESS, n=2))) for prompt in PROMPTS]
            await until(llm, lambda engine: len(engine._answers) == 8)
            await llm.close(drain=drain)
            reasons = [output.finish_reason for outputs in await asyncio.gather(*tasks) for output in outputs]
            assert reasons == ["length" if drain else "abort"] * 8
            with pytest.raises(RequestError, match="closed"):
                await llm.generate("a", GREEDY)
            with pytest.raises(RequestError, match="closed"):
                await llm.weights_changed()
            assert not llm._thread._thread.is_alive()

    asyncio.run(main())


def test_the_block_closes_it_whatever_happens(model: Transformer, tokenizer: Tokenizer) -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            async with dsv2.AsyncLLM(model, tokenizer=tokenizer) as llm:
                task = asyncio.create_task(llm.generate("the river", ENDLESS))
                await asyncio.sleep(0)
                raise KeyError
        assert (await task)[0].finish_reason == "abort"

    asyncio.run(main())


def test_several_event_loops_use_one(model: Transformer, tokenizer: Tokenizer) -> None:
    llm = AsyncLLM(model, tokenizer=tokenizer, max_batch=4)
    found: dict[int, list[Output]] = {}

    def ask(number: int) -> None:
        found[number] = asyncio.run(llm.generate(PROMPTS, GREEDY))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([output.tokens for output in found[n]] == [output.tokens for output in found[0]] for n in range(4))
    asyncio.run(llm.close())


def test_a_loop_that_has_gone_takes_its_requests_with_it(model: Transformer, tokenizer: Tokenizer) -> None:
    thread = EngineThread(Engine(model, tokenizer), max_requests=8)
    taken = threading.Event()

    def gone(item: object) -> None:
        taken.set()
        raise RuntimeError("Event loop is closed")

    thread.submit([Request("gone", (0,), ENDLESS)], gone)
    assert taken.wait(20)
    assert thread.call(lambda engine: engine.has_work).result(20) is False
    ended: list[Output | Exception] = []
    thread.submit([Request("next", (0,), GREEDY)], ended.append)
    thread.close()
    assert isinstance(ended[-1], Output) and ended[-1].finish_reason == "length"


def test_weights_change_between_two_steps_of_requests_under_way(opened: Any, small_config: Any) -> None:
    model = Transformer(small_config())
    initialise(model, seed=5)

    def half_a_change() -> None:
        initialise(model, seed=7)
        raise ZeroDivisionError

    async def main() -> None:
        async with opened(model=model) as llm:
            task = asyncio.create_task(llm.generate("the river", ENDLESS))
            await until(llm, lambda engine: bool(engine._answers))
            await llm.weights_changed(lambda: initialise(model, seed=6))
            assert len((await task)[0].tokens) == 80
            await llm.generate(LONG, GREEDY)
            with LLM(model, tokenizer=llm.tokenizer) as fresh:
                assert (await llm.generate("the sea", GREEDY))[0].tokens == fresh.generate("the sea", GREEDY)[0].tokens
            with pytest.raises(ZeroDivisionError):  # half-way: what was cached of the old weights goes all the same
                await llm.weights_changed(half_a_change)
            with LLM(model, tokenizer=llm.tokenizer) as fresh:
                assert (await llm.generate(LONG, GREEDY))[0].tokens == fresh.generate(LONG, GREEDY)[0].tokens

    asyncio.run(main())


def test_it_sleeps_while_there_is_nothing_to_do(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without requests nor while a constraint is compiled does the thread turn; others are served meanwhile."""
    compiled = threading.Event()
    build = GrammarCompiler._build

    def slow(self: GrammarCompiler, constraint: Constraint, limit_s: float) -> Any:
        compiled.wait(20)
        return build(self, constraint, limit_s)

    monkeypatch.setattr(GrammarCompiler, "_build", slow)

    async def turns_in(llm: AsyncLLM, counted: list[int]) -> int:
        before = counted[0]
        await asyncio.sleep(0.2)
        return counted[0] - before

    async def main() -> None:
        async with opened() as llm:
            counted, turn = [0], llm._thread._turn

            def turning() -> bool:
                counted[0] += 1
                return turn()

            llm._thread._turn = turning
            await llm.generate("a", GREEDY)
            assert await turns_in(llm, counted) <= 1
            llm._thread._engine._grammars._time_limit_s = 600.0
            waiting = asyncio.create_task(llm.generate("a", SamplingParams(constraint=Constraint("regex", "[ab]{3}"), max_tokens=9)))
            await until(llm, lambda engine: engine.has_work)
            assert await turns_in(llm, counted) <= 1
            await llm.generate("a", GREEDY)
            assert not waiting.done()
            compiled.set()
            async with asyncio.timeout(20):  # of the 600 that an engine would sleep which nobody wakes
                assert len((await waiting)[0].text) == 3

    asyncio.run(main())


def test_nothing_keeps_a_forgotten_one_alive(model: Transformer, tokenizer: Tokenizer) -> None:
    llm = AsyncLLM(model, tokenizer=tokenizer)
    thread = llm._thread._thread
    del llm
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
