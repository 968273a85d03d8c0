"""Book-keeping of the paged latent cache: who holds which block, and which tokens a block's latents stand for. No tensors here.

The picture: the cache is ``num_blocks`` blocks of 64 tokens. A sequence holds a table of them, in order. Once all 64 latents of a block
are there, the block is published under a key that names its tokens and everything before them:

    root = hash(salt)    key 0 = hash(root, tokens 0..63)    key 1 = hash(key 0, tokens 64..127)    ...

Latents depend on nothing else, so whoever brings the same salt and the same beginning shares the block instead of computing it. A
published block is never written again. When its last holder leaves, it stays until its place is needed; the one unused for longest goes
first, and the end of a prefix before its beginning, since without the beginning nobody can reach the end.

    free  <- allocate / release ->  held  <- match / release ->  idle (published, held by nobody)  -> evicted, to the tier if there is one
"""

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, MutableSequence
from collections.abc import Sequence as Ordered
from hashlib import blake2b
from typing import Protocol

BLOCK_LEN = 64  # tokens of a block; prefixes are shared in units of it and chunks end at multiples of it

KEY_BYTES = 32  # a tier compares keys only, so they must not collide even when somebody tries
_PACK = struct.Struct(f"<{BLOCK_LEN}I").pack
_UNHELD, _UNPUBLISHED = -1, b""
_ABSORBED, _EXPANDED = b"a", b"e"  # readings of a block


class OutOfBlocks(Exception):
    """Fewer blocks are free or evictable than were asked for; nothing was taken."""


class Tier(Protocol):
    """A slower place for blocks that had to leave the cache. It sees keys and block ids and moves the latents itself."""

    def has(self, key: bytes) -> bool:
        """Return whether ``load`` of this key is worth trying."""

    def store(self, key: bytes, block: int) -> None:
        """Keep a copy of a block that is about to be given away. It may also decide not to."""

    def load(self, key: bytes, block: int) -> bool:
        """Write the latents of ``key`` into ``block``; False when they are lost or damaged, and the block's content does not matter."""

    def clear(self) -> None:
        """Forget everything: the weights changed."""


