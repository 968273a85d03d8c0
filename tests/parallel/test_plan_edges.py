"""`dsv2 plan` asked for what is odd, extreme or impossible: an answer or a reason, never a traceback, and no label that is not so."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.cli import main
from dsv2.errors import ConfigError
from dsv2.parallel.hardware import load_hardware
from dsv2.plan.options import read_serve, read_train
from dsv2.plan.sheet import Answer, show
from dsv2.plan.what_if import what_if
from dsv2.presets import preset, same_shape


def plan(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    assert main(["plan", *words.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def text(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(["plan", *words.split()]) == 0
    return capsys.readouterr().out


# The yardstick ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["serve v2 yardstick.gpus=1", "serve v2-lite gpus=1 yardstick.gpus=1", "serve v2-lite gpus=1 yardstick=true"]
)
def test_a_yardstick_that_does_not_fit_is_said_so(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, words)
    assert found["ratio"] is None
    assert "sensitivity" not in found
    assert "published" not in found
    out = text(capsys, words)
    assert "DeepSeek 67B does not fit on" in out
    assert "Beside the published" not in out
    assert "0.0 us" not in out, "a column that does not fit has no times"


@pytest.mark.parametrize(
    ("gpus", "name", "rate"), [(8, "67B TP-8", 1), (16, "2 x 67B TP-8", 2), (40, "5 x 67B TP-8", 5), (160, "20 x 67B TP-8", 20)]
)
def test_the_yardstick_stays_within_a_node_and_has_as_many_gpus(
    gpus: int, name: str, rate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = plan(capsys, f"serve v2 gpus={gpus}")["cases"]
    assert cases[name]["replicas"] * cases[name]["layout"]["gpus"] == gpus
    assert cases[name]["generated_per_second"] == pytest.approx(rate * 9758, rel=1e-3)
    assert (f"TP-{gpus}" in cases) == (128 % gpus == 0), "what does not divide is left out"


def test_the_yardstick_is_turned_off_and_on(capsys: pytest.CaptureFixture[str]) -> None:
    off = plan(capsys, "serve v2 yardstick=false")
    assert list(off["cases"]) == ["DP-8", "TP-8"]
    assert "ratio" not in off
    on = plan(capsys, "serve v2-lite yardstick=true")
    assert list(on["cases"]) == ["DP-8", "TP-8", "67B TP-8"]
    assert "published" not in on, "V2's figures are not V2-Lite's"


# What is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("serve v2 prompt_tokens=2000000", "exceed the model's context: max_position_embeddings = 163840", "163840"),
        ("serve tour prompt_tokens=200 output_tokens=100", "prompt_tokens + output_tokens = 200 + 100 exceed", "256"),
        ("train tour seq_len=512", "seq_len = 512 exceeds the model's context: max_position_embeddings = 256", "seq_len=256"),
        ("serve v2 gpus=36", "gpus = 36, attention=dp: ep = 36 does not cut", "as gpus"),
        ("serve v2 gpus=40 yardstick.gpus=5", "DeepSeek 67B: 64 heads do not divide by 5 GPUs", "yardstick=false"),
        ("serve v2 attention=tp gpus=6", "v2: 128 heads do not divide by 6 GPUs", "attention=dp"),
        ("serve v2 --search attention=tp gpus=6", "v2: 128 heads do not divide by 6 GPUs", "attention=dp"),
        ("serve v2 --search gpus=2", "weights 236.4 GB and 8.00 GB reserved exceed the 160.0 GB of 2 GPUs", "more gpus"),
        ("serve v2 --search hardware=cpu attention=dp gpus=16", "exceed the 412.3 GB of 16 GPUs", "other hardware"),
        ("serve v2 compute_bits=8 hardware=a100", "compute_bits = 8, but A100 has no fp8 products", "compute_bits=16"),
        ("train v2 --search ep=7", "ep = 7 does not cut 160 routed experts in 8 groups", "use ep = 1, 2, 4"),
        ("train v2 --search pp=61", "60 layers do not fill 61 pipeline stages", "60 at most"),
        ("train v2 --search pp=32 chunks=2", "60 layers do not fill 64 pipeline stages", "60 at most"),
        ("train v2 --search schedule=zb-h1 chunks=4", "schedule = zb-h1 with chunks = 4", "chunks=1"),
        ("train v2 --search schedule=interleaved chunks=1", "schedule = interleaved with chunks = 1", "chunks=2"),
        ("train v2 gpus=1", "gpus = 1 is not a multiple of pp x ep = 16 x 8 = 128", "--search"),
        ("train v2 reserve_gb=1e300", "reserve_gb = 1e+300", None),
        ("serve v2 reserve_gb=1e300", "reserve_gb = 1e+300", None),
        ("serve v2 cache_bits=1e-300", "cache_bits = 1e-300", None),
        ("serve v2 prompt_tokens=1e300", "prompt_tokens = 1e+300", None),
        ("serve v2 utilisation=1e-300", "utilisation = 1e-300", None),
        ("serve v2 gpus=99999999999999999999", "gpus = 99999999999999999999", None),
        ("train v2 kernel_efficiency=1e-300", "kernel_efficiency = 1e-300", None),
        ("train v2 measured_gpu_hours=1e-300", "measured_gpu_hours = 1e-300", None),
        ("train v2 tokens=1e300", "tokens = 1e+300", None),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(words: str, error: str, hint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert error in err
    assert hint is None or hint in err.partition("hint: ")[2]


def test_a_dense_model_has_no_expert_parallelism(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dense = preset("nano", n_routed_experts=None, n_shared_experts=None, num_experts_per_tok=None, moe_intermediate_size=None)
    (tmp_path / "config.json").write_text(json.dumps(dense.to_dict()))
    assert main(["plan", "train", str(tmp_path), "--search", "ep=2"]) == 2
    assert "ep = 2, but the model has no routed experts" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["memory_bytes = 1e308", "bf16_flops = 1e-300", "fp8_flops = 1e-300", "inter_bandwidth = 1e300"])
def test_rates_of_no_machine_are_refused(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rates = {"name": '"toy"', "bf16_flops": "1e12", "memory_bytes": "64e9", "memory_bandwidth": "1e11"}
    rates |= {"intra_bandwidth": "1e10", "inter_bandwidth": "1e9", line.split(" = ")[0]: line.split(" = ")[1]}
    (tmp_path / "toy.toml").write_text("".join(f"{key} = {value}\n" for key, value in rates.items()))
    for what in ("train", "serve"):
        assert main(["plan", what, "nano", f"hardware={tmp_path}/toy.toml"]) == 2
        assert line.split(" = ")[0] in capsys.readouterr().err


def test_a_search_over_a_large_prime_ends_soon(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.perf_counter()
    assert main(["plan", "train", "v2-lite", "gpus=1000000007"]) == 2
    assert time.perf_counter() - started < 5
    assert "no layout of 1000000007 GPUs divides" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/x.png", "file/folder", "folder.png", ""])
def test_a_path_that_cannot_be_written_is_refused_at_once(out: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert main(["plan", "serve", "v2", "--out", str(tmp_path / out) if out else ""]) == 2
    printed, err = capsys.readouterr()
    assert printed == "", "before anything is computed"
    assert err.startswith("error: --out = ")


# What is said -----------------------------------------------------------------------------------------------------------------------


def test_traffic_and_sequences_follow_the_context() -> None:
    tour = preset("tour")
    assert read_train(tour, []).seq_len == 256
    assert read_train(preset("v2"), []).seq_len == 4096
    for overrides, lengths in (([], (170, 85)), (["prompt_tokens=200"], (200, 56)), (["output_tokens=200"], (56, 200))):
        options = read_serve(tour, overrides)
        assert (options.prompt_tokens, options.output_tokens) == lengths
    assert read_serve(preset("v2-lite"), []).prompt_tokens == 1850
    with pytest.raises(ConfigError):
        read_serve(tour, ["prompt_tokens=256"])


@pytest.mark.parametrize(
    ("words", "there", "missing"),
    [
        ("", ["no overlap", "at most 1,024 requests", "its products in bf16", "its cache in 8 bits", "67B as 2 TP-4 replicas"], []),
        ("overlap=false", ["with overlap"], ["no overlap"]),
        ("batch=100", [], ["at most 1,024 requests"]),
        ("cache_bits=8", ["its cache in 16 bits", "67B with a 8-bit cache as well"], ["its cache in 8 bits"]),
        ("weight_bits=16 gpus=16", [], ["its products in bf16", "its products in fp8"]),
        ("hardware=a100", ["67B with 8-bit weights"], ["its products in bf16", "its products in fp8", "67B with fp8 weights and products"]),
        ("compute_bits=16", ["its products in fp8"], ["its products in bf16"]),
        ("reserve_gb=0", [], ["no memory reserved"]),
        ("utilisation=1", ["utilisation 0.8"], ["utilisation 1", "utilisation 1.2"]),
        ("yardstick.gpus=4", [], ["67B as 2 TP-4 replicas"]),
        ("yardstick.weight_bits=8 yardstick.cache_bits=6", [], ["67B with fp8 weights and products", "67B with a 6-bit cache as well"]),
        ("prompt_tokens=100000 output_tokens=50000", ["prompts and answers / 2"], ["prompts and answers x 2"]),
    ],
)
def test_changes_are_named_by_what_they_are(words: str, there: list[str], missing: list[str]) -> None:
    config = preset("v2")
    options = read_serve(config, words.split())
    rows = what_if(config, "v2", options, load_hardware(options.hardware))
    names = [row.name for row in rows]
    assert rows[0].name == "as planned"
    assert set(there) <= set(names)
    assert not set(missing) & set(names)
    assert len(set(names)) == len(names)
    assert all(row.generated > 0 and row.yardstick > 0 for row in rows)


def test_plain_tp_is_explained_where_it_is_slower_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert "DP-8 generates 3.9 x as much as plain TP-8" in text(capsys, "serve v2")
    assert "DP-8 generates 3.9 x as much as plain TP-8" in text(capsys, "serve v2 attention=tp")
    assert "plain TP" not in text(capsys, "serve v2 batch=8"), "few requests: the copies of the weights cost more than those of the cache"


def test_stated_values_are_called_stated(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["what"]: row["why"] for row in plan(capsys, "serve v2 prompt_tokens=500 output_tokens=500 utilisation=0.3")["assumptions"]}
    assert found["traffic 500 in, 500 out"] == "as stated"
    assert found["utilisation 0.3"].startswith("as stated")
    ours = {row["what"]: row["why"] for row in plan(capsys, "serve v2")["assumptions"]}
    assert "answers half as long as prompts are assumed" in ours["traffic 1850 in, 925 out"]
    assert "fitted to them" not in text(capsys, "serve v2 prompt_tokens=500")
    trained = plan(capsys, "train v2 kernel_efficiency=0.5")["assumptions"][0]
    assert trained == {"what": "kernels at 50.0 % of H800's bf16 peak", "why": "as stated"}


def test_v2s_cost_is_called_v2s(capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokens in (("coder-v2", 10.2e12), ("v2.5", 8.1e12), ("v2-chat-0628", 8.1e12)):
        found = plan(capsys, f"train {name}")
        assert found["measured"]["name"] == "V2 (published)"
        assert found["tokens"] == tokens
        assert any(row["what"].endswith("T tokens") for row in found["assumptions"])
    assert plan(capsys, "train coder-v2 tokens=1e12")["tokens"] == 1e12
    assert plan(capsys, "train v2 measured_gpu_hours=2e5")["measured"]["name"] == "v2"


def test_what_training_comes_to_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    out = text(capsys, "train tour --search")
    assert "0.0K" not in out
    assert "1 GPU is the fewest" in out
    assert "6 N counts the input embedding" in out
    assert "6 N counts the input embedding" not in text(capsys, "train v2")
    found = plan(capsys, "train v2")
    seconds = found["tokens"] / found["tokens_per_second"]
    assert found["days"] == pytest.approx(seconds / (24 * 3600))
    assert found["gpu_hours"] == pytest.approx(seconds / 3600 * 2048)
    assert f"{found['days']:.1f} days on 2,048" in text(capsys, "train v2")


def test_schedules_that_cannot_be_have_no_bubble(capsys: pytest.CaptureFixture[str]) -> None:
    assert "interleaved" not in plan(capsys, "train v2 pp=60 dp=1")["bubble_share"]
    assert "60 layers do not fill p x v chunks" in text(capsys, "train v2 pp=60 dp=1")


def test_the_smallest_cluster_is_a_multiple_of_what_is_stated(capsys: pytest.CaptureFixture[str]) -> None:
    layout = plan(capsys, "train nano pp=3")["layout"]
    assert (layout["gpus"], layout["pp"]) == (3, 3)
    layout = plan(capsys, "train nano pp=2 chunks=2")["layout"]
    assert (layout["schedule"], layout["chunks"]) == ("interleaved", 2), "more than one chunk is the interleaved schedule"


def test_same_shape() -> None:
    v2 = preset("v2")
    assert same_shape(v2, preset("v2-chat", aux_loss_alpha=0.5, initializer_range=0.1))
    assert not same_shape(v2, preset("v2-4k"))
    assert same_shape(v2, preset("v2-4k"), positions=False)
    assert not same_shape(v2, preset("v2-lite"), positions=False)
    assert read_train(preset("v2", aux_loss_alpha=0.0), []).pp == 16


def test_sentences_are_wrapped_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer([], ["one two three four five six"], [("a", "b")], {}, bytes)
    show(answer)
    assert "one two three four five six" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "14")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show(answer)
    assert "one two three\nfour five six" in capsys.readouterr().out


options = st.fixed_dictionaries(
    {},
    optional={
        "gpus": st.sampled_from([1, 2, 3, 8, 16, 40, 64, 160]), "attention": st.sampled_from(["dp", "tp"]),
        "weight_bits": st.sampled_from([1, 4, 8, 16]), "cache_bits": st.floats(1, 16), "overlap": st.sampled_from(["true", "false"]),
        "prompt_tokens": st.floats(1, 2e5), "output_tokens": st.floats(1, 2e5), "utilisation": st.floats(1e-3, 1),
        "reserve_gb": st.floats(0, 200), "batch": st.integers(1, 10**6), "compute_bits": st.sampled_from([8, 16]),
        "hardware": st.sampled_from(["h800", "a100", "cpu", "h200"]), "yardstick": st.sampled_from(["true", "false"]),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["v2", "v2-lite", "tour", "v2-4k"]), options, st.booleans())
def test_serving_answers_or_refuses_whatever_is_asked(name: str, stated: dict[str, Any], searching: bool) -> None:
    from dsv2.plan.serve import plan_serve

    try:
        answer = plan_serve(preset(name), name, [f"{key}={value}" for key, value in stated.items()], searching)
    except ConfigError:
        return
    json.dumps(answer.to_json(), allow_nan=False)
    for sheet in answer.sheets:
        assert all(len(row) == len(sheet.columns) for row in sheet.rows)
        assert not any("nan" in cell or "inf" in cell for row in sheet.rows for cell in row[1:-1])
