"""What the scheduler moves: sequences, and the plan of one step."""

from array import array
from collections.abc import Sequence as Ordered
from enum import Enum
from typing import NamedTuple

from dsv2.engine.blocks import BLOCK_LEN, blocks_for
from dsv2.engine.request import MAX_PRIORITY
from dsv2.errors import RequestError

# Prompt tokens in whole units of so many are read in the expanded way, all others in the absorbed one: about where the two cost the same
# (171 query tokens, whatever the model's size). By position, not by load, so that a token's result does not depend on what runs beside it.
EXPANDED_UNIT = 256


class State(Enum):
    """Where a sequence is."""

    NEW = "new"  # not added yet
    WAITING = "waiting"  # holds nothing
    PARKED = "parked"  # holds nothing; another sequence is computing its next blocks
    RUNNING = "running"  # holds blocks for all its known tokens
    ENDED = "ended"


class Sequence:
    """One row of tokens, prompt and answer, from ``Scheduler.add`` to its end.

    The scheduler changes everything but ``draft``, which the engine sets after ``advance``; the rest is there to be read.

    Args:
        seq_id: unique among the live ones.
        tokens: ids of the prompt; the list is kept and grows with the answer.
        max_len: most tokens, prompt and answer.
        salt: only sequences of equal salt share cached prefixes.
        priority: higher first.
        deadline: monotonic seconds at which it ends, or None.
        all_logits: every chunk needs logits (log-probabilities of the prompt), so no prefix is taken from the cache unread.

    Attributes:
        prompt_len: tokens of the prompt.
        expanded: those of them, from the first on, that are read in the expanded way.
        num_computed: tokens whose latents are in the cache.
        blocks: the block table, ``BLOCK_LEN`` tokens each.
        table_version: grows when entries of ``blocks`` that were there before are replaced or go; appending leaves it.
        num_hit: tokens of the prompt that were found in the cache when it first ran.
        num_preempted: how often it lost its blocks to others.
        draft: tokens guessed to follow ``tokens``, to be verified by the next step; the scheduler may shorten it.
        state: where it is.
        arrival: its number in order of arrival.
    """

    __slots__ = (
        "all_logits", "arrival", "blocks", "born_step", "deadline", "draft", "expanded", "in_flight", "keys", "max_len", "num_computed",
        "num_hit", "num_preempted", "num_published", "num_scored", "priority", "prompt_len", "rank", "salt", "seq_id", "started", "state",
        "table_version", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        seq_id: int,
        tokens: list[int],
        max_len: int,
        *,
        salt: bytes | str = b"",
        priority: int = 0,
        deadline: float | None = None,
        all_logits: bool = False,
    ) -> None:
        self.seq_id = seq_id
        self.tokens = tokens
        self.prompt_len = len(tokens)
        self.expanded = self.prompt_len // EXPANDED_UNIT * EXPANDED_UNIT
        self.max_len = max_len
        self.salt = salt
        self.priority = priority
        self.deadline = deadline
        self.all_logits = all_logits
        self.state = State.NEW
        self.draft: tuple[int, ...] = ()
        self.blocks = array("i")  # as the native step reads them
        self.table_version = 0
        self.num_computed = 0
        self.num_hit = 0
        self.num_preempted = 0
        # Below: of the scheduler alone.
        self.arrival = 0
        self.born_step = 0
        self.rank = (0, 0)  # the lowest is served first and preempted last
        self.keys: list[bytes] = []  # of its full blocks, see blocks.py
        self.num_published = 0  # leading blocks that went through the index
        self.num_scored = 0  # leading tokens whose logits went out, or are not wanted (set before it is added)
        self.in_flight = 0  # length of the chunk in the last plan
        self.started = False

    def refuse_impossible(self, num_blocks: int) -> None:
        """Raise RequestError where a cache of ``num_blocks`` blocks could never serve this, or a value is out of range."""
        if not self.tokens or self.max_len < len(self.tokens):
            raise RequestError(
                f"a prompt of {len(self.tokens)} tokens with at most {self.max_len} in all; a prompt has at least 1 and no more than that",
                hint="shorten the prompt",
            )
        if abs(self.priority) > MAX_PRIORITY:
            raise RequestError(f"priority {self.priority}; allowed are {-MAX_PRIORITY} to {MAX_PRIORITY}", hint="choose one nearer to 0")
        if blocks_for(self.max_len) > num_blocks:
            raise RequestError(
                f"prompt and answer may take {self.max_len} tokens; the whole cache holds {num_blocks * BLOCK_LEN}",
                hint="shorten the prompt, ask for fewer new tokens or start the engine with a larger cache",
            )

    def take(self, new_tokens: Ordered[int]) -> int:
        """Count the chunk in flight as computed and append what follows it; return ``num_computed``.

        Args:
            new_tokens: accepted drafts and one sampled token behind the known tokens; none if the chunk ended before them.

        Raises:
            RuntimeError: the tokens do not fit the chunk, and nothing was changed.
        """
        known, count = len(self.tokens), len(new_tokens)
        computed = self.num_computed + self.in_flight
        if computed < known:
            if count:
                raise RuntimeError(f"sequence {self.seq_id}: {count} new tokens behind a chunk that ends at {computed} of {known}")
        else:
            if count > 1 and (count > computed - known + 1 or tuple(new_tokens[:-1]) != self.draft[: count - 1]):
                raise RuntimeError(f"sequence {self.seq_id}: new tokens {list(new_tokens)} do not begin with drafts {list(self.draft)}")
            if known + count > self.max_len:
                raise RuntimeError(f"sequence {self.seq_id}: {known + count} tokens, at most {self.max_len}")
            computed = known + count - 1 if count else known  # latents of rejected drafts do not count
            self.tokens.extend(new_tokens)
        self.in_flight = 0
        self.draft = ()
        self.num_computed = computed
        if self.all_logits and computed > self.num_scored:
            self.num_scored = computed
        return computed

    def forget(self) -> None:
        """Hold nothing any more but the tokens; the caller released the blocks."""
        self.blocks = array("i")
        self.table_version += 1
        self.num_computed = self.num_published = self.in_flight = 0
        self.draft = ()


class Chunk(NamedTuple):
    """A piece of work for one sequence in one step.

    Attributes:
        seq: whose.
        start: first position.
        length: tokens; beyond the known ones they are those of ``seq.draft``.
        needs_logits: False where the step may stop before the head. True for the chunk that reaches the end of the known tokens (the
            last known token and the drafts behind it), and for any chunk of a sequence with ``all_logits``.
    """

    seq: Sequence
    start: int
    length: int
    needs_logits: bool


class Plan(NamedTuple):
    """One step.

    Attributes:
        chunks: decoding sequences first, then chunks of prefills; no sequence twice.
        expired: sequences that passed their deadline and hold nothing any more.
        num_rows: tokens of decoding sequences, drafts included.
        num_prefill: tokens of prefill chunks.
        num_pairs: pairs of a new token and a token that it sees.
        predicted_s: seconds that this was expected to take.
    """

    chunks: tuple[Chunk, ...]
    expired: Ordered[Sequence]
    num_rows: int
    num_prefill: int
    num_pairs: int
    predicted_s: float
