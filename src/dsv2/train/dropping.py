"""The recipe's side of token dropping: how much, and whose tokens never (section 2.2.4; spec 10.8)."""

import numpy as np
import torch
from pydantic import Field

from dsv2.config import Section
from dsv2.data.order import lots
from dsv2.model.dropping import Dropping


class DroppingSection(Section):
    """Device-level token dropping in training; validation and generation never drop."""

    capacity_factor: float | None = Field(
        default=None, gt=0, description="a device's budget over its average load, in each micro-batch; absent: nothing is dropped"
    )
    protected_share: float = Field(default=0.1, ge=0, le=1, description="share of the sequences whose tokens are never dropped")


def step_dropping(section: DroppingSection, *, seed: int, first_sample: int, num_samples: int, device: torch.device) -> Dropping | None:
    """Return the wish to drop of a step's batch, or None where nothing is dropped.

    Whether a sequence is protected depends on the seed and its global sample index alone: not on batch size, ranks or resumes.

    Args:
        section: how much.
        seed: of the run.
        first_sample: global index of the batch's first sequence.
        num_samples: B, its sequences.
        device: of the model.
    """
    if section.capacity_factor is None:
        return None
    drawn = lots(np.arange(first_sample, first_sample + num_samples), seed=seed)
    return Dropping(section.capacity_factor, torch.from_numpy(drawn < section.protected_share).to(device))
