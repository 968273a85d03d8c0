"""Batch, the noun that travels from the data to the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dsv2.data.packing import IGNORE, PackedRow

__all__ = ["IGNORE", "Batch", "collate"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Packed rows as tensors; see :class:`~dsv2.data.packing.PackedRow` for what each holds."""

    tokens: Int64[Tensor, "batch tokens"]
    labels: Int64[Tensor, "batch tokens"]
    positions: Int64[Tensor, "batch tokens"]
    document_ids: Int64[Tensor, "batch tokens"]

    @property
    def num_labels(self) -> int:
        """Return how many places have a label: what a mean loss divides by."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))

    def split(self, rows: int) -> list["Batch"]:
        """Cut into batches of ``rows`` rows; the last may be smaller."""
        pieces = zip(*(getattr(self, name).split(rows) for name in self.__slots__), strict=True)
        return [Batch(*piece) for piece in pieces]


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Stack rows of equal length into a batch."""
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        positions=torch.from_numpy(np.stack([row.positions for row in rows])),
        document_ids=torch.from_numpy(np.stack([row.document_ids for row in rows])),
    )
