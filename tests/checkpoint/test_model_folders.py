"""Folders in the Hugging Face layout: the same bytes after a round trip, the safetensors library as the oracle of the files."""

import json

import pytest
import torch
from folders import files_of, tiny_model, tiny_source, write_tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dsv2.checkpoint.folder import open_folder
from dsv2.checkpoint.huggingface import build_model, fill_model, load_model, plan_shards, write_model
from dsv2.checkpoint.names import is_quantised, published_shapes
from dsv2.checkpoint.shard import TensorSpec
from dsv2.checkpoint.source import AverageSource, Converted, FolderSource, ModelSource, RandomSource
from dsv2.errors import CheckpointError, ConfigError
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from reference.tiny import CONFIGS

TOKENS = torch.tensor([[0, 5, 17, 99, 5, 2, 64, 127, 3, 3]])


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["lite", "v2", "v2.5", "tied-head"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 6000])
def test_the_bytes_survive_a_round_trip(name, dtype, max_shard_bytes, tmp_path):
    first = write_tiny(tmp_path / "first", name, dtype, max_shard_bytes=max_shard_bytes)
    (tmp_path / "again").mkdir()
    write_model(tmp_path / "again", FolderSource(open_folder(first)), max_shard_bytes=max_shard_bytes)
    assert files_of(tmp_path / "again") == files_of(first)
    (tmp_path / "through-memory").mkdir()
    write_model(tmp_path / "through-memory", ModelSource(load_model(first, dtype=dtype)), max_shard_bytes=max_shard_bytes)
    assert files_of(tmp_path / "through-memory") == files_of(first)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 6000])
def test_the_library_reads_what_we_write(max_shard_bytes, tmp_path):
    source = tiny_source("v2", torch.bfloat16)
    folder = write_tiny(tmp_path / "ours", "v2", torch.bfloat16, max_shard_bytes=max_shard_bytes)
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == source.specs.keys()
    assert all(torch.equal(found[name], source.read(name)) for name in found)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes == 6000)
    if index.exists():
        written = json.loads(index.read_text())
        assert written["weight_map"].keys() == found.keys()
        assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_we_read_what_the_library_writes(tmp_path):
    """Its order, its header padding, and values that begin at odd addresses."""
    source = tiny_source("lite")
    tensors = {name: source.read(name).clone() for name in source.specs}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(source.config.to_dict()))
    read = FolderSource(open_folder(tmp_path))
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())

    header, data = (tmp_path / "model.safetensors").read_bytes()[8:].split(b"}}", 1)
    text = (header + b"}}").rstrip() + b" "
    text += b" " * (1 - len(text) % 2)  # an odd length, so that nothing is aligned
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data.lstrip(b" "))
    read = FolderSource(open_folder(tmp_path))
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())


def test_a_step_folder_of_a_run_is_an_ordinary_model_folder(tmp_path):
    model = tiny_model("v2")
    (tmp_path / "step").mkdir()
    write_model(tmp_path / "step", ModelSource(model))
    assert torch.equal(logits(load_model(tmp_path / "step")), logits(model))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_shards_hold_every_tensor_once_and_stay_small(sizes, limit):
    specs = {f"t{index}": TensorSpec("I8", (size,)) for index, size in enumerate(sizes)}
    shards = plan_shards(specs, limit)
    assert [name for shard in shards.values() for name in shard] == list(specs)
    for shard in shards.values():
        assert len(shard) == 1 or sum(spec.num_bytes for spec in shard.values()) <= limit
    assert len(set(shards)) == len(shards)
    assert (list(shards) == ["model.safetensors"]) == (len(shards) == 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_come_from_the_config_alone(name):
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(CONFIGS[name]))
    shapes = dict(published_shapes(model.config))
    assert shapes == {key: spec.shape for key, spec in ModelSource(model.to(torch.bfloat16)).specs.items()}


@pytest.mark.parametrize(("name", "tensors"), [("v2", 29_102), ("v2-lite", 5_291)])
def test_a_full_size_model_has_its_names_without_its_memory(name, tensors):
    with torch.device("meta"):
        source = ModelSource(Transformer(preset(name)))
    assert len(source.specs) == tensors
    assert source.specs["model.layers.1.mlp.experts.0.down_proj.weight"].shape[0] == source.config.hidden_size


# int8 -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lite", "v2", "tied-head"])
def test_an_int8_model_computes_what_its_rounded_weights_say(name):
    source = tiny_source(name, torch.int8)
    assert {key for key, spec in source.specs.items() if spec.dtype == "I8"} == {key for key in source.specs if is_quantised(key)}
    rounded = build_model(Converted(source, torch.float32))
    exact = logits(tiny_model(name))
    assert torch.allclose(logits(build_model(source)), logits(rounded), rtol=0, atol=1e-4)
    assert 0 < (logits(rounded) - exact).abs().max() < 0.2 * exact.abs().max()


def test_int8_survives_being_widened(tmp_path):
    source = tiny_source("v2", torch.int8)
    again = Converted(build_source(Converted(source, torch.float32)), torch.int8)
    for name, spec in source.specs.items():
        if spec.dtype == "I8":
            assert torch.equal(source.read(name).clone(), again.read(name)), name


def build_source(source):
    return ModelSource(build_model(source))


def test_an_int8_weight_that_is_not_finite_is_named():
    model = tiny_model("v2")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    source = Converted(ModelSource(model), torch.int8)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight.*not finite"):
        source.read("model.layers.1.mlp.experts.3.down_proj.weight")


# Sources ----------------------------------------------------------------------------------------------------------------------------


def test_a_mean_of_models():
    first, second = tiny_source("v2", seed=0), tiny_source("v2", seed=1)
    mean = AverageSource([first, second], [0.25, 0.75])
    for name in mean.specs:
        expected = 0.25 * first.read(name).double() + 0.75 * second.read(name).double()
        assert torch.allclose(mean.read(name).double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "weights", "says"),
    [
        ("lite", [0.5, 0.5], "the models differ in "),
        ("v2.5", [0.5, 0.5], "the models differ in rope_scaling"),
        ("v2", [0.5, 0.6], "the sum 1"),
        ("v2", [1.0], "2 models take as many weights"),
    ],
)
def test_what_has_no_mean(other, weights, says):
    with pytest.raises(ConfigError, match=says):
        AverageSource([tiny_source("v2"), tiny_source(other)], weights)


def test_random_weights_are_the_same_each_time_and_differ_by_name():
    config = ModelConfig.from_dict(CONFIGS["v2"])
    source, again = RandomSource(config), RandomSource(config)
    names = list(source.specs)
    assert all(torch.equal(source.read(name), again.read(name)) for name in names)
    a, b = (source.read(f"model.layers.1.mlp.experts.{e}.up_proj.weight") for e in (0, 1))
    assert not torch.equal(a, b)
    assert 0.5 < a.float().std() / config.initializer_range < 1.5


@pytest.mark.parametrize(("model", "says"), [("large-eps", "has shape"), ("two-dense-layers", "is missing"), ("tied-head", "is missing")])
def test_a_model_of_another_shape_is_not_filled(model, says):
    with pytest.raises(CheckpointError, match=says):
        fill_model(tiny_model(model), tiny_source("lite" if model != "large-eps" else "v2"))
