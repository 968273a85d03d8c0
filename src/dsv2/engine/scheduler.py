"""Which tokens the next step computes: continuous batching over a paged latent cache. No tensors, one thread, plain Python.

The picture: a step is one call of the model over a few chunks. Every decoding sequence gives its last token and its drafts; what
time is left goes to prompts, in chunks that end at multiples of 64 from token 0, whatever shares the step.

    add -> WAITING --blocks for all its known tokens--> RUNNING --schedule, step, advance--> ... --finish, cancel, deadline--> ENDED
              ^  \\                                        |
              |   PARKED until a sibling has computed the common blocks
              +------------------ preempted: another one needed its blocks; its tokens stay, its latents are computed again

Order: higher priority first, then arrival. The rank is total and the running ones are kept in it: the first always gets its blocks and
its turn, the last gives up its blocks, so there is always progress. A sequence of low priority that later ones overtook for ``patience``
steps becomes the elder: it cannot be preempted and its prompt gets a unit every few steps until it ends. There is one elder at a time and a
pause between two, so priorities still mean something when a long queue has grown old.
"""

from bisect import insort
from collections import Counter
from collections.abc import Sequence as Ordered
from operator import attrgetter

from dsv2.engine.blocks import BLOCK_LEN, BlockPool, OutOfBlocks, blocks_for
from dsv2.engine.costs import StepCosts, num_pairs
from dsv2.engine.request import MAX_PRIORITY
from dsv2.engine.sequence import Chunk, Plan, Sequence, State
from dsv2.engine.waiting import SequenceHeap, Siblings

PREFILL_EVERY = 4  # steps: so often at least, a unit of some prompt is computed beside decoding, whatever it costs
LONE_PREFILL_S = 1.0  # that a step of prompts alone may take: whoever comes meanwhile waits for its end
ELDER_EVERY = 4  # steps: so often the elder's prompt comes first, with one unit
WAITING, PARKED, RUNNING, ENDED = State.WAITING, State.PARKED, State.RUNNING, State.ENDED  # reading an enum's member is slow
_by_rank = attrgetter("rank")


