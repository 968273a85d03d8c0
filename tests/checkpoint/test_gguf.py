"""The GGUF file read back: keys, tensors, values, what is refused and what is said. parity/test_gguf_llamacpp.py has llama.cpp read it."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv2 import machine
from dsv2.checkpoint import gguf as export
from dsv2.checkpoint.gguf import export_gguf, stored_tensors
from dsv2.checkpoint.gguf_metadata import groups_matter, leading_dense_layers, notices
from dsv2.checkpoint.names import published_shapes
from dsv2.checkpoint.source import Converted, ModelSource, RandomSource, Source
from dsv2.errors import CheckpointError, ConfigError, DataError, MissingExtra
from dsv2.model.config import ModelConfig
from dsv2.model.router import route
from dsv2.presets import preset
from dsv2.tokenizer.chat import chat_template
from dsv2.tokenizer.specials import MARKERS
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer
from reference.subject import our_model
from reference.tiny import CONFIGS, LITE, V2, YARN, random_state

gguf = pytest.importorskip("gguf")

# Rows that 32 divides, but for those of o_proj (2 heads of 10).
WIDE = {
    **V2, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32,
}  # fmt: skip


def source_of(config: Mapping[str, object]) -> Source:
    return ModelSource(our_model(random_state(config), config, torch.float32))


@pytest.fixture(scope="module")
def wide() -> Source:
    return source_of(WIDE)


@pytest.fixture
def written(tmp_path: Path, wide: Source):
    def write(kind: str = "f32", source: Source = wide, tokenizer: Tokenizer | None = None) -> "gguf.GGUFReader":
        export_gguf(source, tmp_path / "m.gguf", kind=kind, tokenizer=tokenizer, name="mine")
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
        return gguf.GGUFReader(tmp_path / "m.gguf")

    return write


def keys(reader: "gguf.GGUFReader") -> dict[str, object]:
    return {name.removeprefix("deepseek2."): field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def arrays(reader: "gguf.GGUFReader") -> dict[str, np.ndarray]:
    """Values as float32 in the shape that numpy gives them: outermost axis first."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]) for t in reader.tensors}


def types(reader: "gguf.GGUFReader") -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


# Keys -------------------------------------------------------------------------------------------------------------------------------


