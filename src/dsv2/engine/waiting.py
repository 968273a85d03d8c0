"""Who waits, and for what: a heap of sequences, and siblings that wait for blocks that another one is computing."""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from heapq import heapify, heappop, heappush

from dsv2.engine.blocks import BlockPool
from dsv2.engine.sequence import Sequence

STALE_ENTRIES = 64  # of a heap that are tolerated before it is built anew


class SequenceHeap:
    """Sequences by a key, lowest first. Leaving costs nothing: an entry whose sequence is no longer ``wanted`` is passed over.

    Args:
        wanted: whether an entry of this sequence still counts.
    """

    def __init__(self, wanted: Callable[[Sequence], bool]) -> None:
        self._wanted = wanted
        self._entries: list[tuple[tuple[float, int], Sequence]] = []  # keys hold the number of arrival, so sequences are never compared

    def __bool__(self) -> bool:
        return bool(self._entries)

    def push(self, key: tuple[float, int], seq: Sequence) -> None:
        """Add a sequence."""
        heappush(self._entries, (key, seq))

    def first(self, limit: float | None = None) -> Sequence | None:
        """Return the wanted sequence with the lowest key, None if there is none or its key begins above ``limit``."""
        while self._entries:
            key, seq = self._entries[0]
            if limit is not None and key[0] > limit:
                return None
            if self._wanted(seq):
                return seq
            heappop(self._entries)
        return None

    def pop(self) -> None:
        """Remove what ``first`` returned."""
        heappop(self._entries)

    def sequences(self) -> list[Sequence]:
        """Return all that are wanted, in no order."""
        return [seq for _, seq in self._entries if self._wanted(seq)]

    def shrink(self, num_live: int) -> None:
        """Drop unwanted entries if they outnumber the live sequences; the cost is a constant per entry ever pushed."""
        if len(self._entries) > 2 * num_live + STALE_ENTRIES:
            self._entries = [entry for entry in self._entries if self._wanted(entry[1])]
            heapify(self._entries)


class Siblings:
    """Which running sequence is going to compute which block of a prompt, and who would rather wait for it than compute it too.

    Whoever waits here waits for a running sequence and is released when that one has published the block or stops, for whatever reason:
    nobody waits for one that waits.

    Args:
        pool: whose keys name the blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._leaders: dict[bytes, Sequence] = {}
        self._followers: dict[bytes, list[Sequence]] = {}

    def announce(self, seq: Sequence, keys: Ordered[bytes]) -> None:
        """Note that ``seq`` runs and will compute these blocks; where two do, the first counts."""
        for key in keys:
            self._leaders.setdefault(key, seq)

    def park(self, seq: Sequence, count: int, elder: Sequence | None) -> bool:
        """Let a sequence wait for the last block that one running sequence computes for it too, beginning with the next that it needs.

        Args:
            seq: waits for its start.
            count: leading blocks that it may take from others.
            elder: waits for nobody, and is waited for whatever its priority.

        Returns:
            False where there is no such block, or the other one has a lower priority and might take long.
        """
        if not self._leaders or seq is elder:
            return False
        keys = self._pool.chain(seq.tokens, seq.salt, count, seq.keys, seq.expanded)
        position, _ = self._pool.peek(keys, count)
        leader = self._leaders.get(keys[position]) if position < count else None
        if leader is None or (leader.priority < seq.priority and leader is not elder):
            return False
        while position + 1 < count and self._leaders.get(keys[position + 1]) is leader:
            position += 1
        self._followers.setdefault(keys[position], []).append(seq)
        return True

    def published(self, keys: Ordered[bytes]) -> Ordered[Sequence]:
        """Note that these blocks can be found now; return who waited for one of them."""
        if not self._leaders:
            return ()
        return [seq for key in keys if self._leaders.pop(key, None) is not None for seq in self._followers.pop(key, ())]

    def stopped(self, leader: Sequence, keys: Ordered[bytes]) -> Ordered[Sequence]:
        """Note that ``leader`` will not compute these blocks; return who waited for one of them."""
        if not self._leaders:
            return ()
        mine = [key for key in keys if self._leaders.get(key) is leader]
        for key in mine:
            del self._leaders[key]
        return [seq for key in mine for seq in self._followers.pop(key, ())]

    def leaders(self) -> list[Sequence]:
        """Return all sequences that somebody could wait for."""
        return list(self._leaders.values())

    def parked(self) -> list[Sequence]:
        """Return all that were parked and not released; some may have left meanwhile.

        Raises:
            RuntimeError: one waits for a block that nobody computes.
        """
        if not self._followers.keys() <= self._leaders.keys():
            raise RuntimeError("scheduler: a sequence waits for a block that nobody computes")
        return [seq for group in self._followers.values() for seq in group]