class Scheduler:
    """Turns live sequences into steps. Only the engine's thread calls it.

    Args:
        pool: blocks of the cache; nobody else holds any.
        max_sequences: most sequences that run at once.
        chunk_len: most tokens of prompts in a step, a multiple of ``BLOCK_LEN``.
        max_step_s: seconds that a step with decoding sequences may take, but for a unit of a prompt now and then (``PREFILL_EVERY``).
        patience: steps that a sequence is overtaken before it may become the elder.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, pool: BlockPool, *, max_sequences: int, chunk_len: int = 1024, max_step_s: float = 0.25, patience: int = 256
    ) -> None:
        if max_sequences < 1 or patience < 1 or not max_step_s > 0:
            raise ValueError(f"max_sequences {max_sequences}, patience {patience}, max_step_s {max_step_s}: all must be above 0")
        if chunk_len < BLOCK_LEN or chunk_len % BLOCK_LEN:
            raise ValueError(f"chunk_len {chunk_len} must be a multiple of {BLOCK_LEN}, at least that")
        self.pool = pool
        self.costs = StepCosts()
        self._max_sequences, self._chunk_len, self._max_step_s, self._patience = max_sequences, chunk_len, max_step_s, patience
        self._live: dict[int, Sequence] = {}  # in order of arrival
        self._levels: Counter[int] = Counter()  # live sequences per priority
        self._running: list[Sequence] = []  # in order of rank
        self._waiting = SequenceHeap(lambda seq: seq.state is WAITING)  # by rank
        self._deadlines = SequenceHeap(lambda seq: seq.state is not ENDED)
        self._siblings = Siblings(pool)
        self._elder: Sequence | None = None
        self._step = self._next_promotion = self._num_arrived = self._steps_without_prefill = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence lives."""
        return bool(self._live)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._live) - len(self._running)

    def add(self, seq: Sequence) -> None:
        """Accept a sequence; from then on it ends by ``finish``, ``cancel`` or its deadline.

        Raises:
            RequestError: it could never end: the cache is smaller than it may become; or its priority or length is out of range.
            ValueError: it was added before, or its id is taken.
        """
        if seq.state is not State.NEW or seq.seq_id in self._live:
            raise ValueError(f"sequence {seq.seq_id} was added before")
        seq.refuse_impossible(self.pool.num_blocks)
        self._num_arrived += 1
        seq.arrival, seq.born_step, seq.rank = self._num_arrived, self._step, (-seq.priority, self._num_arrived)
        self._live[seq.seq_id] = seq
        self._levels[seq.priority] += 1
        if seq.deadline is not None:
            self._deadlines.push((seq.deadline, seq.arrival), seq)
        self._queue(seq)

    def schedule(self, now: float) -> Plan:
        """Plan a step.

        Args:
            now: monotonic seconds, to compare with deadlines.

        Returns:
            The plan. While sequences live it has chunks, unless all of them are complete and wait for ``finish``.

        Raises:
            RuntimeError: blocks are held by somebody else, so that nothing can go on.
        """
        self._step += 1
        expired = self._expire(now) if self._deadlines else ()
        if self._step >= self._next_promotion and len(self._levels) > 1:
            self._promote()
        if self._waiting:
            self._admit()
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        running = self._running
        num_rows = pairs = position = 0
        while position < len(running):  # preemption shortens the list from its end
            seq = running[position]
            position += 1
            known, start = len(seq.tokens), seq.num_computed
            if known - start != 1:
                if known > start:
                    prefills.append(seq)
                continue
            length = 1
            if seq.draft:
                seq.draft = seq.draft[: max(0, seq.max_len - known - 1)]
                length += len(seq.draft)
            if start + length > len(seq.blocks) * BLOCK_LEN and not (length := self._grow(seq, length)):
                continue
            seq.in_flight = length
            chunks.append(Chunk(seq, start, length, True))
            num_rows += length
            pairs += num_pairs(start, length) if length > 1 else start + 1
        num_prefill = 0
        if prefills:
            num_prefill, pairs = self._prefill(prefills, chunks, num_rows, pairs)
        return Plan(tuple(chunks), expired, num_rows, num_prefill, pairs, self.costs.predict(num_rows, num_prefill, pairs))

    def observe(self, plan: Plan, seconds: float) -> None:
        """Tell how long a plan's step took."""
        if plan.chunks:
            self.costs.observe(plan.num_rows, plan.num_prefill, plan.num_pairs, seconds)

    def advance(self, seq: Sequence, new_tokens: Ordered[int] = ()) -> bool:
        """Take over the result of a sequence's chunk.

        Args:
            seq: of a chunk of the last plan.
            new_tokens: what follows its known tokens: none where the chunk did not reach their end, else the drafts that were accepted
                and one sampled token. None at their end leaves a sequence complete: it only waits for ``finish``.

        Returns:
            False when the sequence was cancelled or the cache reset since the plan: the result does not count.

        Raises:
            RuntimeError: the tokens do not fit the chunk, and nothing was changed.
        """
        if not seq.in_flight or seq.state is not RUNNING:
            return False
        computed = seq.take(new_tokens)
        if computed // BLOCK_LEN > seq.num_published:
            self._publish(seq, computed // BLOCK_LEN)
        return True

    def finish(self, seq: Sequence) -> None:
        """End a sequence and free all it holds. One that ended before stays as it is."""
        if self._live.get(seq.seq_id) is seq:
            self._end(seq)

    def cancel(self, seq_id: int) -> bool:
        """End a sequence at any moment, also between ``schedule`` and ``advance``; False when no such one lives."""
        seq = self._live.get(seq_id)
        if seq is not None:
            self._end(seq)
        return seq is not None

    def reset_cache(self) -> None:
        """Forget all latents after an update of the weights: running sequences begin again at token 0, keeping their tokens."""
        self.pool.reset()
        for seq in list(self._running):
            self._stop(seq)
            self._queue(seq)

    def check(self) -> None:
        """Audit the book-keeping, the pool's too; for tests and for an idle engine.

        Raises:
            RuntimeError: says what is wrong.
        """
        self.pool.check([seq.blocks for seq in self._live.values()])
        running = [seq for seq in self._live.values() if seq.state is RUNNING]
        others = {seq.seq_id for seq in self._live.values() if seq.state is not RUNNING}
        queued = {seq.seq_id for seq in self._waiting.sequences()} | {seq.seq_id for seq in self._siblings.parked() if seq.state is PARKED}
        leaders = self._siblings.leaders()
        faults = {
            "the running ones are not in order of rank": sorted(running, key=_by_rank) != self._running,
            "too many run": len(running) > self._max_sequences,
            "one that does not run holds something": any(self._live[seq_id].blocks or self._live[seq_id].num_computed for seq_id in others),
            "one lacks blocks": any(len(seq.blocks) < blocks_for(seq.num_computed) for seq in running),
            "one is in no queue": queued != others,
            "a block is awaited from one that does not run": any(seq.state is not RUNNING for seq in leaders),
            "an idle scheduler remembers something": not self._live and bool(leaders or self._elder or self._levels),
        }
        wrong = [fault for fault, there in faults.items() if there]
        if wrong:
            raise RuntimeError(f"scheduler: {'; '.join(wrong)}")

    # Waiting ----------------------------------------------------------------------------------------------------------------------

    def _queue(self, seq: Sequence) -> None:
        """Let a sequence wait for its start."""
        seq.state = WAITING
        self._waiting.push(seq.rank, seq)

    def _release(self, siblings: Ordered[Sequence]) -> None:
        """Queue again those that were parked."""
        for seq in siblings:
            if seq.state is PARKED:
                self._queue(seq)

    def _expire(self, now: float) -> Ordered[Sequence]:
        """End what passed its deadline."""
        expired: list[Sequence] = []
        while (seq := self._deadlines.first(now)) is not None:
            self._deadlines.pop()
            self._end(seq)
            expired.append(seq)
        return expired

    def _promote(self) -> None:
        """Make the oldest sequence that does not decode the elder, if it is old enough and later ones run."""
        for seq in () if self._elder is not None else self._live.values():
            if self._step - seq.born_step < self._patience:
                return
            if seq.state is RUNNING and len(seq.tokens) - seq.num_computed <= 1:
                continue
            if any(other.arrival > seq.arrival for other in self._running):
                self._elder = seq
                seq.rank = (-MAX_PRIORITY - 1, seq.arrival)
                if seq.state is RUNNING:
                    self._running.sort(key=_by_rank)
                else:
                    self._queue(seq)  # in front; the entry with its old rank goes stale
            return

    def _admit(self) -> None:
        """Start waiting sequences in order of rank until one does not fit; nobody overtakes that one."""
        while (seq := self._waiting.first()) is not None:
            self._waiting.pop()  # first, since what is preempted for it is pushed
            reusable = self._reusable(seq)
            if self._siblings.park(seq, reusable, self._elder):
                seq.state = PARKED
            elif not self._start(seq, reusable):
                self._queue(seq)
                return

    def _reusable(self, seq: Sequence) -> int:
        """Return how many blocks a sequence may take from the cache: at least one token is computed, and all whose logits are due."""
        if not self.pool.reuse:
            return 0
        return min(len(seq.tokens) - 1, seq.num_scored if seq.all_logits else seq.max_len) // BLOCK_LEN

    def _start(self, seq: Sequence, reusable: int) -> bool:
        """Give a waiting sequence blocks for all its known tokens, taking them from weaker ones; False if it must go on waiting."""
        pool = self.pool
        if not self._make_room(seq, reusable):
            if not self._running:
                raise RuntimeError(f"no sequence runs, yet {pool.num_used} of {pool.num_blocks} blocks are held")
            return False
        blocks = pool.match(seq.tokens, seq.salt, reusable * BLOCK_LEN, seq.keys, seq.expanded)
        num_matched = len(blocks)
        try:
            blocks += pool.allocate(blocks_for(len(seq.tokens)) - num_matched)
        except OutOfBlocks:  # a block that was there by its key held other tokens
            pool.release(blocks)
            return False
        seq.blocks.extend(blocks)
        seq.num_published, seq.num_computed = num_matched, num_matched * BLOCK_LEN
        if not seq.started:
            seq.started, seq.num_hit = True, seq.num_computed
        seq.state = RUNNING
        insort(self._running, seq, key=_by_rank)
        if pool.reuse:
            keys = pool.chain(seq.tokens, seq.salt, len(seq.tokens) // BLOCK_LEN, seq.keys, seq.expanded)
            self._siblings.announce(seq, keys[num_matched:])
        return True

    def _make_room(self, seq: Sequence, reusable: int) -> bool:
        """Preempt as many weaker sequences as it takes to start this one, none if it would not do; return whether it can start.

        One block stays free for each sequence that runs: they grow, and would soon preempt the newcomer.
        """
        pool, running = self.pool, self._running
        keys = pool.chain(seq.tokens, seq.salt, reusable, seq.keys, seq.expanded)
        gain = count = 0
        while True:
            num_left = len(running) - count
            if num_left < self._max_sequences:
                num_hit, num_idle = pool.peek(keys, reusable)
                need = blocks_for(len(seq.tokens)) - num_hit + num_idle
                if pool.num_free + gain >= need + num_left:
                    break
            if not num_left:
                return False
            victim = running[num_left - 1]
            if seq is not self._elder and (victim.priority >= seq.priority or victim is self._elder):
                return False
            gain += len(victim.blocks)
            count += 1
        for _ in range(count):
            self._preempt()
        # Victims may have shared blocks with others or with this one; if that was too optimistic, the next step goes on from here.
        return not count or self._make_room(seq, reusable)

    # Running ----------------------------------------------------------------------------------------------------------------------

    def _grow(self, seq: Sequence, length: int) -> int:
        """Get blocks for the next ``length`` tokens; return how many may be computed, 0 if the sequence had to give up its own blocks."""
        pool, held = self.pool, len(seq.blocks)
        if length > 1 and blocks_for(seq.num_computed + length) - held > pool.num_free:  # nobody is preempted for guesses
            length = max(1, held * BLOCK_LEN - seq.num_computed)
            seq.draft = seq.draft[: length - 1]
        need = blocks_for(seq.num_computed + length) - held
        while need > pool.num_free:
            if len(self._running) == 1:
                raise RuntimeError(f"one sequence runs with {held} blocks, yet {pool.num_used} of {pool.num_blocks} are held")
            if self._preempt() is seq:
                return 0
        seq.blocks.extend(pool.allocate(need))
        return length

    def _prefill(self, prefills: list[Sequence], chunks: list[Chunk], num_rows: int, pairs: int) -> tuple[int, int]:
        """Append chunks of prompts; return their tokens, and the pairs of the whole step."""
        unit_only = False
        if prefills[0] is self._elder and len(prefills) > 1:
            unit_only = self._step % ELDER_EVERY == 0
            if not unit_only:
                prefills.append(prefills.pop(0))
        due = unit_only or not num_rows or self._steps_without_prefill >= PREFILL_EVERY - 1
        costs = self.costs
        seconds_left = self._max_step_s - costs.predict(num_rows, 0, pairs) if num_rows else LONE_PREFILL_S
        tokens_left = self._chunk_len
        for seq in prefills:
            start, known = seq.num_computed, len(seq.tokens)
            length = costs.fit(start, known, BLOCK_LEN if unit_only else tokens_left, seconds_left, due)
            if not length:
                break
            due = unit_only = False
            added = num_pairs(start, length)
            seconds_left -= costs.token * length + costs.pair * added
            tokens_left -= length
            pairs += added
            seq.in_flight = length
            chunks.append(Chunk(seq, start, length, seq.all_logits or start + length == known))
        num_prefill = self._chunk_len - tokens_left
        self._steps_without_prefill = 0 if num_prefill else self._steps_without_prefill + 1
        return num_prefill, pairs

    def _publish(self, seq: Sequence, stop: int) -> None:
        """Publish the blocks of a sequence up to ``stop`` and release who waited for one of them."""
        if self.pool.publish(seq.blocks, seq.tokens, seq.salt, seq.num_published, stop, seq.keys, seq.expanded):
            seq.table_version += 1
        self._release(self._siblings.published(seq.keys[seq.num_published : stop]))
        seq.num_published = stop

    def _preempt(self) -> Sequence:
        """Take the blocks of the running sequence of the lowest rank; return it."""
        seq = self._running[-1]
        self._stop(seq)
        seq.num_preempted += 1
        self._queue(seq)
        return seq

    def _stop(self, seq: Sequence) -> None:
        """Take everything from a running sequence but its tokens."""
        self._running.remove(seq)
        self.pool.release(seq.blocks)
        self._release(self._siblings.stopped(seq, seq.keys[seq.num_published :]))
        seq.forget()

    def _end(self, seq: Sequence) -> None:
        """Let go of a live sequence."""
        if seq.state is RUNNING:
            self._stop(seq)
        seq.state = ENDED
        del self._live[seq.seq_id]
        self._levels[seq.priority] -= 1
        if not self._levels[seq.priority]:
            del self._levels[seq.priority]
        if seq is self._elder:
            self._elder, self._next_promotion = None, self._step + self._patience
        self._waiting.shrink(len(self._live))
        self._deadlines.shrink(len(self._live))
