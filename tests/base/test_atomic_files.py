"""Whatever interrupts a write, the old thing or the new thing is there, never half of one."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv2.errors import DataError
from dsv2.files import atomic_file, atomic_folder, atomic_write, atomic_write_json, disk_errors, is_disk_full, sha256_of


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def manifest(*names: str) -> str:
    return json.dumps({"format": "dsv2-test", "files": dict.fromkeys(names, "hash")})


def killed_while(code: str, folder: Path) -> None:
    """Run code in a process that ends with SIGKILL where the code says DIE."""
    program = "import os, signal, pathlib, dsv2.files as files\nfolder = pathlib.Path(os.environ['FOLDER'])\n" + code.replace(
        "DIE", "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "FOLDER": str(folder)}, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.json"
    atomic_write_json(path, {"n": "中"})
    assert path.read_text() == '{\n "n": "中"\n}\n'

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"the disk is full: could not write .*a\.json \([\d.]+ MB free\)") as caught:
        atomic_write(path, b"new")
    assert "free some space" in str(caught.value.hint)
    assert entries(path.parent) == ["a.json"]
    assert path.read_text().startswith("{")


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "shards"
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(b"1")
        (folder / "manifest.json").write_text(manifest("sub/a.bin"))
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(path) as folder:
        (folder / "manifest.json").write_text("new")
        raise RuntimeError("stop")
    assert entries(tmp_path) == ["shards"]
    assert (path / "manifest.json").read_text() == manifest("sub/a.bin")
    with atomic_folder(path) as folder:
        (folder / "manifest.json").write_text("new")
    assert entries(tmp_path) == ["shards"]
    assert entries(path) == ["manifest.json"]


@pytest.mark.parametrize("moment", ["filling", "swapping", "swapped"])
def test_kill_9_leaves_a_whole_folder_or_none_and_the_next_call_tidies_up(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "step-1"
    with atomic_folder(path) as folder:
        for name in ("manifest.json", "a", "b"):
            (folder / name).write_text("old" if name != "manifest.json" else manifest("a", "b"))
    spy = {
        "filling": "",
        "swapping": "rename = os.replace\ndef die(a, b):\n    if str(b) == str(folder): DIE\n    rename(a, b)\nos.replace = die",
        "swapped": "import shutil\ndef die(*_, **__): DIE\nshutil.rmtree = die",
    }[moment]
    inside = "DIE" if moment == "filling" else "pass"
    write = "    for name in ('manifest.json', 'a', 'b'): (new / name).write_text('new')\n"
    killed_while(f"{spy}\nwith files.atomic_folder(folder) as new:\n{write}    {inside}\n", path)
    if path.exists():
        texts = {(path / name).read_text() for name in ("a", "b")}
        assert entries(path) == ["a", "b", "manifest.json"]
        assert texts == {"old" if moment == "filling" else "new"}
    assert any(name.endswith(".tmp") for name in entries(tmp_path))
    with atomic_folder(path) as folder:
        for name in ("manifest.json", "a", "b"):
            (folder / name).write_text("again")
    assert entries(tmp_path) == ["step-1"]


def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with atomic_folder(home) as folder:  # empty: fine
        (folder / "photo.jpg").write_bytes(b"1")
    (tmp_path / "link").symlink_to(home)
    for path, says in {
        home: "holds other things: photo.jpg",
        tmp_path / "link": "holds other things",
        home / "photo.jpg": "is a file",
    }.items():
        with pytest.raises(DataError, match=says) as caught, atomic_folder(path) as folder:
            (folder / "manifest.json").write_text(manifest())
        assert "--out" in str(caught.value.hint)
    assert entries(tmp_path) == ["home", "link"]
    with atomic_folder(tmp_path / "link") as folder:  # the same names and more: a newer version, through a link too
        (folder / "photo.jpg").write_bytes(b"2")
        (folder / "manifest.json").write_text(manifest("photo.jpg"))
    assert (home / "photo.jpg").read_bytes() == b"2"
    with atomic_folder(home) as folder:  # its manifest names all that it holds
        (folder / "manifest.json").write_text(manifest())
    assert entries(home) == ["manifest.json"]


@pytest.mark.parametrize("text", ['{"name": "my web app", "files": {"thesis.txt": 1}}', "", "[]", manifest("other.txt")])
def test_a_manifest_that_does_not_name_it_protects_nothing_and_gives_nothing_away(tmp_path: Path, text: str) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text(text)
    (app / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds other things: .*thesis\.txt"), atomic_folder(app) as folder:
        (folder / "weights").write_text("")
    assert (app / "thesis.txt").read_text() == "years of work"


def test_a_second_writer_does_not_clear_away_the_first(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as first:
        (first / "x").write_text("1")
        with atomic_folder(tmp_path / "a") as second:
            (second / "x").write_text("2")
        assert (first / "x").read_text() == "1"
    assert (tmp_path / "a" / "x").read_text() == "1"
    with atomic_file(tmp_path / "f") as first:
        with atomic_file(tmp_path / "f") as second:
            second.write_text("2")
        first.write_text("1")
    assert (tmp_path / "f").read_text() == "1"
    assert entries(tmp_path) == ["a", "f"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device"])
def test_what_is_no_ordinary_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(DataError, match="is a folder|is no ordinary file"):
        atomic_write(path, "text")
    assert entries(tmp_path) == ["x"]


def test_temporary_folders_of_neighbours_are_left_alone(tmp_path: Path) -> None:
    for neighbour in (".a.b.x1.tmp", ".ab.x1.tmp", ".a.x1.tmp"):
        (tmp_path / neighbour).mkdir()
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "manifest.json").write_text("")
    assert entries(tmp_path) == [".a.b.x1.tmp", ".ab.x1.tmp", "a"]


def full_disk_of_python() -> None:
    with open("/dev/full", "wb") as file:
        file.write(b"1")


def full_disk_of_numpy() -> None:
    np.zeros(100_000).tofile("/dev/full")  # a small array would be lost without a word: numpy ignores what closing says


def full_disk_of_safetensors() -> None:  # its words of version 0.8 on a full file system; it would replace /dev/full by a file
    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_of_torch() -> None:  # its words of version 2.13
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize("write", [full_disk_of_python, full_disk_of_numpy, full_disk_of_safetensors, full_disk_of_torch])
def test_a_full_disk_is_recognised_whoever_writes(tmp_path: Path, write: object) -> None:
    assert callable(write)
    with pytest.raises(DataError, match="the disk is full: could not write .*weights"), disk_errors(tmp_path / "weights"):
        write()


def test_other_errors_pass(tmp_path: Path) -> None:
    assert not is_disk_full(ValueError("3 requested"))
    with pytest.raises(ValueError, match="bug"), disk_errors(tmp_path):
        raise ValueError("bug")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()


def test_something_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not write .*file/a: .*file: "):
        atomic_write(tmp_path / "file" / "a", "x")
    with pytest.raises(DataError, match="is a folder"):
        atomic_write(tmp_path, "x")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
