"""The dtype that matrix products compute in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on, else that of ``x``.

    Products written with ``out=`` do not follow autocast by themselves; and where several products read one tensor, casting it once
    beforehand is cheaper than letting each do it.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
