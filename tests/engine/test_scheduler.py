"""The scheduler against a pretend model, over random traces and in moments that matter."""

from collections import Counter
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_engine import World, prompt, run_trace

from dsv2.engine.blocks import BLOCK_LEN, BlockPool
from dsv2.engine.costs import StepCosts
from dsv2.engine.scheduler import ELDER_EVERY, PREFILL_EVERY, Scheduler
from dsv2.engine.sequence import Plan, Sequence, State
from dsv2.errors import RequestError


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([5, 6, 8, 12, 24]),
    max_sequences=st.sampled_from([1, 2, 4, 9]),
    chunk_len=st.sampled_from([64, 128, 320]),
    patience=st.sampled_from([1, 16, 64]),
    reuse=st.sampled_from([True, True, False]),
    tier_loss=st.sampled_from([None, 0.0, 0.4]),
    drafting=st.booleans(),
    slow=st.sampled_from([1.0, 1.0, 40.0]),
    resets=st.sampled_from([0.0, 0.02]),
)
def test_random_traces(
    seed: int,
    num_blocks: int,
    max_sequences: int,
    chunk_len: int,
    patience: int,
    reuse: bool,
    tier_loss: float | None,
    drafting: bool,
    slow: float,
    resets: float,
) -> None:
    """Sequences come, share beginnings, are cancelled, expire, preempt each other; all end, hold right latents and leave nothing."""
    rng = Random(seed)
    costs = (0.01 * slow, 0.002, 0.0005, 1e-7)
    run_trace(World(rng, num_blocks, max_sequences, chunk_len, patience, reuse, tier_loss, drafting, costs), resets)


def test_random_traces_reach_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(12):
        world = World(Random(seed), 6 + seed, 2 + seed % 4, 128, 16, tier_loss=0.4 if seed % 2 else None, drafting=seed % 3 > 0)
        seen += run_trace(world, 0.02 * (seed % 4 == 0))
    names = {"expired", "parked", "elder", "mixed", "two prompts", "ended", "preempted", "hit", "new weights"}
    names |= {"draft accepted", "draft rejected", "loaded", "lost", "table replaced"}
    assert {name: seen[name] for name in names if seen[name] < 5} == {}


def test_siblings_compute_their_prompt_once() -> None:
    world = World(Random(1), num_blocks=60, max_sequences=8, chunk_len=128)
    tokens = prompt(0, 640, 0, 0) + [3]
    seqs = [world.add(tokens, 5) for _ in range(6)]
    world.drain(100)
    assert sum(length for _, length in world.computed) <= 640 + 6 * (1 + 5)
    assert [seq.num_hit for seq in seqs] == [0] + [640] * 5


@pytest.mark.parametrize("moment", ["cancel", "preempt", "deadline"])
def test_who_waits_for_a_sibling_goes_on_without_it(moment: str) -> None:
    world = World(Random(1), num_blocks=24, max_sequences=4, chunk_len=64)
    tokens = prompt(0, 640, 0, 0) + [3]
    leader = world.add(tokens, 5, deadline=0.05 if moment == "deadline" else None)
    follower = world.add(tokens, 5)
    world.step()
    assert follower.state is State.PARKED
    if moment == "cancel":
        world.cancel(leader.seq_id)
    elif moment == "preempt":
        world.add(prompt(1, 1400, 0, 0), 5, priority=1)
    world.drain(100)
    assert leader.num_preempted == (moment == "preempt")
    assert set(world.answers) >= {follower.seq_id}
    assert follower.num_hit >= 64


def test_a_higher_priority_does_not_wait_for_a_lower_one() -> None:
    world = World(Random(1), num_blocks=40, max_sequences=4, chunk_len=64)
    tokens = prompt(0, 640, 0, 0) + [3]
    world.add(tokens, 5)
    world.step()
    urgent = world.add(tokens, 5, priority=1)
    world.step()
    assert urgent.state is State.RUNNING
    world.drain(100)


def test_prefix_hits_leave_a_token_to_compute_and_are_not_taken_where_logits_are_due() -> None:
    world = World(Random(1), num_blocks=20, max_sequences=2)
    tokens = prompt(0, 128, 0, 0)
    world.add(tokens, 2)
    world.drain(20)
    again, scored = world.add(tokens, 2), world.add(tokens, 2, all_logits=True)
    plan = world.step()
    assert [(chunk.seq, chunk.start, chunk.length) for chunk in plan.chunks] == [(again, 64, 64), (scored, 0, 128)]
    assert (again.num_hit, scored.num_hit) == (64, 0)
    world.drain(20)


