"""How long a step will take, learned from the steps before it.

    seconds = base + row * rows + token * tokens + pair * pairs

rows are decoded tokens (drafts count), tokens those of prefill chunks, pairs the (new token, cached token) pairs that attention visits in
either. The true cost bends (experts are shared, caches are finite), so the estimate follows the mixture of steps that is being run.
"""

from dsv2.engine.blocks import BLOCK_LEN

# Where to start before the first step: proportions derived for V2-Lite shapes on two cores. The first step observed scales all four.
FIRST_BASE_S, FIRST_ROW_S, FIRST_TOKEN_S, FIRST_PAIR_S = 20e-3, 8e-3, 8e-3, 2e-6

RATE = 0.25  # share of the error in a step's logarithm that one observation removes, to first order
LEAST_RATIO, MOST_RATIO = 0.25, 4.0  # a step that was swapped out or timed wrongly counts for no more than this


class StepCosts:
    """An online estimate with four positive terms.

    Each observation blames every term in proportion to its share of the prediction, so the terms need no common scale and none becomes
    negative; a term that plays no part in a step stays as it is, however long such steps go on.

    Attributes:
        base: seconds of a step that does nothing.
        row: seconds per decoded token.
        token: seconds per prefilled token.
        pair: seconds per pair of a new and a cached token.
    """

    __slots__ = ("_num_observed", "base", "pair", "row", "token")

    def __init__(self) -> None:
        self.base, self.row, self.token, self.pair = FIRST_BASE_S, FIRST_ROW_S, FIRST_TOKEN_S, FIRST_PAIR_S
        self._num_observed = 0

    def predict(self, rows: int, tokens: int, pairs: int) -> float:
        """Return the expected seconds of a step."""
        return self.base + self.row * rows + self.token * tokens + self.pair * pairs

    def observe(self, rows: int, tokens: int, pairs: int, seconds: float) -> None:
        """Learn from a step that took ``seconds``; what is not above 0 is ignored."""
        if not seconds > 0:
            return
        predicted = self.predict(rows, tokens, pairs)
        ratio = seconds / predicted
        self._num_observed += 1
        if self._num_observed == 1:
            self.base, self.row, self.token, self.pair = self.base * ratio, self.row * ratio, self.token * ratio, self.pair * ratio
            return
        base, row, token, pair = self.base, self.row * rows, self.token * tokens, self.pair * pairs
        squares = base * base + row * row + token * token + pair * pair
        gain = RATE * (min(MOST_RATIO, max(LEAST_RATIO, ratio)) - 1.0) * predicted / squares
        self.base *= 1.0 + gain * base
        self.row *= 1.0 + gain * row
        self.token *= 1.0 + gain * token
        self.pair *= 1.0 + gain * pair

    def fit(self, start: int, known: int, tokens: int, seconds: float, due: bool) -> int:
        """Return the length of the longest affordable chunk of a prompt; it ends at a multiple of ``BLOCK_LEN`` or at the prompt's end.

        Args:
            start: first position.
            known: the prompt's end.
            tokens: most tokens, rounded down to whole units.
            seconds: most seconds, may be negative.
            due: whether one unit is given whatever it costs in seconds.
        """
        last = min(known, (start // BLOCK_LEN + tokens // BLOCK_LEN) * BLOCK_LEN)
        end = start
        while end < last:
            stop = min(last, (end // BLOCK_LEN + 1) * BLOCK_LEN)
            seconds -= self.token * (stop - end) + self.pair * num_pairs(end, stop - end)
            if seconds < 0 and not (due and end == start):
                break
            end = stop
        return end - start


def num_pairs(start: int, length: int) -> int:
    """Return how many (query, key) pairs causal attention of ``length`` tokens from position ``start`` visits."""
    return length * start + length * (length + 1) // 2