def blocks_for(num_tokens: int) -> int:
    """Return how many blocks hold the latents of so many tokens."""
    return -(-num_tokens // BLOCK_LEN)


class BlockPool:
    """Blocks 0..num_blocks-1 with reference counts and an index by content.

    Who holds a block of a prefix holds all blocks before it (``match`` gives them so, ``release`` goes from the end), which keeps
    beginnings at least as long as ends. Not for several threads.

    Args:
        num_blocks: blocks of the cache, at least 1.
        reuse: whether blocks are published at all.
        tier: where evicted blocks go and come back from.

    Raises:
        ValueError: ``num_blocks`` is below 1.
    """

    def __init__(self, num_blocks: int, *, reuse: bool = True, tier: Tier | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks; at least 1")
        self.num_blocks = num_blocks
        self.reuse = reuse
        self._tier = tier
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was used last is still in the CPU's caches
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, the one to go first in front
        self._index: dict[bytes, int] = {}
        self._keys = [_UNPUBLISHED] * num_blocks
        self._tokens = [b""] * num_blocks  # of published blocks, packed
        self._parents = [_UNHELD] * num_blocks  # of published blocks: the block before, or none
        self._era = 0  # counts resets
        self._eras = [_UNHELD] * num_blocks  # in which the block was handed out

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can give: never used, given back, or idle."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free) - len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by content, held or idle."""
        return len(self._index)

    def chain(self, tokens: Ordered[int], salt: bytes | str, count: int, keys: list[bytes], expanded: int = 0) -> list[bytes]:
        """Extend ``keys`` to the keys of at least the first ``count`` blocks of ``tokens`` and return it.

        A sequence keeps this list, so that every block is hashed once in its life.

        Args:
            tokens: ids, at least ``count`` blocks of them.
            salt: what must be equal too; str counts as its UTF-8 bytes.
            count: blocks.
            keys: of the first blocks, from an earlier call with the same beginning, salt and readings; changed in place.
            expanded: tokens from the first on, whole blocks, that are read in the expanded way, the others in the absorbed one: latents of
                the two differ in their last bits, so each has keys of its own.
        """
        if len(keys) < count:
            parent = keys[-1] if keys else _root(salt)
            for start in range(len(keys) * BLOCK_LEN, count * BLOCK_LEN, BLOCK_LEN):
                reading = _EXPANDED if start < expanded else _ABSORBED
                parent = blake2b(parent + _PACK(*tokens[start : start + BLOCK_LEN]) + reading, digest_size=KEY_BYTES).digest()
                keys.append(parent)
        return keys

    def peek(self, keys: Ordered[bytes], count: int) -> tuple[int, int]:
        """Return how many of the first ``count`` keys are in the cache without a gap, and how many of those blocks are idle."""
        index, refs, idle = self._index, self._refs, 0
        for position in range(count):
            block = index.get(keys[position])
            if block is None:
                return position, idle
            idle += not refs[block]
        return count, idle

    def match(self, tokens: Ordered[int], salt: bytes | str, limit: int, keys: list[bytes] | None = None, expanded: int = 0) -> list[int]:
        """Take the cached blocks of the longest known beginning of ``tokens``, from the tier too.

        Args:
            tokens: ids.
            salt: as in ``chain``.
            limit: most tokens to take, rounded down to whole blocks.
            keys: as in ``chain``.
            expanded: as in ``chain``.

        Returns:
            Block ids, each with a reference for the caller.
        """
        taken: list[int] = []
        if not self.reuse:
            return taken
        count = min(limit, len(tokens)) // BLOCK_LEN
        keys = self.chain(tokens, salt, count, [] if keys is None else keys, expanded)
        for position in range(count):
            block = self._index.get(keys[position])
            ids = _PACK(*tokens[position * BLOCK_LEN : (position + 1) * BLOCK_LEN])
            if block is None:
                block = self._fetch(keys[position], ids, taken)
            elif self._tokens[block] == ids:
                self._hold(block)
            else:
                block = None  # two prefixes with one key
            if block is None:
                break
            taken.append(block)
        return taken

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks of undefined content, evicting idle ones where none is free.

        Raises:
            OutOfBlocks: there are not so many; nothing was taken.
        """
        if count > len(self._free) + len(self._idle):
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} free")
        while len(self._free) < count:
            self._evict()
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._refs[block] = 1
            self._eras[block] = self._era
        return taken

    def publish(
        self,
        blocks: MutableSequence[int],
        tokens: Ordered[int],
        salt: bytes | str,
        start: int,
        stop: int,
        keys: list[bytes],
        expanded: int = 0,
    ) -> bool:
        """Let others find the full blocks ``start..stop-1`` of a sequence's table.

        Where somebody else has published the same content meanwhile, the table takes over that block and gives its own back. A block
        whose beginning is not published, or that was handed out before a ``reset``, stays private.

        Args:
            blocks: the sequence's table; entries may be replaced in place.
            tokens: its ids; the latents of the first ``stop`` blocks are computed.
            salt: as in ``chain``.
            start: first block to publish; those before it went through here or came from ``match``.
            stop: one past the last.
            keys: as in ``chain``.
            expanded: as in ``chain``.

        Returns:
            Whether an entry of ``blocks`` was replaced.
        """
        if not self.reuse:
            return False
        self.chain(tokens, salt, stop, keys, expanded)
        replaced = False
        for position in range(start, stop):
            parent, block = blocks[position - 1] if position else _UNHELD, blocks[position]
            if self._eras[block] != self._era or (position and self._keys[parent] != keys[position - 1]):
                break
            ids = _PACK(*tokens[position * BLOCK_LEN : (position + 1) * BLOCK_LEN])
            known = self._index.get(keys[position])
            if known is None:
                self._enter(block, keys[position], ids, parent)
            elif self._tokens[known] != ids:
                break  # two prefixes with one key: the first one keeps it
            elif known != block:
                self._hold(known)
                blocks[position] = known
                self.release([block])
                replaced = True
        return replaced

    def release(self, blocks: Ordered[int]) -> None:
        """Give back one reference of each block of a table, or of the end of one, from its end.

        Raises:
            RuntimeError: a block is held by nobody.
        """
        refs = self._refs
        for block in reversed(blocks):
            if refs[block] <= 0:
                raise RuntimeError(f"block {block} is released but held by nobody")
            refs[block] -= 1
            if not refs[block]:
                if self._keys[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def reset(self) -> None:
        """Forget all published content, since the weights that made it changed. What is held stays held and is never published again."""
        for block in self._index.values():
            self._keys[block], self._tokens[block], self._parents[block] = _UNPUBLISHED, b"", _UNHELD
        self._index.clear()
        self._free.extend(reversed(self._idle))
        self._idle.clear()
        self._era += 1
        if self._tier is not None:
            self._tier.clear()

    def save(self) -> None:
        """Give the tier a copy of all published content, since the cache is about to go. What is used most goes last."""
        if self._tier is None:
            return
        held = [block for block in reversed(self._index.values()) if self._refs[block]]  # ends before beginnings, as in ``_idle``
        for block in (*self._idle, *held):
            self._tier.store(self._keys[block], block)

    def check(self, tables: Iterable[Ordered[int]] | None = None) -> None:
        """Audit everything.

        Args:
            tables: of all holders; their blocks must be exactly the references there are.

        Raises:
            RuntimeError: names the first thing that is wrong.
        """
        free, held = set(self._free), {block for block, refs in enumerate(self._refs) if refs}
        _demand(len(free) == len(self._free), "a block is free twice")
        _demand(min(self._refs) >= 0, "a reference count is negative")
        _demand(not free & held and not free & set(self._idle) and not held & set(self._idle), "a block is in two states")
        _demand(len(free) + len(held) + len(self._idle) == self.num_blocks, "a block is lost")
        published = {block for block, key in enumerate(self._keys) if key}
        _demand(
            {block: self._keys[block] for block in published} == {block: key for key, block in self._index.items()}, "the index is wrong"
        )
        _demand(set(self._idle) <= published and not free & published, "a block without content is idle, or one with content is free")
        order = {block: place for place, block in enumerate(self._idle)}
        below: Counter[int] = Counter()
        for block in published:
            parent = self._parents[block]
            if parent == _UNHELD:
                continue
            _demand(parent in published, f"block {block} outlived the block before it")
            _demand(parent not in order or order.get(block, -1) < order[parent], f"block {parent} would leave before its end {block}")
            _demand(parent not in order or block in order, f"block {block} is held without the block before it")
            below[parent] += self._refs[block]
        _demand(all(self._refs[block] >= count for block, count in below.items()), "an end has more holders than its beginning")
        if tables is not None:
            owners = Counter(block for table in tables for block in table)
            wrong = [block for block, refs in enumerate(self._refs) if refs != owners[block]]
            _demand(not wrong, f"references differ from holders in blocks {wrong[:8]}")

    def _hold(self, block: int) -> None:
        """Add a reference to a published block."""
        if not self._refs[block]:
            del self._idle[block]
        self._refs[block] += 1

    def _enter(self, block: int, key: bytes, ids: bytes, parent: int) -> None:
        """Put a held block into the index."""
        if self._keys[block]:
            raise RuntimeError(f"block {block} is published a second time, with other tokens")
        self._index[key] = block
        self._keys[block], self._tokens[block], self._parents[block] = key, ids, parent

    def _evict(self) -> None:
        """Move the idle block that was unused for longest to the free ones, through the tier."""
        block = next(iter(self._idle))
        key = self._keys[block]
        if self._tier is not None:
            self._tier.store(key, block)
        del self._idle[block], self._index[key]
        self._keys[block], self._tokens[block], self._parents[block] = _UNPUBLISHED, b"", _UNHELD
        self._free.append(block)

    def _fetch(self, key: bytes, ids: bytes, before: list[int]) -> int | None:
        """Bring a block back from the tier behind the blocks ``before``; None when that is not possible."""
        if self._tier is None:
            return None
        fresh: list[int] = []
        loaded = False
        try:
            if self._tier.has(key):
                fresh = self.allocate(1)
                loaded = self._tier.load(key, fresh[0])
        except OutOfBlocks:
            return None
        except BaseException:
            self.release([*before, *fresh])
            raise
        if not loaded:
            self.release(fresh)
            return None
        self._enter(fresh[0], key, ids, before[-1] if before else _UNHELD)
        return fresh[0]


def _root(salt: bytes | str) -> bytes:
    """Return the key before the first block; ``person`` keeps a crafted salt from posing as the key of a block."""
    raw = salt.encode(errors="surrogatepass") if isinstance(salt, str) else salt
    return blake2b(raw, digest_size=KEY_BYTES, person=b"dsv2 root").digest()


def _demand(holds: bool, otherwise: str) -> None:
    """Raise RuntimeError unless ``holds``; an assert would vanish under ``python -O``."""
    if not holds:
        raise RuntimeError(f"block pool: {otherwise}")