def test_the_oldest_of_the_highest_priority_keeps_its_blocks_and_the_last_gives_its_up() -> None:
    world = World(Random(1), num_blocks=6, max_sequences=3, stops=False)
    seqs = [world.add(prompt(index, 60, 0, 0), 250, salt=str(index)) for index in range(3)]
    lost: list[int] = []
    while len(world.answers) < 3 and world.num_steps < 3000:
        before = [seq.num_preempted for seq in seqs]
        world.step()
        lost += [index for index, seq in enumerate(seqs) if seq.num_preempted > before[index]]
    assert 0 not in lost
    assert len(world.answers) == 3


@pytest.mark.parametrize(("max_sequences", "num_blocks"), [(1, 20), (3, 6), (6, 20)])
def test_a_low_priority_ends_amid_endless_higher_ones(max_sequences: int, num_blocks: int) -> None:
    world = World(Random(2), num_blocks, max_sequences, chunk_len=64, patience=20, stops=False)
    low = [world.add(prompt(index, 200, 30, index), 20, priority=-5) for index in range(2)]
    while any(seq.state is not State.ENDED for seq in low):
        assert world.num_steps < 600, [seq.state for seq in low]
        while len(world.live) < max_sequences + 4:
            world.add(prompt(2, 0, 150, len(world.born)), 30, priority=5)
        world.step()
    assert all(seq.seq_id in world.answers for seq in low)


def test_higher_priorities_are_served_first_but_for_one_elder() -> None:
    world = World(Random(3), num_blocks=40, max_sequences=2, chunk_len=256, patience=50, stops=False)
    slow = [world.add(prompt(0, 0, 100, index), 40, priority=-1) for index in range(40)]
    world.step()
    quick = world.add(prompt(1, 0, 100, 99), 10, priority=0)
    world.step()
    assert quick.state is State.RUNNING
    assert sum(seq.num_preempted for seq in slow) == 1
    while quick.state is not State.ENDED:
        world.step()
    assert world.num_steps < 20
    world.drain(4000)


def test_the_elders_prompt_gets_a_unit_every_few_steps_beside_higher_ones() -> None:
    world = World(Random(2), num_blocks=60, max_sequences=3, chunk_len=64, patience=10)
    low = world.add(prompt(0, 0, 640, 0), 1, priority=-1)
    turns = []
    while low.state is not State.ENDED:
        assert world.num_steps < 100
        while len(world.live) < 5:
            world.add(prompt(1, 0, 640, len(world.born)), 1)
        plan = world.step()
        turns += [(world.num_steps, chunk.length) for chunk in plan.chunks if chunk.seq is low]
    assert [length for _, length in turns] == [BLOCK_LEN] * 10
    assert {later[0] - earlier[0] for earlier, later in zip(turns, turns[1:], strict=False)} == {ELDER_EVERY}


def test_nobody_overtakes_a_large_one_of_the_same_priority() -> None:
    world = World(Random(2), num_blocks=8, max_sequences=3, stops=False)
    world.add(prompt(0, 0, 60, 0), 30)
    large, small = world.add(prompt(1, 0, 440, 1), 5), world.add(prompt(1, 0, 20, 2), 5)
    while large.state is State.WAITING:
        world.step()
        assert small.state is State.WAITING or large.state is State.RUNNING
    world.drain(50)


def test_a_long_queue_that_grew_old_does_not_take_over() -> None:
    world = World(Random(2), num_blocks=20, max_sequences=1, patience=40, stops=False)
    old = [world.add(prompt(0, 0, 100, index), 9, priority=-1) for index in range(6)]
    while any(seq.state is not State.ENDED for seq in old):
        assert world.num_steps < 500
        while len(world.live) < 10:
            world.add(prompt(1, 0, 100, len(world.born)), 9)
        world.step()
    assert len(world.answers) - len(old) >= 6 * 3  # of nine steps each, in pauses of forty


def test_equal_priorities_are_never_preempted_for_a_newcomer() -> None:
    world = World(Random(3), num_blocks=30, max_sequences=2, patience=1, stops=False)
    seqs = [world.add(prompt(0, 0, 100, index), 40) for index in range(30)]
    world.drain(4000)
    assert [seq.num_preempted for seq in seqs] == [0] * 30


