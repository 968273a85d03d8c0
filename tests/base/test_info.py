"""`dsv2 info`: the published figures from one command, a folder's weights from their headers, and plain words for what it cannot read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.checkpoint.names import published_shapes
from dsv2.cli import main
from dsv2.info import describe, to_json
from dsv2.info.target import find_target
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.presets import PRESETS, PUBLISHED, preset
from dsv2.tokenizer.chat import chat_template
from dsv2.tokenizer.specials import ASSISTANT, FIM_HOLE
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer

Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `dsv2 info` and return what it prints."""

    def info(*argv: object) -> str:
        assert main(["info", *map(str, argv)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return info


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run `dsv2 info` on something wrong and return the lines on stderr."""

    def info(*argv: object) -> list[str]:
        assert main(["info", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    return info


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words of text for a few merges"] * 4, vocab_size=384)


@pytest.fixture(scope="module")
def shape(tokenizer: Tokenizer) -> ModelConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return preset("tour", vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, **small)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer, shape: ModelConfig) -> Path:
    """A whole checkpoint, as a run leaves it."""
    save_checkpoint(tmp_path / "step-3", Transformer(shape), tokenizer)
    return tmp_path / "step-3"


def cells(text: str, first: str) -> list[str]:
    """The cells of the line that begins with a word."""
    return next(re.split(r"  +", line.strip()) for line in text.splitlines() if line.strip().startswith(f"{first} "))


# Presets ----------------------------------------------------------------------------------------------------------------------------


def test_the_published_figures_of_v2_with_their_formulas(say: Say) -> None:
    text = say("v2")
    assert cells(text, "total") == ["total", "235,741,434,880", "sum over the parts: number x each"]
    assert cells(text, "activated, all counted")[1] == "21,375,800,320"
    assert cells(text, "without embedding")[1:] == ["20,851,512,320", "minus V d: the convention of the paper's 21B and 2.4B"]
    assert cells(text, "without embedding, head")[1] == "20,327,224,320"
    assert cells(text, "routed expert")[1:] == ["23,592,960", "9,440", "354", "222,717,542,400", "3 d m"]
    assert cells(text, "published layout")[1] == "29,102"
    assert cells(text, "MLA")[1:] == ["2.25", "34,560", "69,120", "34,560", "25,920", "(d_c + d_h^R) l; GQA n_g = 2.25"]
    assert cells(text, "MHA")[1:] == ["128", "1,966,080", "3,932,160", "1,966,080", "1,474,560", "2 n_h d_h l"]
    assert cells(text, "GQA")[1:] == ["8", "122,880", "245,760", "122,880", "92,160", "2 n_g d_h l"]
    assert cells(text, "MQA")[1:] == ["1", "15,360", "30,720", "15,360", "11,520", "2 d_h l"]
    assert cells(text, "DeepSeek 67B in 16 bit")[1:4] == ["82.237 %", "91.118 %", "93.339 %"]
    assert cells(text, "its own MHA, same bits")[1] == "98.242 %"
    assert cells(text, "bf16, fp16")[1:3] == ["471,482,869,760", "439.10 GiB"]
    assert cells(text, "131,072") == ["131,072", "8.44 GiB", "4.22 GiB", "3.16 GiB", "documented by the release"]
    assert cells(text, "4,096")[-1] == "pre-training, before YaRN"
    assert cells(text, "163,840")[-1] == "limit of the config"
    assert "preset v2: deepseek-ai/DeepSeek-V2\nthe same config: v2-chat\n" in text


def test_the_published_figures_of_v2_lite(say: Say) -> None:
    text = say("v2-lite")
    assert cells(text, "total")[1] == "15,706,484,224"
    assert cells(text, "without embedding")[1] == "2,451,435,008"
    assert cells(text, "published layout")[1] == "5,291"
    assert cells(text, "MLA")[2:4] == ["15,552", "31,104"]
    assert cells(text, "32,768")[-1] == "documented by the release"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_reads_well_in_100_columns(name: str, say: Say) -> None:
    lines = say(name).splitlines()
    assert all(len(line) <= 100 and line == line.rstrip() for line in lines)
    assert "\x1b" not in "".join(lines)
    assert len(lines) < 90


def test_an_id_on_the_hub_is_its_preset(say: Say) -> None:
    for name, published in PUBLISHED.items():
        assert say(published.hub_id).splitlines()[0] == f"preset {name}: {published.hub_id}"


@pytest.mark.parametrize(
    ("name", "fim", "template", "tools"),
    [
        ("v2", "no", "none", "no"),
        ("v2-lite-chat", "no", "v2", "no"),
        ("coder-v2", "no", "none", "no"),
        ("coder-v2-lite-instruct", "yes", "v2", "no"),
        ("v2-chat-0628", "unknown", "v2.5", "yes"),
        ("v2.5", "yes", "v2.5", "yes"),
        ("nano", "unknown", "unknown", "unknown"),
    ],
)
def test_capabilities_of_a_release(name: str, fim: str, template: str, tools: str) -> None:
    capabilities = describe(find_target(name)).capabilities
    assert [capability.answer for capability in capabilities] == [fim, template, tools]
    assert all(capability.evidence for capability in capabilities)


def test_an_assumed_mscale_says_so(say: Say) -> None:
    assert "0.707, 0.707 assumed; not published here" in say("coder-v2")
    assert "assumed" not in say("v2.5").partition("mscale, mscale_all_dim")[2]
    assert json.loads(say("coder-v2", "--json"))["assumed"] == ["rope_scaling.mscale", "rope_scaling.mscale_all_dim"]


def test_json_holds_what_the_tables_show(say: Say) -> None:
    found = json.loads(say("v2", "--json"))
    assert found["parameters"]["total"] == 235_741_434_880
    assert found["parameters"]["activated_without_embedding"] == 20_851_512_320
    assert found["num_tensors"] == 29_102
    latent, mha, *_, other = found["caches"]
    assert (latent["kind"]["elements"], latent["kind"]["groups"], latent["num_bytes"]["6"]) == (34_560, 2.25, 25_920)
    assert (mha["kind"]["name"], other["kind"]["name"]) == ("MHA", "DeepSeek 67B")
    assert found["savings"][0]["share"]["6"] == pytest.approx(0.93339, abs=5e-6)
    assert found["savings"][1]["share"]["16"] == pytest.approx(0.9824, abs=5e-5)
    assert [context["tokens"] for context in found["contexts"]] == [4096, 32768, 131072, 163840]
    assert found["parts"][1]["each"] == 149_227_520
    assert found["hub_id"] == "deepseek-ai/DeepSeek-V2"
    assert found["weights"] is None and "tensors" not in found
    assert ModelConfig.from_dict(found["config"]) == preset("v2")
    shown = say("v2").replace(",", "")
    numbers = [part[key] for part in found["parts"] for key in ("each", "number", "used", "total")]
    numbers += [memory["num_bytes"] for memory in found["memory"]] + [cache["kind"]["elements"] for cache in found["caches"]]
    assert all(re.search(rf"(^|\s){number}(\s|$)", shown, re.MULTILINE) for number in numbers)


def test_every_tensor_of_236b_by_name(say: Say) -> None:
    lines = [line.split(maxsplit=1) for line in say("v2", "--tensors").splitlines()]
    assert len(lines) == 29_102
    assert [(name, tuple(json.loads(shape))) for name, shape in lines] == list(published_shapes(preset("v2")))
    listed = json.loads(say("v2-lite", "--tensors", "--json"))["tensors"]
    assert len(listed) == 5_291
    assert listed[-1] == {"name": "lm_head.weight", "shape": [102400, 2048], "dtype": None, "file": None}


# Folders ----------------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_from_its_headers(folder: Path, shape: ModelConfig, say: Say) -> None:
    text = say(folder)
    count = len(list(published_shapes(shape)))
    assert text.splitlines()[0] == str(folder)
    assert cells(text, "in files") == ["in files", f"{count}", f"{count} F32; names and shapes fit the config"]
    size = (folder / "model.safetensors").stat().st_size
    assert cells(text, "bytes on disk")[1] == f"{size:,}"
    found = json.loads(say(folder, "--json", "--tensors"))
    assert found["weights"]["num_files"] == 1
    assert found["weights"]["num_bytes"] == size
    assert found["weights"]["dtypes"] == [{"name": "F32", "num_tensors": count, "num_elements": found["parameters"]["total"]}]
    assert [(tensor["name"], tuple(tensor["shape"])) for tensor in found["tensors"]] == list(published_shapes(shape))
    assert {(tensor["dtype"], tensor["file"]) for tensor in found["tensors"]} == {("F32", "model.safetensors")}
    assert say(folder, "--tensors").splitlines()[0].split(maxsplit=2)[1:] == ["F32", "[384, 32]"]


def test_an_int8_folder_takes_the_bytes_that_were_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str], say: Say) -> None:
    assert main(["convert", "random:tour", "--dtype", "int8", "--out", str(tmp_path / "int8")]) == 0
    capsys.readouterr()
    target = find_target(str(tmp_path / "int8"))
    assert target.folder is not None
    held = sum(entry.end - entry.begin for entry in target.folder.entries.values())
    assert {memory.name: memory.num_bytes for memory in describe(find_target("tour")).memory}["int8 of dsv2"] == held
    assert cells(say(tmp_path / "int8"), "in files")[1:] == ["246", "115 I8, 115 F32, 16 BF16; int8 with their scales; they fit the config"]


def test_a_run_and_a_tour_mean_their_latest_step(folder: Path, tmp_path: Path, say: Say) -> None:
    newer = tmp_path / "run" / "pretrain" / "step-20"
    newer.parent.mkdir(parents=True)
    folder.rename(newer)
    (newer.parent / "step-3").mkdir()
    (newer.parent / "step-3" / "config.json").write_text("{}")
    (tmp_path / "run" / "tour.json").write_text("{}")
    assert say(tmp_path / "run").splitlines()[0] == str(newer)
    assert say(newer.parent).splitlines()[0] == str(newer)


def test_a_config_alone_is_enough(tmp_path: Path, say: Say) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("v2.5").to_dict()))
    text = say(tmp_path)
    assert "the same config: v2.5\nthe same, if their mscale is as assumed: v2-chat-0628, " in text
    assert cells(text, "in files")[-1] == "no safetensors here"
    assert cells(text, "tools")[1:] == ["unknown", "the folder holds no tokenizer.json"]
    text = say(tmp_path / "config.json")
    assert cells(text, "total")[1] == "235,741,434,880"
    assert cells(text, "tools")[1:] == ["unknown", "a config says nothing of it; give its folder"]


def test_a_preset_loses_against_a_folder_of_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("v2")
    assert say("v2").splitlines()[0] == "v2"


def answers(folder: Path) -> list[str]:
    return [capability.answer for capability in find_target(str(folder)).capabilities]


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_what_a_tokenizer_shows(folder: Path) -> None:
    settings, model = folder / "tokenizer_config.json", folder / "tokenizer.json"
    assert answers(folder) == ["unknown", "v2.5", "yes"]
    rewrite(settings, lambda content: content.update(chat_template=chat_template("v2")))
    assert answers(folder) == ["unknown", "v2", "no"]
    rewrite(settings, lambda content: content.update(chat_template="{{ 'User: ' }}{{ 'Assistant: ' }}"))
    assert answers(folder)[1] == "v2"
    rewrite(settings, lambda content: content.update(chat_template="<|im_start|>"))
    assert answers(folder)[1:] == ["unknown", "no"]
    rewrite(settings, lambda content: content.update(chat_template=[{"name": "default", "template": f"{{{{ '{ASSISTANT}' }}}}"}]))
    assert answers(folder)[1:] == ["v2.5", "yes"]
    rewrite(settings, lambda content: content.pop("chat_template"))
    assert answers(folder)[1:] == ["none", "no"]
    (folder / "chat_template.jinja").write_text(chat_template("v2.5"), encoding="utf-8")
    assert answers(folder) == ["unknown", "v2.5", "yes"]
    rewrite(model, lambda content: content.update(added_tokens=[t for t in content["added_tokens"] if t["content"] != FIM_HOLE]))
    assert answers(folder) == ["no", "v2.5", "yes"]
    rewrite(model, lambda content: content.update(added_tokens=[{"content": {}}, 3]))
    assert answers(folder) == ["no", "v2.5", "no"]
    settings.unlink()
    assert answers(folder)[1] == "v2.5"


# What cannot be read ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "hint"), [("v2-light", "v2-lite"), ("runs/v2.5", "v2.5"), ("v2" * 300, "v2")])
def test_neither_preset_nor_path(wrong: str, hint: str, refused: Callable[..., list[str]]) -> None:
    first, second = refused(wrong)
    assert first.startswith(f"error: {wrong!r} is neither a preset nor an existing path; presets: tour, ")
    assert second.startswith("hint: did you mean ") and (len(wrong) > 100 or repr(hint) in second)


def test_folders_and_files_that_are_no_model(folder: Path, tmp_path: Path, refused: Callable[..., list[str]]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty)[0] == f"error: {empty} holds no checkpoint: neither config.json nor a complete step-N folder"
    assert refused(folder / "model.safetensors")[0] == f"error: {folder / 'model.safetensors'} is no config.json"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"hidden_size": 32', "config.json is damaged: "),
        ("[]", "config.json is damaged: a JSON object was expected"),
        ('{"model_type": "llama"}', "model_type = 'llama' is not a DeepSeek-V2 model"),
        (json.dumps(preset("tour").to_dict() | {"hidden_sise": 32}), "config.json: unknown field 'hidden_sise' = 32"),
        ("{}", "config.json: vocab_size"),
    ],
)
def test_a_damaged_config_names_its_file(tmp_path: Path, content: str, says: str, refused: Callable[..., list[str]]) -> None:
    (tmp_path / "config.json").write_text(content)
    for target in (tmp_path, tmp_path / "config.json"):
        assert says in refused(target)[0]


def test_weights_that_do_not_fit_are_named(folder: Path, refused: Callable[..., list[str]]) -> None:
    rewrite(folder / "config.json", lambda content: content.update(hidden_size=64))
    assert "'model.embed_tokens.weight' has shape [384, 32]" in refused(folder)[0]
    rewrite(folder / "config.json", lambda content: content.update(hidden_size=32, num_hidden_layers=4))
    assert "'model.layers.3." in refused(folder)[0]
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5)
    assert "model.safetensors is damaged" in refused(folder)[0]


def test_a_description_survives_json() -> None:
    described = to_json(describe(find_target("tour")))
    assert json.loads(json.dumps(described)) == described
