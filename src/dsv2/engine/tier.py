"""A disk tier of the latent cache: blocks that leave memory lie in files, and whoever brings the same prefix later finds them, also after
a restart.

    FOLDER/<fingerprint of what made the latents>/<key of the block>.latents = mark, SHA-256, then the block layer by layer, as in memory

The files are the index: what is there can be found, by any process, and a file's time says when it was last used. Nothing that lies there
is trusted. The hash covers fingerprint, key and latents, so a file that is cut, damaged, renamed or somebody else's is as good as none.
Files appear by renaming and are not synced: what a crash takes is computed again.
"""

import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dsv2.engine.blocks import BLOCK_LEN, KEY_BYTES
from dsv2.errors import ConfigError
from dsv2.files import locked
from dsv2.model.config import ModelConfig
from dsv2.progress import console

_MARK = b"dsv2 latents 1\n\0"
_DIGEST_BYTES = 32
_FOLDER = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"(?:[0-9a-f]{64}\.latents|\.[0-9a-f]{64}\.latents\.\w+\.tmp)")
_SHARE = 16  # the part of the limit, one in so many, that a process writes before it looks at the folder again
_UNFINISHED_S = 600  # a file that is still not renamed after so long was left by a process that died
_BURST_NS = 1_000_000_000

View = memoryview


class _Entry(NamedTuple):
    """A file of the tier, as a look at the folder finds it."""

    used_ns: int
    size: int
    path: Path


