"""Chance that is computed, not stored: the permutation that shuffles rows, one for each epoch and seed, and a lot for each sample."""

import hashlib
import json
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt64

FEISTEL_ROUNDS = 8
# Halves of 2 bits never shuffle 16 places evenly, however many rounds: 5 rows then have favourite orders.
MIN_HALF_BITS = 3
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOTTERY = np.uint64(0xD1B54A32D192ED03)  # keeps the lots apart from the order of the rows


def permute(
    places: UInt64[np.ndarray, "samples"], epochs: UInt64[np.ndarray, "samples"], *, size: int, seed: int
) -> UInt64[np.ndarray, "samples"]:
    """Return where a pseudo-random permutation, one for each epoch and seed, sends each place.

    A Feistel network permutes the next power of four; places that it sends beyond ``size`` go through it again until they come back
    (cycle walking, fewer than four turns on average from 16 rows up). No table, whatever the size.

    Args:
        places: below ``size``.
        epochs: which permutation, for each place.
        size: number of things permuted, at least 1.
        seed: 0 to 2**64 - 1.
    """
    half = np.uint64(max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = mix(mix(np.full_like(epochs, seed) + GOLDEN) + epochs * GOLDEN)
    result = places.copy()
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right, key = result[outside] >> half, result[outside] & mask, keys[outside]
        for number in range(1, FEISTEL_ROUNDS + 1):
            left, right = right, left ^ (mix(key + (right << np.uint64(8)) + np.uint64(number)) & mask)
        result[outside] = left << half | right
        outside = result >= np.uint64(size)
    return result


def lots(samples: Int64[np.ndarray, "samples"], *, seed: int) -> Float64[np.ndarray, "samples"]:
    """Return a number in [0, 1) that belongs to each global sample: the same however the samples are cut into batches and ranks.

    Args:
        samples: global sample indices, from 0.
        seed: 0 to 2**64 - 1.
    """
    mixed = mix(mix(np.full(samples.shape, seed, dtype=np.uint64) + LOTTERY) + samples.astype(np.uint64) * GOLDEN)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def canonical(value: Any) -> str:
    """Return a value of JSON as a text that is the same wherever the value stands and however its fields are ordered."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def content_lot(content: str) -> int:
    """Return 64 bits that a text alone decides, so that two of the same are on one side of every split."""
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def drawn_by_content(content: str, share: float) -> bool:
    """Tell whether a text belongs to a share of all texts: those of the lowest lots."""
    return content_lot(content) < share * 2**64


def mix(values: UInt64[np.ndarray, "samples"]) -> UInt64[np.ndarray, "samples"]:
    """Return the finalizer of SplitMix64: every input bit turns every output bit with probability 1/2."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ values >> np.uint64(31))
