"""A model id is looked up by huggingface_hub; here in a cache laid out by hand, without a network."""

import shutil

import pytest
from huggingface_hub import constants

from dsv2.checkpoint.hub import fetch_model, is_model_id
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.cli import main
from dsv2.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, run, monkeypatch):
    """Return the snapshot folder of the model somebody/tiny in a hub cache that is the only place to look."""
    cached = tmp_path / "hub" / "models--somebody--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    snapshot = cached / "snapshots" / COMMIT
    shutil.copytree(run / "step-3", snapshot)
    (snapshot / "manifest.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_an_id_becomes_the_cached_folder(hub):
    assert latest_checkpoint("somebody/tiny").resolve() == hub.resolve()


def test_the_verbs_take_an_id(hub, tmp_path, capsys):
    assert main(["convert", "somebody/tiny", "--dtype", "bf16", "--out", str(tmp_path / "out")]) == 0
    assert main(["generate", "somebody/tiny", "--prompt", "The", "--max-tokens", "2"]) == 0
    assert "looking it up" in capsys.readouterr().err


def test_an_unknown_id_is_an_error_that_says_what_to_do(hub):
    with pytest.raises(CheckpointError, match=r"somebody/else could not be fetched") as caught:
        fetch_model("somebody/else")
    assert "give a local folder" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", True), ("runs/nano", False), ("runs", False), ("./a/b", False), ("/a/b", False),
        ("a/b/c", False), ("../a", False), ("a/", False),
    ],
)  # fmt: skip
def test_what_is_meant_for_the_hub(target, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()  # so runs/nano is a run that was misspelt, not a model of somebody called runs
    assert is_model_id(target) == expected