def decode_and_prefill(costs: tuple[float, float, float, float], steps: int) -> list[tuple[Plan, float]]:
    """Run some decoding sequences beside a long prompt; return the steps from the first decoded token on, with true seconds."""
    world = World(Random(4), num_blocks=400, max_sequences=8, chunk_len=1024, costs=costs, stops=False)
    for index in range(4):
        world.add(prompt(0, 0, 64, index), 2000)
    base, row, token, pair = costs
    seen = []
    for number in range(steps):
        if number % 60 == 10:
            world.add(prompt(1, 0, 2000, number), 1)
        plan = world.step()
        seen.append((plan, base + row * plan.num_rows + token * plan.num_prefill + pair * plan.num_pairs))
    return seen


@pytest.mark.parametrize("costs", [(0.002, 0.0005, 0.0002, 1e-8), (0.02, 0.004, 0.0003, 1e-7), (0.03, 0.002, 0.0002, 2e-7)])
def test_steps_stay_within_their_time_once_costs_are_learned(costs: tuple[float, float, float, float]) -> None:
    steps = decode_and_prefill(costs, 400)[40:]
    mixed = [(plan, seconds) for plan, seconds in steps if plan.num_rows and plan.num_prefill > BLOCK_LEN]
    assert len(mixed) > 10
    assert max(seconds for _, seconds in mixed) < 0.1 * 1.4  # the world's noise is 25 %
    filled = sorted(seconds for plan, seconds in mixed)
    assert filled[len(filled) // 2] > 0.1 * 0.5  # and the time is used


def test_a_prompt_advances_a_unit_every_few_steps_however_slow_steps_are() -> None:
    steps = decode_and_prefill((0.5, 0.01, 0.01, 1e-6), 300)[40:]
    assert {plan.num_rows for plan, _ in steps} == {4}
    assert {plan.num_prefill for plan, _ in steps} == {0, 2000 % BLOCK_LEN, BLOCK_LEN}
    turns = [number for number, (plan, _) in enumerate(steps) if plan.num_prefill]
    assert {later - earlier for earlier, later in zip(turns, turns[1:], strict=False)} == {PREFILL_EVERY}


@pytest.mark.parametrize("truth", [(1e-3, 1e-4, 1e-5, 0.0), (0.03, 0.006, 0.012, 1e-6), (2.0, 0.1, 0.1, 1e-5)])
def test_costs_are_learned_from_mixed_steps(truth: tuple[float, float, float, float]) -> None:
    rng, costs = Random(5), StepCosts()

    def mixture() -> tuple[int, int, int]:
        rows, tokens = rng.randrange(0, 9), rng.choice([0, 0, 64, 128, 512])
        return rows, tokens, rows * rng.randrange(1, 2000) + tokens * rng.randrange(1, 2000)

    def seconds(features: Iterable[int]) -> float:
        return sum(cost * feature for cost, feature in zip(truth, [1, *features], strict=True))

    for _ in range(600):
        features = mixture()
        costs.observe(*features, seconds(features) * rng.uniform(0.9, 1.1))
    costs.observe(1, 0, 10, 0.0)  # a clock that stood still
    errors = sorted(abs(costs.predict(*features) / seconds(features) - 1) for features in (mixture() for _ in range(200)))
    assert errors[150] < 0.3
    assert min(costs.base, costs.row, costs.token, costs.pair) > 0
    before = costs.predict(4, 64, 1000)
    costs.observe(4, 64, 1000, 1e6)  # the machine slept
    assert costs.predict(4, 64, 1000) < 2 * before


def scheduler(num_blocks: int = 4, **options: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks), max_sequences=2, **options)


@pytest.mark.parametrize(
    ("seq", "says"),
    [
        (Sequence(1, [1] * 10, 257), "257 tokens; the whole cache holds 256"),
        (Sequence(1, [], 5), "0 tokens"),
        (Sequence(1, [1] * 6, 5), "6 tokens with at most 5"),
        (Sequence(1, [1], 5, priority=101), "priority 101; allowed are -100 to 100"),
    ],
)
def test_what_could_never_end_is_refused(seq: Sequence, says: str) -> None:
    engine = scheduler()
    with pytest.raises(RequestError, match=says) as caught:
        engine.add(seq)
    assert caught.value.hint
    assert not engine.has_work
    engine.check()


