"""Logits to tokens: temperature, then top-k, then top-p, each row by itself.

A row's token is a function of its own logits, parameters and generator: one uniform number is drawn per token and read off the row's
cumulative weights in id order. So a seeded request continues the same way whatever else is in the batch, and rounding differences
between batches matter only when the number falls within them.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2.engine.request import SamplingParams, TokenLogprob
from dsv2.errors import CheckpointError

# The nucleus is looked for among this many best tokens before the whole row is sorted (15x the time at 102,400 ids).
NUCLEUS_GUESS = 1024


class NotFinite(CheckpointError):
    """Some rows of logits are not numbers; ``rows`` says which."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__("the model's logits are not finite", hint="the weights may have diverged in training: try an earlier checkpoint")
        self.rows = rows


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """Return the request's own source of random numbers, on the CPU wherever the model is; None when it needs none."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(
    logits: Float[Tensor, "batch vocab"],
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
    *,
    num_tokens: int,
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose the next token of every row.

    Args:
        logits: float32, one row per request.
        params: of each row.
        generators: of each row, from ``make_generator``; each row with a temperature draws one number from its own.
        num_tokens: ids in use; the padding of the vocabulary above them is never chosen.

    Returns:
        the tokens, and their log-probabilities where ``params.logprobs`` asks for them (over the whole row of ``logits``, padding
        included, as in training; before temperature and filters).

    Raises:
        NotFinite: a row holds NaN or +inf, or nothing finite; nothing has been drawn then.
    """
    used = logits[:, :num_tokens]
    maxima, best = used.max(dim=-1)  # the first of equals, so ties go to the lowest id
    spoilt = [row for row, maximum in enumerate(maxima.tolist()) if not math.isfinite(maximum)]
    if spoilt:
        raise NotFinite(spoilt)
    tokens = best.tolist()
    for row, (row_params, generator) in enumerate(zip(params, generators, strict=True)):
        if generator is not None:
            tokens[row] = _draw(used[row] - maxima[row], row_params, generator)
    logprobs = [
        None if row_params.logprobs is None else _logprob(logits[row], tokens[row], row_params.logprobs, num_tokens)
        for row, row_params in enumerate(params)
    ]
    return tokens, logprobs


def _draw(logits: Float[Tensor, " vocab"], params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one id of a row whose largest logit is 0, so that no temperature, however small, overflows; the row is overwritten."""
    weights = logits.div_(max(params.temperature, 1e-30)).exp_()
    ids = None
    if 0 < params.top_k < weights.numel():
        weights, ids = weights.topk(params.top_k)
    if params.top_p < 1:
        weights, kept = _nucleus(weights, params.top_p)
        ids = kept if ids is None else ids[kept]
    if ids is not None:
        ids, order = ids.sort()  # back to id order: near-equal logits may swap ranks between batches
        weights = weights[order]
    cumulative = weights.cumsum(0, dtype=torch.float64)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()  # at most 1 - 2^-53: times the total stays below it
    # right=True: the first id whose cumulative weight exceeds the target, so ids without weight are passed over.
    chosen = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return chosen if ids is None else int(ids[chosen])


def _nucleus(weights: Float[Tensor, " kept"], top_p: float) -> tuple[Float[Tensor, " nucleus"], Int[Tensor, " nucleus"]]:
    """Return the fewest largest weights whose share of the sum reaches ``top_p``, falling, and their positions."""
    goal = top_p * weights.sum(dtype=torch.float64).item()
    largest, positions = weights.topk(min(NUCLEUS_GUESS, weights.numel()))
    cumulative = largest.cumsum(0, dtype=torch.float64)
    if cumulative[-1].item() < goal and weights.numel() > NUCLEUS_GUESS:
        largest, positions = weights.sort(descending=True)
        cumulative = largest.cumsum(0, dtype=torch.float64)
    size = int(torch.searchsorted(cumulative, goal)) + 1
    return largest[:size], positions[:size]


def _logprob(logits: Float[Tensor, " vocab"], token: int, num_top: int, num_tokens: int) -> TokenLogprob:
    """Read the log-probability of ``token`` and of the ``num_top`` best ids in use off one row."""
    normaliser = logits.logsumexp(0)
    chosen = float(logits[token] - normaliser)
    if num_top == 0:
        return TokenLogprob(token, chosen)
    top, ids = (logits[:num_tokens] - normaliser).topk(min(num_top, num_tokens))
    return TokenLogprob(token, chosen, tuple(zip(ids.tolist(), top.tolist(), strict=True)))
