"""Which number format the matrix products run in, and how torch is made to repeat itself bit for bit."""

import torch

from dsv2.errors import ConfigError


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Return "fp32" or "bf16" for "auto", by what the device multiplies natively; a stated precision is kept."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of autocast, None for fp32."""
    return {"fp32": None, "bf16": torch.bfloat16}[precision]


def make_deterministic(threads: int | None = None) -> int:
    """Switch on torch's deterministic algorithms and fix the thread count, on which sums depend; return that count.

    Raises:
        ConfigError: fewer than one thread.
    """
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads = {threads} must be at least 1")
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # a debugging aid that would write every buffer twice
    return torch.get_num_threads()
