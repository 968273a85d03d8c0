"""A pretend model and random traffic for the scheduler: latents say which tokens they were made of, so a wrong block cannot hide."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from dsv2.engine.blocks import BLOCK_LEN, BlockPool, blocks_for
from dsv2.engine.scheduler import Scheduler
from dsv2.engine.sequence import EXPANDED_UNIT, Chunk, Plan, Sequence, State

STOP = 0  # a token that ends an answer


class LossyTier:
    """Keeps latents of evicted blocks; loses some, and writes rubbish over the block when it does."""

    def __init__(self, world: "World", loss: float) -> None:
        self.world, self.loss = world, loss
        self.kept: dict[bytes, list[object]] = {}

    def has(self, key: bytes) -> bool:
        return key in self.kept

    def store(self, key: bytes, block: int) -> None:
        if self.world.rng.random() >= self.loss:
            self.kept[key] = list(self.world.latents[block])

    def load(self, key: bytes, block: int) -> bool:
        lost = self.world.rng.random() < self.loss
        self.world.events["lost" if lost else "loaded"] += 1
        self.world.latents[block] = [None] * BLOCK_LEN if lost else list(self.kept[key])
        return not lost

    def clear(self) -> None:
        self.kept.clear()


@dataclass
class World:
    """An engine without numbers: a latent is a hash of the weights' era, the salt, and all tokens up to there as they were read."""

    rng: Random
    num_blocks: int
    max_sequences: int
    chunk_len: int = 256
    patience: int = 64
    reuse: bool = True
    tier_loss: float | None = None
    drafting: bool = False
    costs: tuple[float, float, float, float] = (0.01, 0.002, 0.0005, 1e-7)
    stops: bool = True
    era: int = 0
    now: float = 0.0
    num_steps: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)
    computed: list[tuple[int, int]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        tier = None if self.tier_loss is None else LossyTier(self, self.tier_loss)
        self.latents: list[list[object]] = [[None] * BLOCK_LEN for _ in range(self.num_blocks)]
        self.pool = BlockPool(self.num_blocks, reuse=self.reuse, tier=tier)
        self.scheduler = Scheduler(
            self.pool, max_sequences=self.max_sequences, chunk_len=self.chunk_len, max_step_s=0.1, patience=self.patience
        )
        self.live: dict[int, Sequence] = {}
        self.born: dict[int, int] = {}

    def add(self, tokens: list[int], new: int, **options: object) -> Sequence:
        seq = Sequence(len(self.born), list(tokens), len(tokens) + new, **options)  # type: ignore[arg-type]
        self.scheduler.add(seq)
        self.live[seq.seq_id], self.born[seq.seq_id] = seq, self.num_steps
        return seq

    def latent(self, before: object, token: int, expanded: bool) -> int:
        return hash((before, token, expanded))

    def first(self, salt: bytes | str) -> int:
        return hash((self.era, len(salt)))  # of numbers only: the hash of a str differs from run to run

    def choose(self, latent: object, seq_id: int) -> int:
        """Return what the model says behind a latent; two kinds of sequences sample differently."""
        number = hash((latent, seq_id % 2))
        return STOP if self.stops and number % 47 == 0 else number % 10 + 1

    def write(self, chunk: Chunk) -> list[int]:
        """Do what the native step does for one chunk, reading all latents before it; return what the model would sample."""
        seq, table = chunk.seq, chunk.seq.blocks
        assert len(table) * BLOCK_LEN >= chunk.start + chunk.length
        tokens = [*seq.tokens, *seq.draft]
        latent = self.first(seq.salt)
        for position in range(chunk.start):
            latent = self.latent(latent, tokens[position], position < seq.expanded)
            assert self.latents[table[position // BLOCK_LEN]][position % BLOCK_LEN] == latent, "a latent of other tokens"
        sampled = []
        for position in range(chunk.start, chunk.start + chunk.length):
            latent = self.latent(latent, tokens[position], position < seq.expanded)
            self.latents[table[position // BLOCK_LEN]][position % BLOCK_LEN] = latent
            sampled.append(self.choose(latent, seq.seq_id))
        self.computed.append((seq.seq_id, chunk.length))
        return sampled

    def verify(self, chunk: Chunk, sampled: list[int]) -> list[int]:
        """Return the accepted drafts and the token behind them."""
        known = len(chunk.seq.tokens)
        if chunk.start + chunk.length < known:
            return []
        guesses = chunk.seq.draft[: chunk.start + chunk.length - known]
        sampled = sampled[len(sampled) - 1 - len(guesses) :]
        new = []
        for guess, token in zip([*guesses, None], sampled, strict=True):
            new.append(token)
            if guess != token or token == STOP:
                break
        self.events["draft accepted"] += len(new) - 1
        self.events["draft rejected"] += len(new) <= len(guesses)
        return new

    def guess(self, seq: Sequence) -> None:
        """Draft what would come, sometimes wrongly."""
        latent, drafts = self.first(seq.salt), []
        for position, token in enumerate(seq.tokens):
            latent = self.latent(latent, token, position < seq.expanded)
        for _ in range(self.rng.randrange(6)):
            drafts.append(self.choose(latent, seq.seq_id) if self.rng.random() < 0.8 else self.rng.randrange(11))
            latent = self.latent(latent, drafts[-1], False)
        seq.draft = tuple(drafts)

    def inspect(self, plan: Plan) -> None:
        """Check a plan against what every plan promises."""
        chunks, scheduler = plan.chunks, self.scheduler
        assert chunks or not scheduler.has_work, "nothing to do while sequences live"
        assert len({chunk.seq.seq_id for chunk in chunks}) == len(chunks) <= self.max_sequences
        writers: dict[int, int] = {}
        decoding = True
        for seq, start, length, needs_logits in chunks:
            known, end = len(seq.tokens), start + length
            assert seq.seq_id in self.live
            assert start == seq.num_computed
            assert length >= 1
            assert end % BLOCK_LEN == 0 or end == known or (start == known - 1 and end == known + len(seq.draft))
            assert end <= seq.max_len
            assert needs_logits == (end >= known or seq.all_logits)
            is_row = start == known - 1
            assert decoding or not is_row, "decoding sequences come first"
            decoding = is_row
            for block in seq.blocks[start // BLOCK_LEN : blocks_for(end)]:
                assert writers.setdefault(block, seq.seq_id) == seq.seq_id, "two writers"
                assert not self.pool._keys[block], "a published block is written"
        prefill = sum(chunk.length for chunk in chunks if chunk.start != len(chunk.seq.tokens) - 1)
        assert prefill == plan.num_prefill <= self.chunk_len
        assert plan.num_rows == sum(chunk.length for chunk in chunks) - prefill
        assert plan.num_pairs == sum(sum(range(start + 1, start + length + 1)) for _, start, length, _ in chunks)

    def step(self, between: Callable[[], object] = lambda: None, before: Callable[[], object] = lambda: None) -> Plan:
        """Schedule, compute, advance; ``before`` and ``between`` happen after the plan and after the computation."""
        self.num_steps += 1
        plan = self.scheduler.schedule(self.now)
        for seq in plan.expired:
            assert seq.deadline is not None
            assert seq.deadline <= self.now
            del self.live[seq.seq_id]
        self.inspect(plan)
        before()
        results = [(chunk, self.verify(chunk, self.write(chunk))) for chunk in plan.chunks if chunk.seq.in_flight]
        between()
        for (seq, _, _, _), new in results:
            table, version = seq.blocks[:], seq.table_version
            counted = self.scheduler.advance(seq, new)
            self.events["table replaced"] += table != seq.blocks
            assert (seq.table_version > version) == (table != seq.blocks)
            assert counted == (seq.seq_id in self.live and seq.state is State.RUNNING)
            if counted and (STOP in new or len(seq.tokens) == seq.max_len):
                self.answers[seq.seq_id] = seq.tokens[seq.prompt_len :]
                del self.live[seq.seq_id]
                self.scheduler.finish(seq)
            elif counted and self.drafting and new:
                self.guess(seq)
        base, row, token, pair = self.costs
        seconds = (base + row * plan.num_rows + token * plan.num_prefill + pair * plan.num_pairs) * self.rng.uniform(0.8, 1.25)
        self.now += seconds
        self.scheduler.observe(plan, seconds)
        self.scheduler.check()
        return plan

    def cancel(self, seq_id: int) -> None:
        assert self.scheduler.cancel(seq_id) == (self.live.pop(seq_id, None) is not None)

    def new_weights(self) -> None:
        self.scheduler.reset_cache()
        self.era += 1

    def drain(self, limit: int) -> None:
        end = self.num_steps + limit
        while self.scheduler.has_work:
            assert self.num_steps < end, f"starved: {sorted(self.live)}"
            self.step()
        assert not self.live
        assert self.pool.num_used == 0
        assert self.pool.num_free == self.num_blocks

    def alone(self, prompt: list[int], new: int, seq_id: int, salt: bytes | str = b"") -> list[int]:
        """Return the answer that a sequence alone in the world would get."""
        latent = self.first(salt)
        for position, token in enumerate(prompt):
            latent = self.latent(latent, token, position < len(prompt) // EXPANDED_UNIT * EXPANDED_UNIT)
        answer: list[int] = []
        while len(answer) < new and STOP not in answer:
            answer.append(self.choose(latent, seq_id))
            latent = self.latent(latent, answer[-1], False)
        return answer


def prompt(family: int, shared: int, own: int, tail: int) -> list[int]:
    """Return ``shared`` tokens of a family, then ``own`` of one's own."""
    return [family * 500 + place % 97 + 20 for place in range(shared)] + [5000 + tail * 7 + place % 89 for place in range(own)]


def run_trace(world: World, resets: float) -> Counter[str]:
    """Let sequences come, share beginnings, be cancelled, expire and preempt each other until all ended; count what happened."""
    rng, events = world.rng, Counter[str]()
    asked: dict[int, tuple[list[int], int, bytes | str]] = {}
    everybody: list[Sequence] = []

    def disturb() -> None:
        if world.live and rng.random() < 0.08:
            world.cancel(rng.choice(list(world.live)))
        if rng.random() < resets:
            world.new_weights()

    for _ in range(rng.randrange(40, 120)):
        while rng.random() < 0.35 and len(world.live) < 30:
            tokens = prompt(rng.randrange(2), rng.choice([0, 63, 64, 65, 128, 192]), rng.choice([0, 1, 1, 20, 64, 90]), rng.randrange(4))
            tokens = tokens or [7]
            new = min(rng.choice([1, 2, 10, 70]), world.num_blocks * BLOCK_LEN - len(tokens))
            salt = rng.choice(["", "", "other"])
            deadline = world.now + rng.uniform(0, 3) if rng.random() < 0.15 else None
            level = rng.choice([0, 0, 0, 1, -3])
            for _ in range(rng.choice([1, 1, 1, 3])):
                seq = world.add(tokens, new, salt=salt, priority=level, deadline=deadline, all_logits=rng.random() < 0.1)
                asked[seq.seq_id] = (tokens, new, salt)
                everybody.append(seq)
        plan = world.step(disturb, disturb)
        events["expired"] += len(plan.expired)
        events["parked"] += any(seq.state is State.PARKED for seq in world.live.values())
        events["elder"] += world.scheduler._elder is not None
        events["mixed"] += bool(plan.num_rows and plan.num_prefill)
        events["two prompts"] += sum(chunk.start < len(chunk.seq.tokens) - 1 for chunk in plan.chunks) > 1
    world.drain(3000)  # the longest of some hundred traces took 671
    if not world.era:
        for seq_id, answer in world.answers.items():
            tokens, new, salt = asked[seq_id]
            assert answer == world.alone(tokens, new, seq_id, salt)
    events["ended"] = len(world.answers)
    events["preempted"] = sum(seq.num_preempted for seq in everybody)
    events["hit"] = sum(seq.num_hit > 0 for seq in everybody)
    events["new weights"] = world.era
    events.update(world.events)
    return events
