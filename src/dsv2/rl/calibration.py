"""How far a reward model's probabilities can be believed: predicted against observed, in bins. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True, slots=True)
class Calibration:
    """Answers or pairs sorted by the probability that a model gave them.

    Args:
        predicted: mean probability in each bin that holds any.
        observed: share of those where it was so.
        counts: how many these are.
    """

    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def error(self) -> float:
        """Expected calibration error: |predicted - observed|, weighted by counts (C. Guo et al., 2017, eq 3)."""
        gaps = (abs(p - o) * n for p, o, n in zip(self.predicted, self.observed, self.counts, strict=True))
        return sum(gaps) / max(1, sum(self.counts))


def calibrate(probabilities: Sequence[float], outcomes: Sequence[float], *, low: float = 0.0) -> Calibration:
    """Sort predictions into ten equal bins of [``low``, 1].

    Args:
        probabilities: of the event, each.
        outcomes: 1 where it happened, else 0.
        low: smallest probability that can occur.
    """
    p, o = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    bins = np.minimum(((p - low) / (1 - low) * BINS).astype(int), BINS - 1)
    used = [index for index in range(BINS) if (bins == index).any()]
    return Calibration(
        tuple(float(p[bins == index].mean()) for index in used),
        tuple(float(o[bins == index].mean()) for index in used),
        tuple(int((bins == index).sum()) for index in used),
    )


def calibrate_margins(margins: Sequence[float]) -> Calibration:
    """Return how often the answer that a model prefers was the chosen one, by the probability that it gave it, 0.5 to 1.

    Args:
        margins: reward of the chosen answer less that of the rejected one; half of a tie counts.
    """
    m = np.asarray(margins, dtype=float)
    return calibrate((1 / (1 + np.exp(-np.abs(m)))).tolist(), ((np.sign(m) + 1) / 2).tolist(), low=0.5)
