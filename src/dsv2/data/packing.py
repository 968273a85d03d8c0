"""Packed rows: the stream of all documents chopped into rows of equal length, without a token that is not used.

    stream   <bos> a b <eos> <bos> c d e <eos> | seq_len 4
    row 0    <bos> a b <eos>      labels  a b <eos> -      positions 0 1 2 3    document_ids 0 0 0 0
    row 1    <bos> c d e          labels  c d e <eos>      positions 0 1 2 3    document_ids 0 0 0 0
    row 2    <eos> . . .          labels  - - - -          positions 0 0 1 2    document_ids 0 1 1 1     (. is padding)

A row's label at its last place is the first token of the next row, so that every token but each document's BOS is a label exactly
once in an epoch. What a document holds before a row begins is not seen from that row.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from dsv2.data.shards import TokenShards
from dsv2.errors import ConfigError

IGNORE = -100  # label of a place whose prediction does not count; what torch's cross_entropy ignores


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row of training data.

    Attributes:
        tokens: ids; padding is EOS.
        labels: the next token of the same document, :data:`IGNORE` where there is none.
        positions: place within the part of the document that this row holds; attention and RoPE go by it.
        document_ids: number of the document within the row, from 0; padding is a document of its own. A token attends only to its own.
    """

    tokens: Int64[np.ndarray, "tokens"]
    labels: Int64[np.ndarray, "tokens"]
    positions: Int64[np.ndarray, "tokens"]
    document_ids: Int64[np.ndarray, "tokens"]


@runtime_checkable
class RowSource(Protocol):
    """Rows of equal length that are made when they are asked for: of documents, or of conversations."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def row(self, index: int) -> PackedRow:
        """Return row ``index``."""
        ...


class Rows:
    """All rows of some shards; any one is made in constant time and memory.

    Rows run on from one shard and one domain to the next; only the last row is padded.

    Args:
        shards: where the tokens lie.
        seq_len: T, tokens in a row.
        domain: use only this one.

    Raises:
        ConfigError: ``seq_len`` is below 1.
        DataError: there is no such domain.
    """

    def __init__(self, shards: TokenShards, seq_len: int, domain: str | None = None) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len = {seq_len}; a row holds at least 1 token")
        self.seq_len = seq_len
        self._shards = shards.shards(domain)
        self._pad_id = shards.manifest.eos_id
        # _bounds[i] is where shard i begins in the stream of all tokens; the last entry is its end.
        self._bounds = np.cumsum([0, *(shard.entry.num_tokens for shard in self._shards)], dtype=np.int64)

    def __len__(self) -> int:
        return -(-int(self._bounds[-1]) // self.seq_len)

    def row(self, index: int) -> PackedRow:
        """Return row ``index``.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        length = self.seq_len
        # One place more than the row has: the label of its last token.
        tokens, starts = self._read(index * length, length + 1)
        places = np.arange(length)
        is_padding = places >= self._bounds[-1] - index * length
        labels = np.where(starts[1:] | is_padding, IGNORE, tokens[1:])
        starts[0] = True
        return PackedRow(
            tokens=tokens[:length],
            labels=labels,
            positions=places - np.maximum.accumulate(np.where(starts[:length], places, 0)),
            document_ids=np.cumsum(starts[:length]) - 1,
        )

    def _read(self, begin: int, length: int) -> tuple[Int64[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]:
        """Return a piece of the stream, and True where a document begins; beyond the end it is one document of padding."""
        end = begin + length
        tokens = np.full(length, self._pad_id, dtype=np.int64)
        starts = np.zeros(length, dtype=bool)
        first = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        for shard, low in zip(self._shards[first:], self._bounds[first:], strict=False):
            if low >= end:
                break
            piece = shard.tokens[max(begin - low, 0) : end - low]
            at = max(low - begin, 0)
            tokens[at : at + len(piece)] = piece
            edges = shard.document_starts
            inside = edges[np.searchsorted(edges, begin - low) : np.searchsorted(edges, end - low)]
            # A shard's last edge is the first document of the next shard, or the beginning of the padding.
            starts[inside + low - begin] = True
        return tokens, starts