def test_keys_of_a_v2_shape(written):
    found = keys(written())
    expected = {
        "general.architecture": "deepseek2", "general.name": "mine", "general.file_type": 0,
        "vocab_size": 320, "context_length": 163840, "embedding_length": 64, "block_count": 3, "leading_dense_block_count": 1,
        "feed_forward_length": 96, "attention.head_count": 2, "attention.head_count_kv": 1, "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 64, "attention.key_length": 72, "attention.value_length": 64, "attention.key_length_mla": 40,
        "attention.value_length_mla": 10, "rope.dimension_count": 8, "rope.freq_base": 10000.0, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096, "expert_count": 8, "expert_used_count": 3,
        "expert_shared_count": 2, "expert_feed_forward_length": 32, "expert_weights_scale": 16.0, "expert_weights_norm": False,
        "expert_gating_func": 1, "expert_group_count": 2, "expert_group_used_count": 1, "tokenizer.ggml.pre": "deepseek-llm",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert found["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert found["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)


def test_keys_that_a_lite_shape_lacks(written):
    found = keys(written(source=source_of(LITE)))
    assert not [name for name in found if name.startswith("rope.scaling") or "group" in name or "q_lora" in name]


def test_a_dense_model_has_no_expert_count(written):
    shape = {"n_routed_experts": None, "num_hidden_layers": 2, "vocab_size": 320}
    found = keys(written(source=RandomSource(ModelConfig.from_dict({**LITE, **shape}))))
    assert found["leading_dense_block_count"] == found["block_count"] == 2
    assert "expert_count" not in found and found["expert_shared_count"] == 0


# Tensors ----------------------------------------------------------------------------------------------------------------------------


def test_values_of_every_tensor(written, wide):
    found = arrays(written())
    state = {name: wide.read(name).numpy() for name in wide.specs}
    for i in range(3):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        kv_b = state[layer + "self_attn.kv_b_proj.weight"]
        key, value = found.pop(block + "attn_k_b.weight"), found.pop(block + "attn_v_b.weight")
        assert key.shape == (2, 64, 32) and value.shape == (2, 10, 64)
        for head in range(2):
            for row in range(32):
                assert (key[head, :, row] == kv_b[head * 42 + row]).all()
            for row in range(10):
                assert (value[head, row] == kv_b[head * 42 + 32 + row]).all()
        for kind in ("gate", "up", "down") if i else ():
            stack = found.pop(f"{block}ffn_{kind}_exps.weight")
            assert len(stack) == 8
            assert all((stack[e] == state[f"{layer}mlp.experts.{e}.{kind}_proj.weight"]).all() for e in range(8))
            assert (found.pop(f"{block}ffn_{kind}_shexp.weight") == state[f"{layer}mlp.shared_experts.{kind}_proj.weight"]).all()
        for theirs, ours in {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_output": "self_attn.o_proj",
            **({"ffn_gate_inp": "mlp.gate"} if i else {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}),
        }.items():  # fmt: skip
            assert (found.pop(f"{block}{theirs}.weight") == state[f"{layer}{ours}.weight"]).all()
    for theirs, ours in {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}.items():
        assert (found.pop(f"{theirs}.weight") == state[f"{ours}.weight"]).all()
    assert found == {}


@pytest.mark.parametrize("name", ["lite", "v2", "two-dense-layers", "tied-head"])
def test_every_published_tensor_goes_somewhere(name):
    config = ModelConfig.from_dict(CONFIGS[name])
    stored = list(stored_tensors(config, "bf16"))
    parts = [part for tensor in stored for part in tensor.parts if not tensor.name.endswith("attn_v_b.weight")]
    assert sorted(parts) == sorted(name for name, _ in published_shapes(config))
    assert ("output.weight" in {tensor.name for tensor in stored}) == (name != "tied-head")


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_kinds_round_as_torch_does(written, kind, dtype):
    full, half = arrays(written()), written(kind)
    for name, values in arrays(half).items():
        exact = types(half)[name] == "F32"
        assert exact == (name.endswith("norm.weight") or "ffn_gate_inp" in name)
        assert (values == (full[name] if exact else torch.from_numpy(full[name].copy()).to(dtype).float().numpy())).all()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_kinds_stay_within_a_step_of_32_values(written, kind):
    full, reader = arrays(written()), written(kind)
    found, names = arrays(reader), types(reader)
    for name, values in full.items():
        if names[name] == "F32":
            assert name.endswith("norm.weight") or "ffn_gate_inp" in name
            assert (found[name] == values).all()
        elif names[name] == "BF16":
            assert name.endswith("attn_output.weight")  # rows of 20
        else:
            assert names[name] == ("Q8_0" if name == "output.weight" else kind.upper())
            # half a step; a whole one in q4_0, whose levels are -8 to 7; and the scale is rounded to f16
            levels, share = (127, 0.5) if names[name] == "Q8_0" else (8, 1.0)
            blocks, read = values.reshape(-1, 32), found[name].reshape(-1, 32)
            step = np.abs(blocks).max(axis=1, keepdims=True) / levels
            assert (np.abs(blocks - read) <= step * (share + levels * 2**-11)).all()


def test_a_tied_head_is_finer_than_q4_0(written):
    tied = RandomSource(ModelConfig.from_dict({**WIDE, "tie_word_embeddings": True}))
    assert types(written("q4_0", tied))["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_pieces_of_any_size_give_the_same_file(tmp_path, wide, monkeypatch, kind):
    for name, piece in {"a": 1 << 22, "b": 1, "c": 640}.items():
        monkeypatch.setattr(export, "_PIECE_VALUES", piece)
        export_gguf(wide, tmp_path / name, kind=kind, tokenizer=None, name="m")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_int8_rows_are_expanded(written, wide):
    quantised = Converted(wide, torch.int8)
    found = arrays(written(source=quantised))
    expected = Converted(quantised, torch.float32).read("model.layers.1.mlp.experts.3.up_proj.weight").numpy()
    assert (found["blk.1.ffn_up_exps.weight"][3] == expected).all()


# Tokenizer --------------------------------------------------------------------------------------------------------------------------


def test_tokens_merges_and_placeholders(written):
    tokenizer = train_tokenizer(["the river runs to the sea, the river runs"] * 3, vocab_size=384)
    source = RandomSource(ModelConfig.from_dict({**LITE, "vocab_size": 384}))
    found = keys(written(source=source, tokenizer=tokenizer))
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 384
    assert [tokens[tokenizer.special_ids[marker]] for marker in MARKERS] == list(MARKERS)
    assert {kinds[tokenizer.special_ids[marker]] for marker in MARKERS} == {3}, "a user's text must not become a marker"
    plain = tokenizer.num_tokens - len(MARKERS)
    assert set(kinds[:plain]) == {1} and set(kinds[tokenizer.num_tokens :]) == {5}
    merges = found["tokenizer.ggml.merges"]
    assert len(merges) == plain - 243
    assert all("".join(merge.split(" ")) == tokens[243 + rank] for rank, merge in enumerate(merges))
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_id and found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.padding_token_id"] == tokenizer.eos_id
    assert found["tokenizer.ggml.fim_suf_token_id"] == tokenizer.special_ids[MARKERS[2]]
    assert found["tokenizer.chat_template"] == chat_template("v2.5")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, wide):
    with pytest.raises(ConfigError, match="tokens, the model's vocab_size is 320"):
        tokenizer = train_tokenizer([str(chr(n)) * 2 for n in range(0x4E00, 0x4E80)], vocab_size=512)
        export_gguf(wide, tmp_path / "m.gguf", kind="f32", tokenizer=tokenizer, name="m")


def test_markers_outside_the_vocabulary_are_refused(tmp_path):
    config = ModelConfig.from_dict({**LITE, "eos_token_id": 128})
    with pytest.raises(ConfigError, match="eos_token_id = 128 must be below vocab_size = 128"):
        export_gguf(RandomSource(config), tmp_path / "m.gguf", kind="f32", tokenizer=None, name="m")


def test_without_a_tokenizer_the_vocabulary_is_bytes(written):
    found = keys(written())
    assert found["tokenizer.ggml.tokens"][:4] == [MARKERS[0], MARKERS[1], "!", '"']
    assert sorted(found["tokenizer.ggml.token_type"]) == [1] * 256 + [3] * 2 + [5] * 62


# Refusals and warnings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"moe_layer_freq": 2, "num_hidden_layers": 4}, "moe_layer_freq = 2 puts dense layers between"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ({"num_hidden_layers": 600}, "num_hidden_layers = 600; at most 512"),
        ({"n_routed_experts": 2048}, "n_routed_experts = 2048; at most 1024"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale = 1.0 and mscale_all_dim = 0.707"),
        ({"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}}, "must not be 0"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor = 0.5"),
        ({"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast = 16.0"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, fields, says):
    config = ModelConfig.from_dict({**LITE, **fields})
    with pytest.raises(ConfigError, match="llama.cpp cannot run this model: .*") as refusal:
        export_gguf(RandomSource(config), tmp_path / "m.gguf", kind="bf16", tokenizer=None, name="m")
    assert says in refusal.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_frequency_that_leaves_no_gap_is_allowed():
    config = ModelConfig.from_dict({**LITE, "first_k_dense_replace": 1, "moe_layer_freq": 2})  # layers 0 and 1 dense, 2 MoE
    assert leading_dense_layers(config) == 2


def test_an_unknown_kind_is_refused(tmp_path, wide):
    with pytest.raises(ConfigError, match="'q5_k' is not written; allowed: f32, f16, bf16, q8_0, q4_0"):
        export_gguf(wide, tmp_path / "m.gguf", kind="q5_k", tokenizer=None, name="m")


def test_without_the_package_the_extra_is_named(tmp_path, wide, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match="dsv2\\[gguf\\]"):
        export_gguf(wide, tmp_path / "m.gguf", kind="f32", tokenizer=None, name="m")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, ["takes models without q_lora_rank at 26 or 27 layers only, or at 48 with 128256 tokens, and this one has 3 layers"]),
        ({"num_hidden_layers": 26}, []),
        ({"num_hidden_layers": 27}, []),
        ({"num_hidden_layers": 48}, ["llama.cpp will refuse"]),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, []),
        ({"q_lora_rank": 20}, []),
        ({"q_lora_rank": 20, "num_hidden_layers": 27}, ["it takes 27 layers for a model without q_lora_rank"]),
        ({**V2}, ["does not route like DeepSeek-V2"]),
    ],
)
def test_what_the_loader_will_do_is_said(fields, says):
    lines = list(notices(ModelConfig.from_dict({**LITE, **fields}), with_text=False))
    assert len(lines) == len(says)
    assert all(part in line for part, line in zip(says, lines, strict=True))


