"""Which number format the matrix products run in, and how torch is made to repeat itself bit for bit.

Weights, gradients, moments, router, norms' statistics and losses are fp32 in both precisions; bf16 is that of matrix products, by
autocast, so the fp32 weights are the masters and there is no second copy to keep in step.
"""

import os

import torch

from dsv2.errors import ConfigError, DataError


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
        DataError: there is no room for temporary files.
    """
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads = {threads} must be at least 1")
        torch.set_num_threads(threads)
    _set_deterministic(True)
    return torch.get_num_threads()


def require_determinism(wanted: bool) -> None:
    """Make torch refuse operations that may not repeat bit for bit, or allow them, for the rest of the process.

    On a CPU every operation of training repeats, given the number of threads. On CUDA cuBLAS needs a fixed workspace, which it reads from
    the environment when it is first used.

    Raises:
        DataError: there is no room for temporary files.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _set_deterministic(wanted)


def _set_deterministic(wanted: bool) -> None:
    try:
        torch.use_deterministic_algorithms(wanted)  # the first call loads torch's compiler, which looks for a place for its cache
    except FileNotFoundError as error:
        raise DataError(
            f"no temporary file can be written: {error.strerror}", hint="free some space, or name a folder that may be written in TMPDIR"
        ) from error
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # a debugging aid that would write every buffer twice
