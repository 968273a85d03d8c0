"""What stops a run from outside and what a killed one left behind: nothing is lost, and the run ends as one left in peace."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from training_runs import recipe, require_equal, stopping_after

from dsv2.checkpoint.steps import checkpoints
from dsv2.errors import DataError
from dsv2.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A file of this process cannot grow beyond so many bytes: writing more fails, as on a full disk, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leftovers_and_other_numbers_of_workers_change_nothing(corpus, tmp_path, monkeypatch, capsys):
    peace, run = tmp_path / "peace", tmp_path / "run"
    pretrain(recipe(), corpus, peace)

    with stopping_after(5, monkeypatch):
        pretrain(recipe(loader_workers=3), corpus, run)
    assert [path.name for path in checkpoints(run)] == ["step-2", "step-4"]
    (run / ".step-6.k1.tmp").mkdir()
    (run / ".step-6.k1.tmp" / "model.safetensors").write_bytes(b"half of")
    for name in (".plan.json.k2.tmp", ".recipe.toml.k3.tmp", ".notes.k4.tmp"):
        (run / name).write_text("")
    # with capsys what is printed is kept in memory, and has no limit
    for size, what in ((20_000, r"\.safetensors|/step-6"), (100, "metrics.jsonl")):
        with no_file_above(size), pytest.raises(DataError, match=f"could not write .*({what}).*larger than a file may be here") as caught:
            pretrain(recipe(loader_workers=0), corpus, run)
        assert "raise the limit" in str(caught.value.hint)
        assert [path.name for path in checkpoints(run)] == ["step-2", "step-4"]
        assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".notes.k4.tmp"]  # that one is not ours
    pretrain(recipe(loader_workers=2), corpus, run)
    require_equal(run, peace)


def test_without_room_for_temporary_files_the_message_says_so(corpus, tmp_path):
    command = [sys.executable, "-m", "dsv2", "pretrain", "tour-smoke", "--data", str(corpus.train.folder.parent), "--out", str(tmp_path)]
    no_file = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}  # torch puts it there in this process
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_file, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: no temporary file can be written: ")
    assert "TMPDIR" in done.stderr
    assert not list(tmp_path.iterdir())
