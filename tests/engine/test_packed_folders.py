"""Packed folders open, and are what their manifest says where that is asked for."""

from pathlib import Path

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.checkpoint.manifest import MANIFEST
from dsv2.engine import weights
from dsv2.engine.layout import FILE
from dsv2.engine.llm import LLM
from dsv2.engine.quantize import run as quantize
from dsv2.engine.request import SamplingParams
from dsv2.engine.weights import Placement, load_packed
from dsv2.errors import CheckpointError, ConfigError
from dsv2.kernels.cpu.build import Unavailable, plan
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
try:
    plan()
except Unavailable as reason:
    pytest.skip(f"no native kernels: {reason}", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Transformer, tokenizer: Tokenizer) -> Path:
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run / "step-2", model, tokenizer)
    return run


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    quantize(str(folder), out=tmp_path / "packed", scheme="fp32")
    return tmp_path / "packed"


def change(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_packed_folder_opens(folder: Path, packed: Path) -> None:
    with LLM(packed, max_batch=2, cache="fp32", verify=True) as few, LLM(folder, verify=True) as all_:
        assert few.generate("The river", GREEDY)[0].tokens == all_.generate("The river", GREEDY)[0].tokens
    with pytest.raises(ConfigError, match="packed"):
        LLM(packed, dtype="bf16")


@pytest.mark.parametrize("placement", ["memory", "mapped"])
@pytest.mark.parametrize("place", ["header", "tensor", "end"])
def test_a_damaged_packed_file_is_found_where_that_is_asked_for(
    packed: Path, placement: Placement, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_READ", 1000)  # a tensor in several pieces
    content = (packed / FILE).read_bytes()
    load_packed(packed, placement=placement, verify=True)
    # the header stays readable: its metadata name another format
    change(packed / FILE, {"header": content.index(b'"pt"') + 1, "tensor": len(content) // 2, "end": -1}[place])
    load_packed(packed, placement=placement)
    with pytest.raises(CheckpointError, match="its hash is"):
        load_packed(packed, placement=placement, verify=True)


def test_without_a_manifest_nothing_can_be_verified(folder: Path, packed: Path) -> None:
    (packed / MANIFEST).unlink()
    LLM(packed).close()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        LLM(packed, verify=True)
