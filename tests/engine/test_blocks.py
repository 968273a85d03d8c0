"""The block pool against a shadow that remembers what each block was written with."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsv2.engine.blocks import _PACK, BLOCK_LEN, BlockPool, OutOfBlocks, _root, blocks_for


def ids(*units: int) -> list[int]:
    """Return one block of tokens per unit."""
    return [unit * 1000 + place for unit in units for place in range(BLOCK_LEN)]


def hold(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Match, allocate, compute and publish what a sequence of these tokens needs; return its table."""
    full = len(tokens) // BLOCK_LEN
    table = pool.match(tokens, salt, len(tokens))
    matched = len(table)
    table += pool.allocate(blocks_for(len(tokens)) - matched)
    pool.publish(table, tokens, salt, matched, full, [])
    return table


class FakeTier:
    """Remembers keys, and what the block held when it left; loses what ``lost`` says."""

    def __init__(self, content: dict[int, object], lost: Callable[[], bool] = lambda: False) -> None:
        self.content, self.lost = content, lost
        self.kept: dict[bytes, object] = {}

    def has(self, key: bytes) -> bool:
        return key in self.kept

    def store(self, key: bytes, block: int) -> None:
        self.kept[key] = self.content.get(block)

    def load(self, key: bytes, block: int) -> bool:
        if self.lost():
            del self.kept[key]
            self.content[block] = "damaged"
            return False
        self.content[block] = self.kept[key]
        return True

    def clear(self) -> None:
        self.kept.clear()


def test_a_beginning_is_shared_only_behind_the_same_beginning_and_salt() -> None:
    pool = BlockPool(20)
    first = hold(pool, ids(1, 2, 3))
    assert pool.match(ids(1, 2, 4), "", 192) == first[:2]
    assert pool.match(ids(1, 2, 3), "", 191) == first[:2]  # the limit is in tokens
    assert pool.match(ids(2, 3), "", 128) == []  # known tokens behind another beginning
    assert pool.match(ids(1, 2, 3), "key of someone else", 192) == []
    assert pool.match(ids(1, 2, 3), b"", 192) == first
    pool.check([first, first[:2], first[:2], first])
    assert (pool.num_used, pool.num_cached, pool.num_free) == (3, 3, 17)


def test_tokens_decide_where_two_prefixes_have_one_key() -> None:
    pool, forged = BlockPool(8), [b"k" * 32]
    table = pool.allocate(1)
    pool.publish(table, ids(1), "", 0, 1, list(forged))
    assert pool.match(ids(2), "", 64, list(forged)) == []
    other = pool.allocate(1)
    assert not pool.publish(other, ids(2), "", 0, 1, list(forged))
    assert pool.match(ids(1), "", 64, list(forged)) == table
    pool.check([table, table, other])


def test_a_salt_cannot_pose_as_the_key_of_a_block() -> None:
    pool = BlockPool(8)
    hold(pool, ids(1, 2))
    assert pool.match(ids(2), _root("") + _PACK(*ids(1)), 64) == []  # what the key of the first block is the hash of


def test_allocate_takes_all_or_nothing_and_evicts_the_longest_unused_from_its_end() -> None:
    pool = BlockPool(4)
    old, young = hold(pool, ids(1, 2)), hold(pool, ids(3, 4))
    pool.release(old)
    with pytest.raises(OutOfBlocks):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check([young])
    assert pool.allocate(1) == [old[1]]
    assert pool.match(ids(1, 2), "", 128) == [old[0]]  # its beginning is still there
    pool.release(young)
    pool.release([old[0]])
    pool.allocate(2)
    assert pool.match(ids(1), "", 64) == [old[0]]  # used later than the other


def test_the_second_writer_of_the_same_content_takes_over_the_first_ones_block() -> None:
    pool = BlockPool(8)
    one, two = pool.allocate(2), pool.allocate(2)
    tokens = ids(1, 2)
    assert not pool.publish(one, tokens, "", 0, 2, [])
    assert pool.publish(two, tokens, "", 0, 2, [])
    assert two == one
    pool.check([one, two])
    assert pool.num_used == 2


def test_what_was_handed_out_before_a_reset_is_never_found() -> None:
    pool = BlockPool(8)
    table, idle = pool.allocate(2), hold(pool, ids(7, 8))
    pool.release(idle)
    pool.publish(table, ids(1, 2), "", 0, 1, [])
    pool.reset()
    table += pool.allocate(1)
    pool.publish(table, ids(1, 2, 3), "", 0, 2, [])
    pool.publish(table, ids(1, 2, 3), "", 2, 3, [])  # a new block, behind old ones
    assert pool.num_cached == 0
    assert pool.match(ids(1, 2), "", 128) == pool.match(ids(7, 8), "", 128) == []
    pool.check([table])
    fresh = hold(pool, ids(1, 2))
    assert pool.match(ids(1, 2), "", 128) == fresh
    assert not set(fresh) & set(table)


def test_a_tier_gives_back_what_was_evicted_unless_it_lost_it() -> None:
    content: dict[int, object] = {}
    lost = False
    tier = FakeTier(content, lambda: lost)
    pool = BlockPool(3, tier=tier)
    table = hold(pool, ids(1, 2))
    content.update({table[0]: "one", table[1]: "two"})
    pool.release(table)
    pool.release(pool.allocate(3))
    assert len(tier.kept) == 2
    again = pool.match(ids(1, 2), "", 128)
    assert [content[block] for block in again] == ["one", "two"]
    pool.release(again)
    pool.release(pool.allocate(3))
    lost = True
    assert pool.match(ids(1, 2), "", 128) == []
    assert (pool.num_used, pool.num_free) == (0, 3)
    lost = False
    kept = hold(pool, ids(3))
    pool.release(kept)
    others = pool.allocate(3)
    assert pool.match(ids(3), "", 64) == []  # nowhere to load it to
    pool.check([others])
    pool.reset()
    assert tier.kept == {}


