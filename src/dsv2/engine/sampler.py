"""Logits to tokens: bias and penalties, what is forbidden, temperature, top-k, top-p, min-p, each row by itself. No torch.

A row's token is a function of its own logits and state alone: one uniform number per token, itself a function of seed and position, is
read off the row's cumulative weights in id order. So a seeded request continues the same way whatever else is in the batch, after a
preemption and with or without drafts, and rounding differences between machines matter only when the number falls within them.
"""

import math
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv2.engine.constrain import Matcher
from dsv2.engine.request import SamplingParams, TokenLogprob
from dsv2.errors import CheckpointError, RequestError

# Best ids of each row and their logits, found where the logits were made: ties go to the lowest id, a row with a NaN has a NaN.
Best = tuple[NDArray[np.integer[Any]], NDArray[np.float32]]

_WORD = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: steps of SplitMix64
_STEP_BITS = 16  # of a float32 that are left out when weights are put in steps: 128 steps between a number and its double
_BLOCK = 512  # weights that are summed as one before the cumulative sum looks closer (cumsum is 25 times as slow as a sum)


class NotFinite(CheckpointError):
    """Some rows of logits are not numbers; ``rows`` are the indices of their states."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__("the model's logits are not finite", hint="the weights may have diverged in training: try an earlier checkpoint")
        self.rows = rows


class Drawn(NamedTuple):
    """What one sequence gained in a step.

    ``tokens`` is empty only when ``error`` says why nothing could be drawn. ``logprobs`` has an entry per token where they were asked for.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: RequestError | None = None


def draw_seed(params: SamplingParams) -> int:
    """Return the request's seed, or one from the system: call once per request, for all of its ``n`` answers."""
    return secrets.randbits(63) if params.seed is None else params.seed


def stream_key(seed: int, sample: int = 0) -> int:
    """Return the 64-bit key of one answer's random numbers."""
    return _mix(_mix(seed) + sample * _GAMMA)


def uniform(key: int, index: int) -> float:
    """Return the number in [0, 1), a multiple of 2^-53, that belongs to the new token ``index`` (from 0) of a stream.

    It is output number ``index`` of SplitMix64 (Steele, Lea and Flood 2014) started at ``key``.
    """
    return (_mix(key + (index + 1) * _GAMMA) >> 11) * 2.0**-53


