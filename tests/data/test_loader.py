import math
import threading
import time
from collections import Counter
from itertools import islice, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.data.batch import IGNORE, collate
from dsv2.data.loader import Loader, sequential_batches
from dsv2.data.order import permute
from dsv2.data.packing import PackedRow, Rows
from dsv2.errors import ConfigError


class NumberedRows(Rows):
    """Rows whose tokens are their own number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def row(self, index: int) -> PackedRow:
        assert 0 <= index < self.length
        here = np.full(3, index)
        return PackedRow(tokens=here, labels=np.array([index, index, IGNORE]), positions=np.arange(3), document_ids=np.zeros(3, np.int64))


def numbers(batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def orders(size: int, epochs: int, seed: int = 7) -> np.ndarray:
    """The permutations of several epochs, [epochs, size]."""
    places = np.tile(np.arange(size, dtype=np.uint64), epochs)
    return permute(places, np.repeat(np.arange(epochs, dtype=np.uint64), size), size=size, seed=seed).reshape(epochs, size).astype(int)


# Order ----------------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**64 - 1))
def test_every_epoch_holds_every_row_once(size, seed):
    loader = Loader(NumberedRows(size), seed=seed)
    samples = numbers(loader.batch(0, 3 * size))
    for epoch in range(3):
        assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ():
    seen = {tuple(order) for seed in (0, 1, 2, 2**63) for order in orders(100, 3, seed)}
    assert len(seen) == 12


def test_large_sizes():
    (order,) = orders(100_003, 1)
    assert np.array_equal(np.sort(order), np.arange(100_003))
    size = 10**18
    places = np.arange(10**17, 10**17 + 5000, dtype=np.uint64)
    found = permute(places, np.zeros(5000, np.uint64), size=size, seed=3)
    assert len(set(found.tolist())) == 5000
    assert found.max() < size
    assert abs(float(found.mean()) / size - 0.5) < 0.02


def chi_square(counts: np.ndarray) -> float:
    """Standard deviations by which counts differ more than independent draws would."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_rows_are_equally_likely(size):
    found = Counter(map(tuple, orders(size, 12_000).tolist()))
    assert chi_square(np.array([found[order] for order in permutations(range(size))])) < 4


