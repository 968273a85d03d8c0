"""Which weights lie in a folder, told in milliseconds: enough to know them again, not to trust them. Without torch."""

import hashlib
import os
from pathlib import Path

from dsv2.checkpoint.manifest import MANIFEST
from dsv2.errors import CheckpointError

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file, evenly spread


def weights_id(folder: Path) -> str:
    """Return 64 hex digits that change when the weights of a folder do.

    They cover config.json, the manifest with its hashes, and of every safetensors file name, size, time of change and 64 samples of 4 KiB:
    neither an edit beneath an old manifest nor a copy with equal times passes for the same. A copy of a folder may count as another.

    Raises:
        CheckpointError: the folder holds no safetensors file, or one cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    digest = hashlib.sha256()
    try:
        for name in ("config.json", MANIFEST):
            file = folder / name
            _add(digest, name, file.read_bytes() if file.is_file() else b"")
        for file in files:
            status = file.stat()
            _add(digest, f"{file.name} {status.st_size} {status.st_mtime_ns}", _samples(file, status.st_size))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, content: bytes) -> None:
    digest.update(f"{len(name)} {name} {len(content)} ".encode())
    digest.update(content)


def _samples(file: Path, size: int) -> bytes:
    handle = os.open(file, os.O_RDONLY)
    try:
        return b"".join(os.pread(handle, _SAMPLE_BYTES, size * place // _SAMPLES) for place in range(_SAMPLES))
    finally:
        os.close(handle)