def _mix(word: int) -> int:
    """Mix the low 64 bits of an integer: the finaliser "Mix13" of Stafford, a bijection."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


class SamplerState:
    """What the next token of one answer depends on besides its logits.

    Args:
        params: of the request.
        prompt: its ids, for the repetition penalty.
        seed: from ``draw_seed``.
        index: which of the request's answers this is.
        end_ids: tokens that end the answer: not drawn before ``min_tokens``, and nothing is drawn after one.
        matcher: of the compiled ``params.constraint``, of this answer alone.
    """

    __slots__ = ("_bias", "_end_ids", "_ends", "_key", "_matcher", "_seen", "num_drawn", "params", "plain")

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        seed: int,
        index: int = 0,
        end_ids: Collection[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        if params.constraint is not None and matcher is None:
            raise ValueError("a request with a constraint needs a matcher")
        self.params = params
        self.num_drawn = 0
        self._key = stream_key(seed, index)
        self._end_ids = frozenset(end_ids)
        self._ends = np.array(sorted(self._end_ids), np.int64)
        self._matcher = matcher
        penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
        self._seen = _Seen(prompt if params.repetition_penalty != 1 else ()) if penalised else None
        self._bias = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self._bias = (np.array(ids, np.int64), np.array(values, np.float32))
        # Takes the best id as it stands, once min_tokens is reached.
        self.plain = params.temperature == 0 and not penalised and self._bias is None and matcher is None and params.logprobs is None

    def accept(self, token: int) -> None:
        """Take a token as the next of the answer; ``sample`` does so for what it draws.

        Raises:
            RequestError: the constraint does not allow it.
        """
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._seen is not None:
            self._seen.add(token)
        self.num_drawn += 1

    def ends(self, token: int) -> bool:
        """Return whether a token ends the answer."""
        return token in self._end_ids

    def pick(self, logits: NDArray[np.float32], best: int, maximum: float) -> int:
        """Choose the next token from one row of logits, which is overwritten.

        Args:
            logits: [used], of the ids in use.
            best: their largest one's id.
            maximum: and its value, finite.

        Raises:
            RequestError: nothing is left to choose from.
        """
        params, ids, changed = self.params, None, False
        with np.errstate(over="ignore"):
            if self._bias is not None:
                logits[self._bias[0]] += self._bias[1]
                changed = True
            if self._seen is not None:
                self._seen.penalise(logits, params)
                changed = True
        if self.num_drawn < params.min_tokens:
            logits[self._ends] = -np.inf
            changed = True
        if self._matcher is not None:
            ids = np.flatnonzero(self._matcher.allowed())
            logits, changed = logits[ids], True
        if changed:
            best = int(logits.argmax()) if logits.size else 0
            maximum = float(logits[best]) if logits.size else -math.inf
            if not math.isfinite(maximum):
                raise RequestError("no token is left to choose: bias, penalties, constraint and min_tokens together forbid all of them")
        chosen = best if params.temperature == 0 else _draw(logits, maximum, params, uniform(self._key, self.num_drawn))
        return chosen if ids is None else int(ids[chosen])


class _Seen:
    """The ids of one sequence and how often each was generated; those of the prompt alone count 0."""

    def __init__(self, prompt: Sequence[int]) -> None:
        unique = np.unique(np.asarray(prompt, np.int64))
        self._size = len(unique)
        self._slots = {token: slot for slot, token in enumerate(unique.tolist())}
        self._ids = np.zeros(self._size + 64, np.int64)
        self._ids[: self._size] = unique
        self._counts = np.zeros(self._size + 64, np.float32)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, self._size)
        if slot == self._size:
            if slot == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * slot), np.resize(self._counts, 2 * slot)
            self._ids[slot], self._counts[slot] = token, 0
            self._size += 1
        self._counts[slot] += 1

    def penalise(self, logits: NDArray[np.float32], params: SamplingParams) -> None:
        ids, counts, factor = self._ids[: self._size], self._counts[: self._size], params.repetition_penalty
        values = logits[ids]
        if factor != 1:
            values = np.where(values > 0, values / factor, values * factor)
        values -= counts * params.frequency_penalty + (counts > 0) * np.float32(params.presence_penalty)
        logits[ids] = values


def sample(
    logits: NDArray[np.float32],
    states: Sequence[SamplerState],
    *,
    num_tokens: int,
    drafts: Sequence[Sequence[int]] | None = None,
    best: Best | None = None,
) -> list[Drawn]:
    """Choose the next tokens of every sequence; its state accepts them.

    With drafts, a sequence has a row for its next token and one more per draft token, each computed as if the draft up to there were the
    answer. Every position is drawn with its own random number as without a draft; drawing goes on while the draft holds the drawn token. So
    the first wrong draft token costs its rows and no more, and the answer is the same.

    Args:
        logits: [rows, vocab], one row per sequence, or the rows of its draft, in order; overwritten.
        states: of each sequence.
        num_tokens: ids in use; the padding of the vocabulary above them is never chosen.
        drafts: of each sequence, perhaps empty; None: no drafts.
        best: of every row over the ids in use, where they are known.

    Returns:
        what each sequence gained. Log-probabilities are over the whole row of ``logits``, padding included, as in training, before all
        that was asked for. One sequence's error leaves the others as they would be.

    Raises:
        NotFinite: a row holds NaN or +inf, or nothing finite; nothing has been drawn or overwritten then.
    """
    used = logits[:, :num_tokens]
    if best is None:
        ids = used.argmax(axis=1)  # the first of equals, so ties go to the lowest id
        maxima = used[np.arange(len(used)), ids]
    else:
        ids, maxima = best
    first_rows = list(range(len(states) + 1))
    if drafts is not None:
        first_rows = np.cumsum([0, *(1 + len(draft) for draft in drafts)]).tolist()
    finite = np.isfinite(maxima)
    if not finite.all():
        raise NotFinite(np.unique(np.searchsorted(first_rows, np.flatnonzero(~finite), side="right") - 1).tolist())
    best_ids, best_values = ids.tolist(), maxima.tolist()
    drawn = []
    for i, state in enumerate(states):
        row = first_rows[i]
        if state.plain and first_rows[i + 1] == row + 1 and state.num_drawn >= state.params.min_tokens:
            state.num_drawn += 1
            drawn.append(Drawn((best_ids[row],)))
        else:
            rows = slice(row, first_rows[i + 1])
            drawn.append(_sequence(logits[rows], num_tokens, state, drafts[i] if drafts else (), best_ids[rows], best_values[rows]))
    return drawn


def _sequence(
    logits: NDArray[np.float32],
    num_tokens: int,
    state: SamplerState,
    draft: Sequence[int],
    best: Sequence[int],
    maxima: Sequence[float],
) -> Drawn:
    """Draw along the rows of one sequence until a drawn token is not the draft's, or ends the answer."""
    num_top = state.params.logprobs
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    for row, maximum in enumerate(maxima):
        own = None if num_top is None else logits[row].copy()
        try:
            token = state.pick(logits[row, :num_tokens], best[row], maximum)
            state.accept(token)
        except RequestError as error:
            if not tokens:
                return Drawn((), None, error)
            break  # the state has not moved: the next step meets the same error
        tokens.append(token)
        if own is not None and num_top is not None:
            logprobs.append(_logprob(own, token, num_top, num_tokens))
        if state.ends(token) or row == len(draft) or token != draft[row]:
            break
    return Drawn(tuple(tokens), None if num_top is None else tuple(logprobs))