def test_a_tier_that_raises_leaks_nothing() -> None:
    class Broken(FakeTier):
        def load(self, key: bytes, block: int) -> bool:
            raise OSError("disk")

    pool = BlockPool(4, tier=Broken({}))
    pool.release(hold(pool, ids(1, 2, 3)))
    pool.release(pool.allocate(2))  # one of the three leaves for the tier
    with pytest.raises(OSError, match="disk"):
        pool.match(ids(1, 2, 3), "", 192)
    pool.check([])


def test_without_reuse_nothing_is_found() -> None:
    pool = BlockPool(4, reuse=False)
    hold(pool, ids(1))
    assert pool.match(ids(1), "", 64) == []
    assert pool.num_cached == 0


def test_a_block_given_back_twice_is_an_error() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(RuntimeError, match="held by nobody"):
        pool.release(table)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, table: pool._free.append(table[0]),
        lambda pool, table: pool._free.pop(),
        lambda pool, table: pool._refs.__setitem__(table[0], 2),
        lambda pool, table: pool._refs.__setitem__(pool._free[0], -1),
        lambda pool, table: pool._index.popitem(),
        lambda pool, table: pool._idle.__setitem__(pool._free.pop(), None),
        lambda pool, table: pool.release(table[:1]),  # a beginning before its end
        lambda pool, table: (pool.release(table), pool._idle.move_to_end(table[1])),
    ],
)
def test_the_audit_notices_damage(damage: Callable[[BlockPool, list[int]], object]) -> None:
    pool = BlockPool(6)
    table = hold(pool, ids(1, 2))
    pool.check([table])
    damage(pool, table)
    with pytest.raises(RuntimeError):
        pool.check([table])


class PoolMachine(RuleBasedStateMachine):
    """Holders come with tokens of few different units, so that they share beginnings; the shadow knows what was written where."""

    @initialize(num_blocks=st.integers(1, 12), tiered=st.booleans(), rng=st.randoms(use_true_random=False))
    def build(self, num_blocks: int, tiered: bool, rng) -> None:
        self.written: dict[int, object] = {}
        self.tier = FakeTier(self.written, lambda: rng.random() < 0.3)
        self.pool = BlockPool(num_blocks, tier=self.tier if tiered else None)
        self.tiered = tiered
        self.holders: list[tuple[list[int], str, list[int], int, list[bytes], int]] = []
        self.era = 0

    def truth(self, units: list[int], salt: str, place: int) -> tuple[object, ...]:
        return (self.era, salt, tuple(units[: place + 1]))

    @rule(
        units=st.lists(st.integers(0, 1), max_size=5), salt=st.sampled_from(["", "s"]), extra=st.integers(0, 2), limit=st.integers(0, 400)
    )
    def come(self, units: list[int], salt: str, extra: int, limit: int) -> None:
        keys: list[bytes] = []
        tokens = ids(*units)
        free, cached = self.pool.num_free, self.pool.num_cached
        peeked = self.pool.peek(self.pool.chain(tokens, salt, len(units), keys), min(limit // BLOCK_LEN, len(units)))
        table = self.pool.match(tokens, salt, limit, keys)
        assert len(table) <= min(limit // BLOCK_LEN, len(units))
        if not self.tiered:
            assert (len(table), free - self.pool.num_free) == peeked
            assert self.pool.num_cached == cached
        for place, block in enumerate(table):
            assert self.written[block] == self.truth(units, salt, place)
        matched, need = len(table), len(units) - len(table) + extra
        free = self.pool.num_free
        try:
            fresh = self.pool.allocate(need)
        except OutOfBlocks:
            assert need > free == self.pool.num_free
            self.pool.release(table)
            return
        assert need <= free
        held = {block for holder in self.holders for block in holder[2]} | set(table)
        assert len(set(fresh)) == need
        assert not held & set(fresh)
        self.holders.append((units, salt, table + fresh, matched, keys, self.era))

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99), count=st.integers(1, 3))
    def compute(self, which: int, count: int) -> None:
        units, salt, table, done, keys, era = self.holders[(at := which % len(self.holders))]
        stop = min(len(units), done + count)
        others = {block for index, holder in enumerate(self.holders) if index != at for block in holder[2]}
        for place in range(done, stop):
            assert table[place] not in others, "two writers"
            self.written[table[place]] = (era, salt, tuple(units[: place + 1]))
        before = list(table)
        replaced = self.pool.publish(table, ids(*units), salt, done, stop, keys)
        assert replaced == (before != table)
        for place in range(stop):
            assert self.written[table[place]] == (era, salt, tuple(units[: place + 1]))
        self.holders[at] = (units, salt, table, stop, keys, era)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        self.pool.release(self.holders.pop(which % len(self.holders))[2])

    @rule()
    def new_weights(self) -> None:
        self.pool.reset()
        self.era += 1
        assert self.pool.num_cached == 0

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([holder[2] for holder in self.holders])
            assert self.pool.num_used == len({block for holder in self.holders for block in holder[2]})

    def teardown(self) -> None:
        for holder in getattr(self, "holders", []):
            self.pool.release(holder[2])
        if hasattr(self, "pool"):
            assert self.pool.num_used == 0
            assert self.pool.num_free == self.pool.num_blocks


TestPool = PoolMachine.TestCase
TestPool.settings = settings(deadline=None, max_examples=200, stateful_step_count=40, derandomize=True)
