"""Writing to disk so that nothing is ever half there, and hashing what was written."""

import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dsv2.errors import ConfigError, DataError

# What libraries say on a full disk instead of raising an OSError with ENOSPC: safetensors, numpy's tofile, torch.save.
_FULL_DISK_TEXTS = re.compile(r"No space left on device|\d+ requested and \d+ written|inline_container\.cc.* unexpected pos")

_AGAIN = "run the same command again; `dsv2 pretrain` goes on with --resume"
_IN_THE_WAY = (errno.ENAMETOOLONG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an exception of Python, numpy, safetensors or torch means a full disk or a spent quota."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _FULL_DISK_TEXTS.search(str(error)) is not None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a file where a folder should be, into a DataError that names ``path``."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if is_disk_full(error):
            free = shutil.disk_usage(existing_parent(path)).free
            raise DataError(
                f"the disk is full: could not write {path} ({free / 1e6:.1f} MB free)",
                hint=f"free some space and {_AGAIN}",
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise DataError(
                f"could not write {path}: it would be larger than a file may be here (ulimit -f: {_file_limit()})",
                hint=f"raise the limit and {_AGAIN}",
            ) from error
        if isinstance(error, OSError) and error.errno in _IN_THE_WAY:
            # the file named may also be one that is read while path is written: say which
            raise DataError(
                f"could not write {path}: {error.filename or path}: {error.strerror}", hint="choose another path with --out"
            ) from error
        raise


def _file_limit() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"


def existing_parent(path: Path) -> Path:
    """Return ``path`` or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _sync(path: Path) -> None:
    """Force a file's contents, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files and folders that killed processes left when they wrote something here.

    Args:
        folder: holds what was written; it need not exist.
        names: regular expression of the names under which it was written.
    """
    for stale in _leftovers(folder, names) if folder.is_dir() else ():
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _leftovers(folder: Path, names: str) -> Iterator[Path]:
    """Yield what killed processes left when they wrote files or folders of these names; what is being written is locked."""
    ours = re.compile(rf"\.(?:{names})\.[^.]+\.tmp")
    for entry in folder.iterdir():
        if ours.fullmatch(entry.name) and not entry.is_symlink():
            with suppress(OSError), locked(entry):
                yield entry


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Hold a folder for this process while the block runs, made if need be; it goes again if it was made here and nothing came into it.

    Raises:
        ConfigError: another process holds it. Killed or not, the lock ends with the process.
        DataError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path in reversed(missing):  # the innermost goes first
            stack.callback(_remove_if_empty, path)
        try:
            stack.enter_context(locked(folder))
        except OSError as error:  # one that only says that the file system has no locks does not stop the block
            if isinstance(error, BlockingIOError):
                raise ConfigError(f"another process works in {folder}", hint="wait for it to end, or choose another --out") from error
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file or folder for this process alone.

    Raises:
        BlockingIOError: another process holds it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)  # and with it the lock


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: a temporary file beside it, synced, then renamed over it.

    Raises:
        DataError: the disk is full or may not be written, or a folder is in the way.
    """
    with atomic_file(path, clear=False) as temporary:  # small, and several processes may write it
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path, *, clear: bool = True) -> Iterator[Path]:
    """Give a temporary file beside ``path`` to fill; sync it and rename it over ``path`` when the block ends well, else remove it.

    Args:
        path: the file to write.
        clear: first remove what a process killed inside the block left for the same path; only where no other may be writing it.

    Raises:
        DataError: the disk is full or may not be written, or a folder or device is in the way.
    """
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}", hint="choose another path with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        if clear:
            clear_leftovers(path.parent, re.escape(path.name))
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            with locked(temporary):
                yield temporary
            _sync(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to ``path`` when the block ends well, else remove it.

    A folder that is already there is replaced if all that it holds is named in its own manifest.json, one of dsv2's, or has the name of
    something in the new one. So a mistyped ``--out`` never deletes somebody's files. A process killed inside the block leaves only a hidden
    ``.NAME.*.tmp`` folder, which the next call for the same path removes.

    Args:
        path: the folder to write; a symbolic link is followed.

    Raises:
        DataError: the disk is full or may not be written, or ``path`` holds something else.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file, and a folder is to be written there", hint="choose another folder with --out")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, re.escape(path.name))
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            with locked(temporary):
                yield temporary
                for entry in temporary.rglob("*"):
                    _sync(entry)
                os.chmod(temporary, 0o755)
                _swap(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _swap(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; what was there is moved aside first, so that ``path`` is whole or absent, never half deleted."""
    aside = temporary.with_name(temporary.name.removesuffix(".tmp") + "old.tmp")
    if path.exists():
        require_replaceable(path, {entry.name for entry in temporary.iterdir()})
        os.replace(path, aside)
    os.replace(temporary, path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def require_replaceable(path: Path, new_names: Collection[str] = ()) -> None:
    """Refuse a folder that holds what dsv2 did not write there.

    Args:
        path: to be replaced; it need not exist.
        new_names: of what will lie in the new folder.

    Raises:
        DataError: something in it is neither named in its manifest nor among ``new_names``.
    """
    if not path.is_dir():
        return
    listed = _manifest_text(path / "manifest.json")
    # shards are listed without the suffixes of their two files, folders as the beginning of what they hold
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in new_names
        and not (listed and (entry.name == "manifest.json" or f'"{entry.name}"' in listed or f'"{entry.name}/' in listed))
        and f'"{entry.name.partition(".")[0]}"' not in listed
    )
    if foreign:
        raise DataError(
            f"{path} exists and would be replaced, but holds other things: {', '.join(foreign[:5])}",
            hint="choose a new or empty folder with --out",
        )


def _manifest_text(file: Path) -> str:
    """Return a manifest's text if it is one of dsv2's, else nothing."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return ""
    return text if isinstance(content, dict) and str(content.get("format")).startswith("dsv2-") else ""
