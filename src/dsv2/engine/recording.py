"""What a step tells of its tokens beside the next one: log-probabilities of a prompt, routed experts."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Integer

from dsv2.engine.answer import Answer
from dsv2.engine.native import Piece
from dsv2.engine.pieces import pieces_of
from dsv2.engine.sampler import read_logprobs
from dsv2.engine.sequence import Chunk, Plan
from dsv2.engine.stack import Stack

_SCORED_ROWS = 128  # rows of logits kept at a time where a whole prompt's are wanted


def score_prompt(stack: Stack, answer: Answer, chunk: Chunk, *, num_tokens: int) -> list[Piece]:
    """Run a chunk all of whose logits are wanted but for its last rows, and read off what they say of the prompt.

    Returns:
        the rows that are left for the common step.

    Raises:
        NotFinite: logits are no numbers.
    """
    start, first = chunk.start, answer.first_scored
    end, prompt_len = start + chunk.length, chunk.seq.prompt_len
    top = answer.request.params.prompt_logprobs
    known = min(end, prompt_len - 1)  # the row of position p tells of token p + 1
    assert top is not None
    while start < known:
        wanted = max(start, first)
        stop = min(known, wanted + _SCORED_ROWS)
        rows = stack.step(pieces_of(chunk, start, stop, wanted_from=wanted), want_experts=answer.request.record_experts)
        if rows.experts is not None:
            answer.record_experts(start, list(rows.experts.transpose(1, 0, 2)))
        read = read_logprobs(rows.logits, chunk.seq.tokens[wanted + 1 : stop + 1], top, num_tokens=num_tokens)
        answer.prompt.logprobs[wanted - first :] = read  # what stood there was before a preemption
        start = stop
    return pieces_of(chunk, start) if start < end else pieces_of(chunk, end - 1)


def record_experts(plan: Plan, answers: Mapping[int, Answer], experts: Integer[np.ndarray, "layers rows chosen"]) -> None:
    """Give each answer that wants them the experts that the common step chose for its tokens."""
    row = 0
    for chunk in plan.chunks:
        answer = answers[chunk.seq.seq_id]
        first = chunk.start if not chunk.seq.all_logits else _first_left(chunk)
        length = chunk.start + chunk.length - first
        if answer.request.record_experts:
            answer.record_experts(first, list(experts[:, row : row + length].transpose(1, 0, 2)))
        row += length


def _first_left(chunk: Chunk) -> int:
    """Return the first position of a scored chunk that runs in the common step."""
    end = chunk.start + chunk.length
    return min(max(chunk.start, min(end, chunk.seq.prompt_len - 1)), end - 1)