def test_notices_reach_stderr(written, capsys):
    written(tokenizer=train_tokenizer(["a river"], vocab_size=384), source=RandomSource(ModelConfig.from_dict({**V2, "vocab_size": 384})))
    output = capsys.readouterr()
    assert output.out == ""
    assert "declared as deepseek-llm" in output.err and "WARNING: llama.cpp does not route like DeepSeek-V2" in output.err


def test_published_models_are_exportable():
    for name, lines in {"v2": 1, "v2.5": 1, "v2-lite": 0, "coder-v2-lite": 0, "v2-lite-4k": 0}.items():
        config = preset(name)
        export.require_exportable(config)
        assert len(list(notices(config, with_text=False))) == lines


@pytest.mark.parametrize(("groups", "reachable", "chosen"), [(4, 4, 3), (4, 3, 3), (8, 3, 3), (4, 2, 3), (2, 1, 3), (16, 3, 3)])
def test_groups_matter_exactly_when_they_can_change_the_choice(groups, reachable, chosen):
    fields = {"n_routed_experts": 16, "n_group": groups, "topk_group": reachable, "num_experts_per_tok": chosen}
    limited = ModelConfig.from_dict({**V2, **fields})
    plain = limited.model_copy(update={"topk_method": "greedy"})
    logits = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert groups_matter(limited) == (not torch.equal(route(logits, limited).experts, route(logits, plain).experts))


