"""Drafts from what was already said (prompt lookup), and how long a draft is worth its rows. No tensors; no text depends on it.

The tokens that followed the latest earlier occurrence of the last few tokens are proposed as the next ones; the engine runs them all in
one step and ``sampler.sample`` keeps those that it draws anyway. Prompt lookup: A. Saxena, "Prompt Lookup Decoding", 2023.
"""

from collections.abc import Iterable, Sequence

MAX_NGRAM, MIN_NGRAM = 4, 2
_ID_BITS = 32

# The controller's habits; only speed depends on them.
MARGIN = 1.05  # a draft must promise to be this much faster than plain decoding
DECAY = 0.9  # of what an older verification counts, per later one
PRIOR_ACCEPTED, PRIOR_REFUSED = 1.0, 1.0  # before anything is known: one half
FIRST_PAUSE, LAST_PAUSE = 8, 512  # drafts left out when they do not pay, doubling with each try that fails


class PromptLookup:
    """The n-grams of one sequence, prompt and answer, and where each occurred last.

    Args:
        tokens: the prompt.
        max_ngram: the longest n-gram that is looked up; longer ones are tried first.
        min_ngram: the shortest, at least 1.
    """

    __slots__ = ("_begins", "_keys", "_masks", "_tables", "_tokens")

    def __init__(self, tokens: Iterable[int] = (), *, max_ngram: int = MAX_NGRAM, min_ngram: int = MIN_NGRAM) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-grams from {min_ngram} to {max_ngram}")
        lengths = range(max_ngram, min_ngram - 1, -1)
        self._tokens: list[int] = []
        self._masks = [(1 << (_ID_BITS * length)) - 1 for length in lengths]
        self._keys = [(1 << (_ID_BITS * length)) - 1 for length in lengths]  # of no token: an id has fewer bits
        self._tables: list[dict[int, int]] = [{} for _ in lengths]
        self._begins: list[int | None] = [None for _ in lengths]  # what followed the latest earlier occurrence of each last n-gram
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens that were drawn or, at first, asked; ids have at most 31 bits."""
        masks, keys, tables, begins = self._masks, self._keys, self._tables, self._begins
        orders = range(len(masks))
        for token in tokens:
            self._tokens.append(token)
            after = len(self._tokens)
            for i in orders:
                key = ((keys[i] << _ID_BITS) | token) & masks[i]
                keys[i] = key
                begins[i] = tables[i].get(key)
                tables[i][key] = after

    def propose(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the latest earlier occurrence of the longest n-gram that has one; perhaps none.

        Where the occurrence overlaps the end, the draft goes on as if it were part of the text: a repetition is repeated.
        """
        tokens = self._tokens
        for begin in self._begins:
            if begin is not None:
                draft = tokens[begin : begin + most]
                period = len(tokens) - begin
                while len(draft) < most:
                    draft += draft[-period:][: most - len(draft)] if len(draft) >= period else tokens[begin:]
                return draft
        return []


class DraftLength:
    """How many tokens to draft for one sequence: as many as pay, none while drafts lose, and a try now and then.

    A draft token is taken to be accepted with one probability, independently, estimated from what the latest drafts had accepted. A
    step with k draft tokens then yields 1 + p + ... + p^k tokens for ``costs[k]``.
    """

    __slots__ = ("_accepted", "_pause", "_refused", "_wait")

    def __init__(self) -> None:
        self._accepted = PRIOR_ACCEPTED
        self._refused = PRIOR_REFUSED
        self._pause = 0
        self._wait = 0

    @property
    def acceptance(self) -> float:
        """The estimated probability that a draft token is accepted."""
        return self._accepted / (self._accepted + self._refused)

    def choose(self, costs: Sequence[float]) -> int:
        """Return how many tokens to draft in this step; call once per step in which there is something to propose.

        Args:
            costs: [k] is the cost of a step that verifies k draft tokens for this sequence, in any unit; [0] that of plain decoding. A
                mixture-of-experts layer reads more experts for more tokens, so it may rise steeply.
        """
        if len(costs) < 2:
            return 0
        best, gain = self._best(costs)
        if gain >= MARGIN:
            self._pause = 0
            return best
        if not self._pause:
            self._pause = self._wait = FIRST_PAUSE
        if self._wait:
            self._wait -= 1
            return 0
        return best  # a try, with what would lose least

    def record(self, drafted: int, accepted: int) -> None:
        """Learn from a verification: of ``drafted`` tokens, at least 1, the first ``accepted`` were drawn."""
        self._accepted = self._accepted * DECAY + accepted
        self._refused = self._refused * DECAY + (accepted < drafted)
        if self._pause and accepted < drafted:
            self._pause = self._wait = min(2 * self._pause, LAST_PAUSE)

    def _best(self, costs: Sequence[float]) -> tuple[int, float]:
        """Return the draft length of 1 or more with the most tokens per cost, and its speed over plain decoding."""
        acceptance, term, expected = self.acceptance, 1.0, 1.0
        best, gain = 1, 0.0
        for length in range(1, len(costs)):
            term *= acceptance
            expected += term
            speed = expected * costs[0] / costs[length]
            if speed > gain:
                best, gain = length, speed
        return best, gain
