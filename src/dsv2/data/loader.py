"""A rank's batches, as a pure function of how many samples were consumed.

Sample s of a run is row p(s mod N) of the N rows, where p is the permutation of epoch s div N. The permutation is computed, not
stored, so there is nothing to save but one integer: stop anywhere and go on from there, with any batch size and number of ranks.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Int64

from dsv2.data.batch import Batch, collate
from dsv2.data.mixture import Mixture
from dsv2.data.order import permute
from dsv2.data.packing import RowSource
from dsv2.errors import ConfigError


class Loader:
    """Shuffled rows in batches, an epoch after the other, each row once per epoch.

    Args:
        rows: what to read; a mixture says itself which row is which sample.
        seed: of the order; 0 to 2**64 - 1.
        rank: which share of every batch this process takes.
        world_size: into how many shares a batch is split.
        workers: threads that make batches ahead, one batch each; 0: whoever asks for a batch makes it. Batches are the same for any number.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, rows: RowSource | Mixture, *, seed: int, rank: int = 0, world_size: int = 1, workers: int = 1) -> None:
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed = {seed}; it can be 0 to 2**64 - 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank = {rank} of world_size = {world_size}; ranks go from 0 to world_size - 1")
        if workers < 0:
            raise ConfigError(f"workers = {workers}; it can be 0 or more")
        self.rows = rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.workers = workers

    def batch(self, consumed_samples: int, batch_size: int) -> Batch:
        """Return this rank's share of the global samples [consumed_samples, consumed_samples + batch_size).

        Rank r takes the r-th of ``world_size`` equal contiguous parts: the ranks' batches, one after the other, are the batch that a
        single process would have.

        Raises:
            ConfigError: ``batch_size`` does not split over the ranks.
        """
        if batch_size < 1 or batch_size % self.world_size:
            raise ConfigError(
                f"batch_size = {batch_size} does not split over world_size = {self.world_size}",
                hint=f"use a multiple of {self.world_size}",
            )
        share = batch_size // self.world_size
        chosen = self.row_indices(consumed_samples + self.rank * share, share)
        return collate([self.rows.row(int(index)) for index in chosen])

    def row_indices(self, first_sample: int, num_samples: int) -> Int64[np.ndarray, "samples"]:
        """Return which rows the global samples [first_sample, first_sample + num_samples) are."""
        if isinstance(self.rows, Mixture):
            return self.rows.indices(first_sample, num_samples)
        epochs, places = np.divmod(np.arange(first_sample, first_sample + num_samples, dtype=np.uint64), np.uint64(len(self.rows)))
        return permute(places, epochs, size=len(self.rows), seed=self.seed).astype(np.int64)

    def stage(self, sample: int) -> int:
        """Return in which stage of its mixture a global sample lies; 0 without one."""
        return self.rows.stage(sample) if isinstance(self.rows, Mixture) else 0

    def batches(self, consumed_samples: int, batch_sizes: Callable[[int], int]) -> Generator[Batch]:
        """Yield batches without end; each worker makes one of the next ones while the current one is used.

        The threads end with the iterator: when it is closed, dropped, or after an exception, which passes through unchanged when its batch
        is due.

        Args:
            consumed_samples: where to begin, counted over all ranks.
            batch_sizes: consumed samples -> size of the global batch that begins there; called ahead of time.
        """
        if not self.workers:
            while True:
                batch_size = batch_sizes(consumed_samples)
                yield self.batch(consumed_samples, batch_size)
                consumed_samples += batch_size
        upcoming: deque[Future[Batch]] = deque()
        known = True  # where the next batch to be submitted begins
        with ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="dsv2-loader") as threads:
            while True:
                while known and len(upcoming) <= self.workers:
                    try:
                        batch_size = batch_sizes(consumed_samples)
                        upcoming.append(threads.submit(self.batch, consumed_samples, batch_size))
                        consumed_samples += batch_size
                    except Exception as error:
                        upcoming.append(_failed(error))
                        known = False
                yield upcoming.popleft().result()


def _failed(error: Exception) -> Future[Batch]:
    future: Future[Batch] = Future()
    future.set_exception(error)
    return future


def sequential_batches(rows: RowSource, batch_size: int) -> Iterator[Batch]:
    """Yield every row once, in order: for evaluation. The last batch may be smaller."""
    for first in range(0, len(rows), batch_size):
        yield collate([rows.row(index) for index in range(first, min(first + batch_size, len(rows)))])