def test_an_id_or_a_sequence_is_added_once() -> None:
    engine = scheduler()
    seq = Sequence(1, [1], 5)
    engine.add(seq)
    for other in (seq, Sequence(1, [2], 5)):
        with pytest.raises(ValueError, match="added before"):
            engine.add(other)
    assert engine.num_waiting == 1


def test_new_tokens_that_do_not_fit_the_chunk_are_refused() -> None:
    engine = scheduler(chunk_len=64)
    seq = Sequence(1, [1] * 70, 74)
    engine.add(seq)
    assert not engine.advance(seq, [1])  # nothing is in flight
    engine.schedule(0.0)
    with pytest.raises(RuntimeError, match="behind a chunk"):
        engine.advance(seq, [5])
    assert engine.advance(seq)
    engine.schedule(0.0)
    assert engine.advance(seq, [5])
    seq.draft = (6, 7, 8, 9)
    (chunk,) = engine.schedule(0.0).chunks
    assert (chunk.start, chunk.length, seq.draft) == (70, 3, (6, 7))  # no more than max_len allows
    for wrong in ([7, 1], [6, 7, 1, 1]):
        with pytest.raises(RuntimeError, match="do not begin with drafts"):
            engine.advance(seq, wrong)
    assert engine.advance(seq, [6, 1])
    assert (seq.num_computed, seq.tokens[70:]) == (72, [5, 6, 1])


def test_drafts_preempt_nobody() -> None:
    world = World(Random(6), num_blocks=4, max_sequences=2, stops=False)
    first, second = world.add(prompt(0, 61, 0, 0), 60), world.add(prompt(1, 127, 0, 0), 20)
    world.scheduler.costs.token = 1e-3  # both prompts fit into the first step
    for _ in range(3):
        world.step()
    assert world.pool.num_free == 0
    first.draft = (1, 2, 3)  # would need a second block
    plan = world.step()
    assert [(chunk.seq, chunk.length) for chunk in plan.chunks] == [(first, 1), (second, 1)]
    world.step()
    assert second.num_preempted == 1  # for a token that is known


def test_a_newcomer_leaves_room_for_those_that_run_to_grow() -> None:
    world = World(Random(6), num_blocks=4, max_sequences=2, stops=False)
    first, second = world.add(prompt(0, 60, 0, 0), 20), world.add(prompt(1, 150, 0, 0), 5)
    world.step()
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    world.drain(50)
    assert second.num_preempted == 0


def test_to_end_what_ended_changes_nothing() -> None:
    engine = scheduler()
    first, second = Sequence(1, [1], 5), Sequence(1, [2], 5)
    engine.add(first)
    engine.finish(first)
    engine.finish(first)
    assert not engine.cancel(1)
    engine.add(second)
    engine.finish(first)
    assert engine.has_work
    assert engine.cancel(1)
    assert not engine.has_work


def test_memory_of_the_queues_follows_the_live_sequences() -> None:
    engine = Scheduler(BlockPool(8), max_sequences=1)
    engine.add(Sequence(0, [1] * 100, 200))
    engine.schedule(0.0)
    for number in range(1, 3000):
        engine.add(Sequence(number, [1], 5, deadline=1e9))
        engine.cancel(number)
    assert len(engine._waiting._entries) < 200
    assert len(engine._deadlines._entries) < 200
    engine.check()


def test_a_prompt_alone_is_read_a_second_at_a_time() -> None:
    engine = Scheduler(BlockPool(32), max_sequences=1)
    engine.costs.base, engine.costs.row, engine.costs.token, engine.costs.pair = 0.1, 0.1, 0.005, 0.0
    engine.add(Sequence(1, [1] * 1000, 1001))
    assert [chunk.length for chunk in engine.schedule(0.0).chunks] == [192]
    engine.costs.token = 1.0
    engine.cancel(1)
    engine.add(Sequence(2, [1] * 1000, 1001))
    assert [chunk.length for chunk in engine.schedule(0.0).chunks] == [64]  # a unit at least, whatever it costs


def test_blocks_held_by_a_stranger_are_an_error_not_a_standstill() -> None:
    engine = scheduler()
    engine.pool.allocate(3)
    engine.add(Sequence(1, [1] * 100, 120))
    with pytest.raises(RuntimeError, match="3 of 4 blocks are held"):
        engine.schedule(0.0)


@pytest.mark.parametrize("options", [{"chunk_len": 100}, {"chunk_len": 0}, {"patience": 0}, {"max_step_s": 0}])
def test_settings_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        scheduler(**options)
