"""The baseline a language model has to beat: an interpolated bigram over the same token ids, fitted by counting."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv2.data.shards import TokenShards
from dsv2.errors import DataError
from dsv2.tokenizer.tokenizer import Tokenizer

Ids = NDArray[np.integer]


@dataclass(frozen=True, slots=True, eq=False)
class InterpolatedBigram:
    """Bigram, unigram and uniform distribution interpolated with Witten-Bell weights; built with ``fit``.

    P(w)    = (c(w) + U / V)         / (N + U)       U: different tokens seen, N: tokens seen, V: vocabulary size
    P(w|h)  = (c(h,w) + T(h) * P(w)) / (c(h) + T(h))  T(h): different tokens seen after h

    A context that was never seen falls back to P(w). Every distribution sums to one over the whole vocabulary, padding ids included.

    Args:
        bos_id: id that opens a document; it is a context but never predicted, as in training.
        pair_keys: sorted ``previous * vocab_size + token`` of the pairs seen, int64.
        pair_counts: how often each was seen, int64.
        unigram: P(w), float64 [vocab_size].
        context_counts, context_types: c(h) and T(h), int64 [vocab_size].

    Witten and Bell, "The zero-frequency problem", 1991 (method C).
    """

    vocab_size: int
    bos_id: int
    pair_keys: NDArray[np.int64]
    pair_counts: NDArray[np.int64]
    unigram: NDArray[np.float64]
    context_counts: NDArray[np.int64]
    context_types: NDArray[np.int64]

    @classmethod
    def fit(cls, tokens: Ids, vocab_size: int, *, bos_id: int) -> "InterpolatedBigram":
        """Count pairs in a stream of documents, each ``BOS tokens... EOS``.

        Args:
            tokens: ids of whole documents one after the other, [num_tokens].
            vocab_size: ids are below it.
            bos_id: id that opens each document.

        Raises:
            DataError: no label in the stream, an id outside the vocabulary, or a stream that does not start with BOS.
        """
        previous, current = label_pairs(tokens, vocab_size, bos_id)
        if current.size == 0:
            raise DataError("a bigram cannot be fitted: the stream holds no token besides BOS")
        pair_keys, pair_counts = np.unique(previous * vocab_size + current, return_counts=True)
        counts = np.bincount(current, minlength=vocab_size)
        num_types = np.count_nonzero(counts)
        return cls(
            vocab_size=vocab_size,
            bos_id=bos_id,
            pair_keys=pair_keys,
            pair_counts=pair_counts,
            unigram=(counts + num_types / vocab_size) / (current.size + num_types),
            context_counts=np.bincount(previous, minlength=vocab_size),
            context_types=np.bincount(pair_keys // vocab_size, minlength=vocab_size),
        )

    def log_probabilities(self, tokens: Ids) -> NDArray[np.float64]:
        """Return ln P(token | previous token) of every label: all tokens but each document's BOS, in order.

        Args:
            tokens: whole documents, as for ``fit``.
        """
        previous, current = label_pairs(tokens, self.vocab_size, self.bos_id)
        return np.log(self._probabilities(previous, current))

    def nll(self, tokens: Ids) -> float:
        """Return the total negative log-likelihood in nats over every token but each document's BOS."""
        return -float(self.log_probabilities(tokens).sum())

    def distribution(self, previous: int) -> NDArray[np.float64]:
        """Return P(. | previous) over the vocabulary, float64 [vocab_size]."""
        return self._probabilities(np.full(self.vocab_size, previous, dtype=np.int64), np.arange(self.vocab_size))

    def _probabilities(self, previous: NDArray[np.int64], current: NDArray[np.int64]) -> NDArray[np.float64]:
        keys = previous * self.vocab_size + current
        place = np.minimum(np.searchsorted(self.pair_keys, keys), self.pair_keys.size - 1)
        pair_counts = np.where(self.pair_keys[place] == keys, self.pair_counts[place], 0)
        # An unseen context has no mass of its own; one type keeps the division defined and gives P(w) alone.
        types = np.maximum(self.context_types[previous], 1)
        return (pair_counts + types * self.unigram[current]) / (self.context_counts[previous] + types)


def label_pairs(tokens: Ids, vocab_size: int, bos_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (previous, current) of every token that is not BOS, int64.

    Raises:
        DataError: an id outside the vocabulary, or a stream that does not start with BOS.
    """
    ids = np.asarray(tokens).astype(np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise DataError(f"token ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}")
    if ids.size and ids[0] != bos_id:
        raise DataError(f"the stream starts with token {ids[0]}, not with BOS ({bos_id}): it must hold whole documents")
    is_label = ids[1:] != bos_id
    return ids[:-1][is_label], ids[1:][is_label]


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Return nats over a text as bits per byte of its UTF-8 form: comparable between tokenizers.

    Args:
        nll: total negative log-likelihood, nats.
        num_bytes: UTF-8 bytes of the text, without BOS and EOS.

    Raises:
        DataError: the text is empty.
    """
    if num_bytes <= 0:
        raise DataError(f"bits per byte of {num_bytes} bytes is not defined")
    return nll / (math.log(2.0) * num_bytes)


def bigram_bits_per_byte(train: TokenShards, held_out: TokenShards, tokenizer: Tokenizer) -> dict[str, float]:
    """Return what a bigram that saw the same tokens reaches, by domain: the bar that a model has to clear."""
    bigram = InterpolatedBigram.fit(np.concatenate(list(train.tokens())), tokenizer.vocab_size, bos_id=tokenizer.bos_id)
    return {
        domain: bits_per_byte(bigram.nll(np.concatenate(list(held_out.tokens(domain)))), held_out.num_bytes(domain))
        for domain in held_out.domains
    }