def fingerprint(config: ModelConfig, weights_id: str, dtypes: Iterable[str], kernels: str, cache: str, bytes_per_token: int) -> str:
    """Return 64 hex digits that differ wherever latents could differ.

    Args:
        config: of the model.
        weights_id: of the weights (``checkpoint.identity``).
        dtypes: of the weights in memory, in a fixed order.
        kernels: what computes the latents.
        cache: format of its entries.
        bytes_per_token: over all layers.
    """
    parts = [config.to_dict(), weights_id, list(dtypes), kernels, cache, bytes_per_token, BLOCK_LEN]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class DiskTier:
    """Blocks in files, up to a number of bytes; what was unused for longest goes first. See ``blocks.Tier``.

    Several processes may share a folder. Each may write a sixteenth of the limit before it looks at what the others wrote.
    No call but the constructor raises: where the disk is full or may not be written, storing ends with one message.

    Args:
        folder: made if it is not there. Files of other names in it are left alone.
        limit: most bytes of all files of the tier, also of other models.
        views: from a block to its memory, layer by layer: writable, the same sizes for every block.
        made_by: ``fingerprint``; None: of weights that nobody can name again. Then blocks are found by this object alone and removed at
            its end.

    Raises:
        ConfigError: the folder cannot be made, or the limit is below one block.
    """

    def __init__(self, folder: Path, limit: int, views: Callable[[int], Sequence[View]], made_by: str | None) -> None:
        self._size = len(_MARK) + _DIGEST_BYTES + sum(view.nbytes for view in views(0))
        if limit < self._size:
            raise ConfigError(
                f"disk_cache_gb = {limit / 1e9:g} holds not even one block of {BLOCK_LEN} tokens, {self._size / 1e9:.4f} GB",
                hint="raise disk_cache_gb",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"disk_cache = {folder} cannot be made: {error.strerror}", hint="name a folder that can be written"
            ) from error
        self.keeps = made_by is not None
        self._root, self._limit, self._views = folder, limit, views
        self._made_by = made_by or secrets.token_hex(32)
        self._storing = True
        self._left = 0  # bytes to write before the next look at the folder
        self._burst_ns = self._in_burst = 0

    def has(self, key: bytes) -> bool:
        """Return whether a file of the right size lies there."""
        try:
            found = os.lstat(self._path(key))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self._size

    def store(self, key: bytes, block: int) -> None:
        """Write a block, unless it is there."""
        if not self._storing:
            return
        self._burst_ns = 0
        try:
            if self.has(key):
                _mark_used(self._path(key), time.time_ns())
            elif self._size <= self._left or self._make_room():
                self._write(key, block)
                self._left -= self._size
        except OSError as error:
            self._storing = False
            message = f"the cache on disk takes no more blocks: {self._root}: {error.strerror or error}; what is there is still read"
            console().print(message, markup=False, highlight=False, soft_wrap=True, style="yellow")

    def load(self, key: bytes, block: int) -> bool:
        """Read a block; a damaged file is removed."""
        path, views, head = self._path(key), self._views(block), bytearray(len(_MARK) + _DIGEST_BYTES)
        with suppress(OSError):
            if _read(path, self._size, [memoryview(head), *views]) and head == _MARK + self._digest(key, views):
                with suppress(OSError):
                    _mark_used(path, self._stamp())
                return True
        with suppress(OSError):
            path.unlink()
        return False

    def clear(self) -> None:
        """Forget everything. Files of named weights stay, since they are true of those weights; only this object looks elsewhere."""
        self._remove_own()
        self.keeps, self._made_by = False, secrets.token_hex(32)

    def close(self, save: Callable[[], None]) -> None:
        """Let the cache be saved where it can be found again, or remove what nobody could find."""
        if self.keeps:
            save()
        self._remove_own()

    def _path(self, key: bytes) -> Path:
        assert len(key) == KEY_BYTES
        return self._root / self._made_by / f"{key.hex()}.latents"

    def _digest(self, key: bytes, views: Sequence[View]) -> bytes:
        """Return the hash of a block's latents and of whose they are; 1.7 GB/s with a processor's own instructions for it."""
        digest = hashlib.sha256(f"{self._made_by}{key.hex()}".encode())
        for view in views:
            digest.update(view)
        return digest.digest()

    def _stamp(self) -> int:
        """Return a time of use. A prefix is read from its beginning, so in a burst of reads later ones count as older: ends go first."""
        now = time.time_ns()
        if not 0 <= now - self._burst_ns < _BURST_NS:
            self._burst_ns, self._in_burst = now, 0
        self._in_burst += 1
        return self._burst_ns - self._in_burst

    def _write(self, key: bytes, block: int) -> None:
        path, views = self._path(key), self._views(block)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                for view in (memoryview(_MARK + self._digest(key, views)), *views):
                    written = 0
                    while written < view.nbytes:
                        written += file.write(view[written:])
            _mark_used(temporary, time.time_ns())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _make_room(self) -> bool:
        """Look at the folder and remove what was unused for longest until a share of the limit is free; False: another process does."""
        wanted = max(self._size, self._limit // _SHARE)
        try:
            with locked(self._root):
                entries = sorted(self._entries())
                total = sum(entry.size for entry in entries)
                for entry in entries:
                    if total + wanted <= self._limit:
                        break
                    with suppress(FileNotFoundError):
                        entry.path.unlink()
                    total -= entry.size
        except BlockingIOError:
            return False
        self._left = wanted
        return True

    def _entries(self) -> Iterable[_Entry]:
        """Yield every file of the tier; those that a dead process left unfinished are removed."""
        for folder in _listed(self._root, _FOLDER):
            for found in _listed(Path(folder.path), _FILE):
                try:
                    status = found.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # another process removed it
                if found.name.startswith(".") and time.time() - status.st_mtime > _UNFINISHED_S:
                    with suppress(FileNotFoundError):
                        os.unlink(found.path)
                    continue
                yield _Entry(status.st_mtime_ns, status.st_size, Path(found.path))

    def _remove_own(self) -> None:
        if self.keeps:
            return
        own = self._root / self._made_by
        for found in _listed(own, _FILE):
            with suppress(OSError):
                os.unlink(found.path)
        with suppress(OSError):
            own.rmdir()


def _mark_used(path: Path | str, ns: int) -> None:
    """Set a file's time; the one that the system sets by itself is up to a hundredth of a second behind."""
    os.utime(path, ns=(ns, ns))


def _read(path: Path, size: int, buffers: Iterable[View]) -> bool:
    """Fill buffers from a file of so many bytes; False where it is another kind of file or of another size."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # a pipe must not be waited for
    try:
        found = os.fstat(handle)
        whole = stat.S_ISREG(found.st_mode) and found.st_size == size
        return whole and all(os.readv(handle, [buffer]) == buffer.nbytes for buffer in buffers)
    finally:
        os.close(handle)


def _listed(folder: Path, names: re.Pattern[str]) -> list[os.DirEntry[str]]:
    """Return what is called like something of the tier; nothing where the folder is not there."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if names.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
