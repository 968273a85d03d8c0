"""From what the scheduler planned to what the stack runs: a chunk's tokens, and in which reading."""

from dsv2.engine.native import Piece
from dsv2.engine.sequence import Chunk

_ONLY_ROW = range(1)


def pieces_of(chunk: Chunk, start: int, stop: int | None = None, *, wanted_from: int | None = None) -> list[Piece]:
    """Cut a chunk where its reading changes.

    Args:
        chunk: of a plan.
        start: first position to run.
        stop: position behind the last; None: the chunk's end.
        wanted_from: logits are wanted from here on; None: of the last known token and the drafts behind it, where the chunk reaches them.
    """
    seq, end = chunk.seq, chunk.start + chunk.length if stop is None else stop
    known = len(seq.tokens)
    if wanted_from is None and start + 1 == end == known:  # an answer's last token: nearly all pieces of large batches
        return [Piece(seq.tokens[start:], start, seq.blocks, end <= seq.expanded, _ONLY_ROW)]
    tokens = seq.tokens[start:end] if end <= known else [*seq.tokens[start:known], *seq.draft[: end - known]]
    wanted = wanted_from if wanted_from is not None else known - 1
    border = seq.expanded
    cuts = [start, border, end] if start < border < end else [start, end]
    return [
        Piece(tokens[first - start : last - start], first, seq.blocks, last <= border, range(max(0, wanted - first), last - first))
        for first, last in zip(cuts, cuts[1:], strict=False)
    ]