@pytest.mark.parametrize("size", [7, 64, 100, 1000])
def test_places_and_neighbours_are_independent(size):
    found = orders(size, 20_000 // size + 200)
    columns = range(0, size, max(1, size // 16))
    assert chi_square(np.concatenate([np.bincount(found[:, column], minlength=size) for column in columns])) < 4
    steps = np.bincount(((found[:, 1:] - found[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert chi_square(steps) < 4


# Resume and ranks -----------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 50),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=5),
)
def test_stops_ranks_and_batch_sizes_do_not_change_the_order(size, seed, legs):
    """A run is stopped and resumed with other ranks and batch sizes (world size, samples per rank, steps): same samples."""
    consumed, seen = 0, []
    for world_size, per_rank, steps in legs:
        loaders = [Loader(NumberedRows(size), seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
        batch_size = world_size * per_rank
        iterators = [loader.batches(consumed, lambda _, batch_size=batch_size: batch_size) for loader in loaders]
        for _ in range(steps):
            seen += [number for iterator in iterators for number in numbers(next(iterator))]
        for iterator in iterators:
            iterator.close()
        consumed += batch_size * steps
    assert seen == numbers(Loader(NumberedRows(size), seed=seed).batch(0, consumed))


def test_a_batch_is_a_pure_function():
    loader = Loader(NumberedRows(30), seed=1)
    first = loader.batch(17, 8)
    loader.batch(3, 20)
    again = loader.batch(17, 8)
    assert torch.equal(first.tokens, again.tokens)
    assert numbers(first) == loader.row_indices(17, 8).tolist()


def test_batch_sizes_may_ramp():
    def batch_size(consumed: int) -> int:
        return 2 if consumed < 6 else 4

    loader = Loader(NumberedRows(30), seed=1)
    batches = [numbers(batch) for batch in islice(loader.batches(0, batch_size), 5)]
    assert [len(batch) for batch in batches] == [2, 2, 2, 4, 4]
    assert sum(batches, []) == numbers(loader.batch(0, 14))


def test_numbers_out_of_range():
    rows = NumberedRows(4)
    with pytest.raises(ConfigError, match="batch_size = 6 does not split over world_size = 4"):
        Loader(rows, seed=0, world_size=4).batch(0, 6)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        Loader(rows, seed=0).batch(0, 0)
    with pytest.raises(ConfigError, match="rank = 2 of world_size = 2"):
        Loader(rows, seed=0, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="seed = -1"):
        Loader(rows, seed=-1)
    with pytest.raises(ConfigError, match="workers = -1"):
        Loader(rows, seed=0, workers=-1)


# The prefetching threads ------------------------------------------------------------------------------------------------------------------


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dsv2-loader")]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_threads_end_with_the_iterator(workers):
    loader = Loader(NumberedRows(9), seed=0, workers=workers)
    closed, dropped = loader.batches(0, lambda _: 2), loader.batches(0, lambda _: 2)
    assert loader_threads() == []  # nothing runs before the first batch is asked for
    next(closed)
    next(dropped)
    assert 2 <= len(loader_threads()) <= 2 * workers
    closed.close()
    del dropped
    assert loader_threads() == []
    for _ in loader.batches(0, lambda _: 2):
        break
    assert loader_threads() == []


def test_without_workers_there_is_no_thread():
    iterator = Loader(NumberedRows(9), seed=0, workers=0).batches(0, lambda _: 2)
    assert [len(batch.tokens) for batch in islice(iterator, 3)] == [2, 2, 2]
    assert loader_threads() == []


class SlowRows(NumberedRows):
    """Rows that take the longer the lower their number, and notes of what was asked for and by how many at once."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.asked, self.inside, self.most = [], 0, 0
        self.lock = threading.Lock()

    def row(self, index: int) -> PackedRow:
        with self.lock:
            self.asked.append(index)
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.004 if index % 5 == 0 else 0.0)
        with self.lock:
            self.inside -= 1
        return super().row(index)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_no_batch(workers):
    rows = SlowRows(50)
    iterator = Loader(rows, seed=3, workers=workers).batches(7, lambda consumed: 2 if consumed < 31 else 4)
    batches = [numbers(batch) for batch in islice(iterator, 20)]
    iterator.close()
    assert [len(batch) for batch in batches] == [2] * 12 + [4] * 8
    assert sum(batches, []) == numbers(Loader(NumberedRows(50), seed=3).batch(7, 56))
    assert rows.most <= max(workers, 1)
    assert len(rows.asked) <= 56 + 4 * workers  # no more than one batch ahead for each


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("broken", ["sizes", "rows"])
def test_exceptions_pass_through_when_their_batch_is_due(workers, broken):
    class BrokenRows(NumberedRows):
        def row(self, index: int) -> PackedRow:
            if broken == "rows" and index in bad:
                raise ConfigError("the data are broken")
            return super().row(index)

    def batch_size(consumed: int) -> int:
        if broken == "sizes" and consumed >= 4:
            raise ConfigError("the schedule is broken")
        return 2

    loader = Loader(BrokenRows(30), seed=0, workers=workers)
    bad = loader.row_indices(4, 2)
    iterator = loader.batches(0, batch_size)
    assert numbers(next(iterator)) + numbers(next(iterator)) == loader.row_indices(0, 4).tolist()
    with pytest.raises(ConfigError, match="broken"):
        next(iterator)
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(iterator)


# Batches --------------------------------------------------------------------------------------------------------------------------------


def test_collate_keeps_each_array_in_its_place():
    rows = [PackedRow(*(np.array([10 * number + field, 0]) for field in range(4))) for number in range(3)]
    batch = collate(rows)
    fields = (batch.tokens, batch.labels, batch.positions, batch.document_ids)
    assert [tensor[:, 0].tolist() for tensor in fields] == [[field, 10 + field, 20 + field] for field in range(4)]
    assert {tensor.dtype for tensor in fields} == {torch.int64}


def test_num_labels():
    assert collate([NumberedRows(4).row(index) for index in range(4)]).num_labels == 8


def test_a_batch_splits_into_smaller_ones():
    whole = collate([NumberedRows(9).row(index) for index in range(5)])
    pieces = whole.split(2)
    assert [numbers(piece) for piece in pieces] == [[0, 1], [2, 3], [4]]
    for name in ("tokens", "labels", "positions", "document_ids"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))
    assert whole.to(torch.device("meta")).labels.device.type == "meta"


def test_sequential_batches_visit_every_row_in_order():
    assert [numbers(batch) for batch in sequential_batches(NumberedRows(5), 2)] == [[0, 1], [2, 3], [4]]
