"""manifest.json: the hash of every file of a folder, written last. A folder that has one is whole. Without torch."""

from collections.abc import Collection, Sequence
from pathlib import Path

from dsv2.checkpoint.folder import read_json
from dsv2.errors import CheckpointError
from dsv2.files import atomic_write_json, sha256_of
from dsv2.progress import transfer_bar

MANIFEST = "manifest.json"
FORMAT, VERSION = "dsv2-checkpoint", 1


def write_manifest(folder: Path) -> None:
    """Hash every file of a folder and write the manifest: the mark that nothing is missing."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    hashes = {str(file.relative_to(folder)): hashed for file, hashed in _hashes(files).items()}
    atomic_write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "files": hashes})


def _hashes(files: Sequence[Path]) -> dict[Path, str]:
    hashes: dict[Path, str] = {}
    with transfer_bar(sum(file.stat().st_size for file in files), "hashing") as advance:
        for file in files:
            hashes[file] = sha256_of(file)
            advance(file.stat().st_size)
    return hashes


def verify_manifest(folder: Path, names: Collection[str] | None = None) -> None:
    """Compare a folder's files with its manifest's hashes.

    Args:
        folder: holds a manifest.json.
        names: relative, of the files to compare; the manifest must list them. None: all that it lists.

    Raises:
        CheckpointError: the manifest is missing or damaged, or a file is missing or differs.
    """
    listed = listed_hashes(folder, names)
    hashes = _hashes([folder / name for name in listed])
    for name, hashed in listed.items():
        require_hash(folder / name, hashes[folder / name], hashed)


def listed_hashes(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """Return what a folder's manifest says that the SHA-256 of files should be; arguments and errors as of ``verify_manifest``."""
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("format"), manifest.get("version")
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{folder / MANIFEST}: format {found[0]!r} version {found[1]!r} is not {FORMAT!r} {VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists no files")
    names = list(files if names is None else names)
    for name in names:
        file = folder / name
        if name not in files:
            raise CheckpointError(f"{folder / MANIFEST} does not list {name}", hint="if you added the file yourself, remove manifest.json")
        if len(name) > 200 or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / MANIFEST} lists {name!r}, which is not in its folder")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
    return {name: files[name] for name in names}


def require_hash(file: Path, found: str, listed: str) -> None:
    """Raise CheckpointError unless the hash of what was read is the manifest's."""
    if found != listed:
        raise CheckpointError(
            f"{file} is damaged: its hash is {found[:12]}, the manifest says {listed[:12]}",
            hint="use another step folder or copy; if you changed the file yourself, remove manifest.json",
        )
