"""`dsv2 convert`: what goes in comes out, and what does not fit is refused before anything is written."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from folders import files_of

from dsv2 import machine
from dsv2.checkpoint import huggingface
from dsv2.checkpoint.folder import open_folder
from dsv2.checkpoint.huggingface import fitting_dtype, load_model
from dsv2.checkpoint.layout import save_checkpoint
from dsv2.checkpoint.source import FolderSource
from dsv2.cli import main
from dsv2.errors import CheckpointError
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

TOKENS = torch.tensor([[5, 17, 99, 5, 2, 64, 127, 3, 3]])


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden).float()


def refused(capsys, code, *words):
    error = capsys.readouterr().err
    assert code == 2
    for word in ("error: ", *words):
        assert word in error


def test_a_run_leaves_as_a_model_folder_of_transformers(run, tmp_path, model, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["convert", str(run), "--out", str(tmp_path / "out"), "--max-shard-gb", "0.00005"]) == 0
    assert "peak memory" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert torch.allclose(theirs(TOKENS).logits, logits(model), rtol=0, atol=1e-4)
    ours = Tokenizer.load(run / "step-3")
    text = "The river, 河流 12"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) == ours.encode(text)
    assert not (tmp_path / "out" / "training").exists()


def test_there_and_back_again(run, tmp_path):
    assert main(["convert", str(run), "--out", str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(["convert", str(tmp_path / "bf16"), "--out", str(tmp_path / "again")]) == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "bf16")
    assert main(["convert", str(tmp_path / "bf16"), "--out", str(tmp_path / "fp32"), "--dtype", "fp32"]) == 0
    assert main(["convert", str(tmp_path / "fp32"), "--out", str(tmp_path / "back"), "--dtype", "bf16"]) == 0
    assert files_of(tmp_path / "back") == files_of(tmp_path / "bf16")


def test_int8_folder_is_the_int8_of_the_folder(run, tmp_path):
    assert main(["convert", str(run), "--out", str(tmp_path / "int8"), "--dtype", "int8"]) == 0
    assert fitting_dtype(tmp_path / "int8") is None
    assert torch.equal(logits(load_model(tmp_path / "int8")), logits(load_model(run / "step-3", dtype=torch.int8)))
    assert main(["generate", str(tmp_path / "int8"), "--prompt", "The", "--max-tokens", "3"]) == 0


def test_a_merge_is_the_mean(run, tmp_path, model, tokenizer):
    other = Transformer(model.config)
    initialise(other, seed=6)
    save_checkpoint(tmp_path / "other", other, tokenizer)
    out = tmp_path / "merged"
    assert main(["convert", "merge", str(run), str(tmp_path / "other"), "--weights", "0.25,0.75", "--out", str(out)]) == 0
    merged, first, second = (FolderSource(open_folder(folder)) for folder in (out, run / "step-3", tmp_path / "other"))
    for name in merged.specs:
        assert torch.allclose(merged.read(name), 0.25 * first.read(name) + 0.75 * second.read(name), atol=1e-6)


def test_random_weights_of_a_preset(tmp_path):
    assert main(["convert", "random:tour", "--out", str(tmp_path / "random")]) == 0
    assert load_model(tmp_path / "random").config.hidden_size == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "{run}"], ["2 models were given", "hint: to average them: dsv2 convert merge"]),
        (["merge", "{run}"], ["two models or more"]),
        (["{run}", "--weights", "1"], ["--weights belong to a merge"]),
        (["merge", "{run}", "{run}", "--weights", "0.9,0.2"], ["the sum 1"]),
        (["merge", "{run}", "{run}", "--weights", "a,b"], ["must be numbers"]),
        (["{run}", "--dtype", "q8_0"], ["'q8_0' is not one of a model folder", "int8"]),
        (["{run}", "--to", "gguf", "--dtype", "int8"], ["'int8' is not one of a GGUF file", "q8_0"]),
        (["{run}", "--max-shard-gb", "0"], ["must be above 0"]),
        (["nowhere"], ["nowhere holds no checkpoint"]),
        (["random:v3"], ["unknown preset 'v3'"]),
    ],
)
def test_options_that_do_not_fit(arguments, words, run, tmp_path, capsys):
    filled = [argument.format(run=run) for argument in arguments]
    refused(capsys, main(["convert", *filled, "--out", str(tmp_path / "out")]), *words)
    assert not (tmp_path / "out").exists()


def test_the_model_to_read_is_not_overwritten(run, capsys):
    before = files_of(run)
    refused(capsys, main(["convert", str(run), "--out", str(run / "step-3")]), "is the model to read")
    assert files_of(run) == before


def test_a_changed_file_is_found_by_its_hash(run, tmp_path, capsys):
    file = run / "step-3" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    refused(capsys, main(["convert", str(run), "--out", str(tmp_path / "out")]), "is damaged: its hash is")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_differ_are_not_merged(run, tmp_path, capsys):
    shutil.copytree(run / "step-3", tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    refused(capsys, main(["convert", "merge", str(run), str(tmp_path / "other"), "--out", str(tmp_path / "out")]), "give other meanings")


def test_too_little_disk_is_refused_before_work_starts(run, tmp_path, capsys, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(100, 0, 100))
    refused(capsys, main(["convert", str(run), "--out", str(tmp_path / "out")]), "GB of disk", "--out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_too_little_memory_is_refused_before_work_starts(run, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    monkeypatch.setattr(huggingface, "available_memory", lambda: 1000)
    with pytest.raises(CheckpointError, match=r"GB of memory; 0\.0 GB are available"):
        load_model(run / "step-3")
    assert fitting_dtype(run / "step-3") == torch.int8


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_files_that_could_run_code_are_named_and_not_read(name, run, capsys):
    folder = run / "step-3"
    (folder / "model.safetensors").rename(folder / name)
    refused(capsys, main(["convert", str(folder), "--out", str(run / "out")]), "holds neither", f"hint: {name} is not read")
