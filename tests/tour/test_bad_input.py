"""What users get wrong: a clear error, exit code 2, and nothing half-written."""

import errno
import gzip
import json
import shutil
from pathlib import Path

import pytest

from dsv2 import files
from dsv2.cli import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with tokenizer/, train/ and validation/ of a little text."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    sentences = [f"The {n} quick brown foxes jump over {n * 7} lazy dogs while it rains in town number {n}. " for n in range(400)]
    text.write_text("".join(json.dumps({"text": "".join(sentences[n : n + 8]), "domain": "en"}) + "\n" for n in range(0, 400, 8)))
    assert main(["tokenizer", str(text), "--out", str(folder / "data/tokenizer"), "--vocab-size", "512"]) == 0
    for split in ("train", "validation"):
        assert main(["prepare", str(text), "--tokenizer", str(folder / "data/tokenizer"), "--out", str(folder / "data" / split)]) == 0
    return folder / "data"


def pretrain(corpus: Path, out: Path, *overrides: str) -> int:
    return main(["pretrain", "tour-smoke", "run.tokens=2048", *overrides, "--data", str(corpus), "--out", str(out)])


def refused(capsys: pytest.CaptureFixture, code: int, *words: str) -> None:
    message = capsys.readouterr().err
    assert code == 2
    assert "error: " in message
    for word in words:
        assert word in message


def test_unknown_recipe_key_names_the_nearest(corpus, tmp_path, capsys):
    refused(capsys, pretrain(corpus, tmp_path / "run", "learning_rate.warmup_step=3"), "learning_rate.warmup_step", "warmup_steps")
    assert not (tmp_path / "run").exists()


def test_unknown_model_field_names_the_nearest(corpus, tmp_path, capsys):
    refused(capsys, pretrain(corpus, tmp_path / "run", "model.overrides.hidden_sizes=64"), "hidden_sizes", "'hidden_size'")
    assert not (tmp_path / "run").exists()


def test_experts_that_do_not_split_into_groups(corpus, tmp_path, capsys):
    refused(capsys, pretrain(corpus, tmp_path / "run", "model.overrides.n_group=3"), "n_routed_experts = 4", "n_group = 3", "multiple of 3")
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_split_into_micro_batches(corpus, tmp_path, capsys):
    refused(capsys, pretrain(corpus, tmp_path / "run", "batch.micro_sequences=3"), "batch.sequences = 8", "multiple of 3")
    assert not (tmp_path / "run").exists()


def test_truncated_shard(corpus, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(corpus, broken)
    shard = next((broken / "train").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(capsys, pretrain(broken, tmp_path / "run"), shard.name, "cut off", "expected")
    assert not (tmp_path / "run").exists()


def test_full_disk_leaves_the_last_checkpoint(corpus, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    import dsv2.checkpoint.layout as layout

    real = layout.save_tensors

    def full(path, tensors):
        if "step-4" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, tensors)

    monkeypatch.setattr(layout, "save_tensors", full)
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)
    refused(capsys, pretrain(corpus, run, "run.tokens=6144"), "disk is full", "free some space")
    assert sorted(path.name for path in run.glob("*step*")) == ["step-4"]
    monkeypatch.setattr(layout, "save_tensors", real)
    resumed = ["pretrain", "tour-smoke", "run.tokens=6144", "--data", str(corpus), "--out", str(run), "--resume"]
    assert main(resumed) == 0
    assert (run / "step-12" / "manifest.json").is_file()


def test_a_finished_run_is_not_overwritten(corpus, tmp_path, capsys):
    assert pretrain(corpus, tmp_path / "run") == 0
    capsys.readouterr()
    refused(capsys, pretrain(corpus, tmp_path / "run"), "already holds a run", "--resume")
    changed = ["pretrain", "tour-smoke", "run.tokens=4096", "--data", str(corpus), "--out", str(tmp_path / "run"), "--resume"]
    refused(capsys, main(changed), "another recipe", "run.tokens (2048 then, 4096 now)")


@pytest.mark.parametrize("verb", ["tokenizer", "prepare"])
@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.txt", b"  \n", "no document"),
        ("junk.txt", bytes(range(256)) * 64, "junk.txt"),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 9, "byte offset 3"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "hello"}\n' * 999, mtime=0)[:-30], "cut.jsonl.gz"),
        ("bad.jsonl", b'{"text": "hello"}\n{"text": \n', "bad.jsonl:2"),
    ],
    ids=["empty", "junk", "latin-1", "cut", "bad-line"],
)
def test_damaged_or_empty_text(corpus, tmp_path, capsys, verb, name, content, word):
    (tmp_path / name).write_bytes(content)
    options = ["--tokenizer", str(corpus / "tokenizer")] if verb == "prepare" else []
    code = main([verb, str(tmp_path / name), *options, "--out", str(tmp_path / "out")])
    refused(capsys, code, word)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_tour_of_another_size_or_name(tmp_path, capsys):
    (tmp_path / "tour.json").write_text(json.dumps({"version": 2, "size": "standard", "seed": 0, "threads": 1, "legs": {}}))
    refused(capsys, main(["tour", "--size", "smoke", "--out", str(tmp_path)]), "size = 'standard'", "--no-resume")
    refused(capsys, main(["tour", "--size", "smok", "--out", str(tmp_path)]), "'smok'", "'smoke'")


def test_a_tour_touches_no_folder_that_is_not_its_own(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    for options in ([], ["--no-resume"]):
        refused(capsys, main(["tour", "--size", "smoke", "--out", str(tmp_path), *options]), "holds other things")
    refused(capsys, main(["tour", "--size", "smoke", "--out", str(tmp_path / "new"), "--seed", "-1"]), "seed")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["data", "data/mine.txt"]


def test_resuming_what_is_not_there_or_on_other_data(corpus, tmp_path, capsys):
    resumed = ["pretrain", "tour-smoke", "run.tokens=2048", "--resume", "--out", str(tmp_path / "run"), "--data"]
    refused(capsys, main([*resumed, str(corpus)]), "holds no run to resume")
    assert pretrain(corpus, tmp_path / "run") == 0
    shutil.copytree(corpus, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "validation")
    refused(capsys, main([*resumed, str(tmp_path / "data")]), "began with other data")
    (tmp_path / "run" / "recipe.toml").unlink()
    refused(capsys, pretrain(corpus, tmp_path / "run"), "belong to an unknown run")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("learning_rate.decay_points=[60, 90]", "between 0 and 1"),
        ("batch.initial_sequences=4", "go together"),
        ("balance.device=0.1", "n_group > 1"),
        ("model.overrides.vocab_size=640", "the data's tokenizer says 512"),
        ("model.overrides.hidden_size='256'", "must be a number"),
        ("run.seq_len=512", "max_position_embeddings = 256"),
    ],
)
def test_values_that_would_be_ignored_or_fail_later(corpus, tmp_path, capsys, override, word):
    refused(capsys, pretrain(corpus, tmp_path / "run", override), word)
    assert not (tmp_path / "run").exists()


def test_a_model_larger_than_the_machine(corpus, tmp_path, capsys):
    size = ["run.seq_len=64", "model.preset=v2", "model.overrides.max_position_embeddings=64"]
    code = main(["pretrain", "tour-smoke", *size, "--data", str(corpus), "--out", str(tmp_path / "run")])
    refused(capsys, code)
    assert not (tmp_path / "run").exists()


def test_checkpoint_that_is_none(tmp_path, capsys):
    refused(capsys, main(["generate", str(tmp_path), "--prompt", "x"]), "holds no checkpoint", "dsv2 tour")
