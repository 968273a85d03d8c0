"""Saving the batch on which training broke down, so that somebody can look at it."""

import io
from pathlib import Path

import numpy as np

from dsv2.data.batch import Batch
from dsv2.files import atomic_write


def save_batch(folder: Path, batch: Batch, *, step: int, first_sample: int, error: str) -> Path:
    """Write RUN/diverged-step-N.npz, whole or not at all, and return its path.

    It holds the arrays of :class:`~dsv2.data.packing.PackedRow` for the whole batch, ``sample_ids`` (global indices, by which the loader
    finds the rows again), ``step`` and ``error``. ``numpy.load(path)`` reads it; nothing in it is pickled.

    Args:
        folder: of the run.
        batch: the one that was to be learned.
        step: number of the step, from 1.
        first_sample: global index of the batch's first sequence.
        error: what was wrong.

    Raises:
        DataError: the disk is full or may not be written.
    """
    arrays = {name: getattr(batch, name).cpu().numpy() for name in ("tokens", "labels", "positions", "document_ids")}
    samples = np.arange(first_sample, first_sample + len(batch.tokens))
    content = io.BytesIO()
    np.savez_compressed(content, **arrays, sample_ids=samples, step=np.array(step), error=np.array(error))
    path = folder / f"diverged-step-{step}.npz"
    atomic_write(path, content.getvalue())
    return path