# Whole or not at all ----------------------------------------------------------------------------------------------------------------


class Breaking:
    """A source that fails at one tensor, or spoils it."""

    def __init__(self, source: Source, value: float | None) -> None:
        self.config, self.specs, self._source, self._value = source.config, source.specs, source, value

    def read(self, name: str) -> torch.Tensor:
        values = self._source.read(name)
        if name != "model.layers.2.mlp.experts.5.down_proj.weight":
            return values
        if self._value is None:
            raise CheckpointError("cut while it was read")
        values = values.clone()
        values[3, 7] = self._value
        return values


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, wide):
    file = tmp_path / "m.gguf"
    file.write_text("old")
    (tmp_path / ".m.gguf.killed1.tmp").write_text("left by a killed process")
    with pytest.raises(CheckpointError, match="cut while"):
        export_gguf(Breaking(wide, None), file, kind="f32", tokenizer=None, name="m")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and file.read_text() == "old"


@pytest.mark.parametrize(("kind", "value"), [("f16", 70000.0), ("q8_0", float("nan")), ("q4_0", float("inf"))])
def test_values_that_the_kind_cannot_hold_are_refused_by_name(tmp_path, wide, kind, value):
    with pytest.raises(CheckpointError, match="experts.5.down_proj.weight' holds values that are not finite or beyond 65,504"):
        export_gguf(Breaking(wide, value), tmp_path / "m.gguf", kind=kind, tokenizer=None, name="m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_block_of_subnormal_values_becomes_zero_without_a_word(written, wide, kind):
    class Faint(Breaking):
        def read(self, name: str) -> torch.Tensor:
            values = self._source.read(name)
            return torch.full_like(values, 1e-42) if name == "model.embed_tokens.weight" else values

    found = arrays(written(kind, Faint(wide, None)))["token_embd.weight"]
    assert (found == 0).all()


def test_a_full_disk_is_noticed_before_the_work(tmp_path, wide, monkeypatch):
    def reads() -> Iterator[str]:
        raise AssertionError("read before the space was checked")

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(wide, "read", lambda name: next(reads()))
    with pytest.raises(DataError, match="0.0 GB are free"):
        export_gguf(wide, tmp_path / "m.gguf", kind="f32", tokenizer=None, name="m")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_refused(tmp_path, wide):
    with pytest.raises(DataError, match="is a folder"):
        export_gguf(wide, tmp_path, kind="f32", tokenizer=None, name="m")