def read_logprobs(logits: NDArray[np.float32], tokens: Sequence[int], num_top: int, *, num_tokens: int) -> list[TokenLogprob]:
    """Return the log-probability of one given token per row of ``logits`` [rows, vocab], and of the ``num_top`` best ids in use.

    Raises:
        NotFinite: a row holds NaN or +inf, or nothing finite.
    """
    finite = np.isfinite(logits[:, :num_tokens].max(axis=1))
    if not finite.all():
        raise NotFinite(np.flatnonzero(~finite).tolist())
    return [_logprob(row, token, num_top, num_tokens) for row, token in zip(logits, tokens, strict=True)]


def _logprob(logits: NDArray[np.float32], token: int, num_top: int, num_tokens: int) -> TokenLogprob:
    """Read log-probabilities off one row; exp is float32 (3e-7 of each term at most), the sum and what follows float64."""
    maximum = logits.max()
    normaliser = float(maximum) + math.log(np.exp(logits - maximum).sum(dtype=np.float64))
    chosen = float(logits[token]) - normaliser
    if num_top == 0:
        return TokenLogprob(token, chosen)
    ids = _largest(logits[:num_tokens], min(num_top, num_tokens))
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return TokenLogprob(token, chosen, tuple((int(i), float(logits[i]) - normaliser) for i in ids))


def _draw(logits: NDArray[np.float32], maximum: float, params: SamplingParams, number: float) -> int:
    """Return the position that a number in [0, 1) falls on; the row is overwritten.

    The largest logit becomes 0 first, so that no temperature, however small, overflows.
    """
    kept = _largest(logits, params.top_k) if 0 < params.top_k < logits.size else None
    weights = logits if kept is None else logits[kept]
    with np.errstate(over="ignore"):
        weights -= np.float32(maximum)
        weights *= np.float32(1 / max(params.temperature, 1e-30))
        np.exp(weights, out=weights)
    if params.top_p < 1:
        _keep_nucleus(weights, params.top_p)
    if params.min_p > 0:
        weights *= weights >= np.float32(params.min_p)
    total = float(weights.sum(dtype=np.float64))
    chosen = _position(weights, number * total)  # the first that exceeds it, so ids without weight are passed over
    return chosen if kept is None else int(kept[chosen])


def _largest(values: NDArray[np.float32], size: int) -> NDArray[np.intp]:
    """Return the positions of the ``size`` largest values, rising; of equals at the border the first ones."""
    border = np.partition(values, values.size - size)[values.size - size]
    found = np.flatnonzero(values >= border)
    return found if found.size == size else np.delete(found, _surplus(values[found], border, size))


def _keep_nucleus(weights: NDArray[np.float32], top_p: float) -> None:
    """Set to 0 all but the fewest largest weights whose share of the sum reaches ``top_p``; of equals at the border the first ones stay.

    From the least weight on, as many are left out as may be lacking. Sorting all of them takes five times as long as summing those that
    share their upper bits, which are in the order of the weights, and sorting the ones among which the border lies.
    """
    steps = weights.view(np.uint32) >> _STEP_BITS
    sums = np.cumsum(np.bincount(steps, weights))
    total = float(sums[-1])
    lacking = min((1 - top_p) * total, math.nextafter(total, 0.0))  # one weight stays at least
    step = int(np.searchsorted(sums, lacking, "right"))
    rising = np.sort(weights[steps == step])
    border = _position(rising, lacking - (float(sums[step - 1]) if step else 0.0))
    above = int(np.count_nonzero(steps > step))
    kept = weights >= rising[border]
    if np.count_nonzero(kept) > above + rising.size - border:
        kept[_surplus(weights, rising[border], above + rising.size - border)] = False
    weights *= kept


def _surplus(values: NDArray[np.float32], border: np.float32, size: int) -> NDArray[np.intp]:
    """Return the positions of the last values equal to ``border`` that are too many when ``size`` of those not below it shall stay."""
    equal = np.flatnonzero(values == border)
    above = np.count_nonzero(values > border)
    return equal[size - above :]


def _position(weights: NDArray[np.float32], goal: float) -> int:
    """Return the first position where the cumulative weight, summed in float64, exceeds ``goal``; at most the last one with weight."""
    block_sums = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64))
    goal = min(goal, math.nextafter(float(block_sums[-1]), 0.0))  # a block without weight may be the last
    block = int(np.searchsorted(block_sums, goal, "right"))
    begin = block * _BLOCK
    cumulative = np.cumsum(weights[begin : begin + _BLOCK], dtype=np.float64)
    within = goal - (float(block_sums[block - 1]) if block else 0.0)
    # Where the two ways to sum disagree in the last digit, the last one with weight is meant.
    return begin + min(int(np.searchsorted(cumulative, within, "right")), int(np.searchsorted(cumulative, cumulative[-1], "left")))
