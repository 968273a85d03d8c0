"""`dsv2 plan` as it is typed: what is printed, what JSON holds, what is refused and how."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv2.cli import main
from dsv2.presets import PRESETS, preset

MACHINE = """
name = "toy"
bf16_flops = 1e12
memory_bytes = 64e9
memory_bandwidth = 1e11
intra_bandwidth = 1e10
inter_bandwidth = 1e9
"""


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_training_v2_prints_the_published_figures_with_their_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train", "v2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        "Training v2 on 2,048 x H800: pp 16 x ep 8 x dp 16, zb-h1, ZeRO-1, recompute selective, mb 1",
        "layers per rank: 3 4 4 4 4 3 4 4 4 4 3 4 4 4 4 3",
        "FLOP/token x 1e12 / (GPU-hours x 3600 x 989.4 TFLOPS)",
        "42.515 %",
        "1 - 172.8K / 300.6K",
    ):
        assert line in out
    rows = {line.split("  ")[1].strip(): line for line in out.splitlines() if line.startswith("  ")}
    assert "20.8 %" in rows["V2 (published)"]
    assert "25.7 %" in rows["V2 (published)"]
    assert "Assumptions" in out
    assert "fitted" in out.partition("Assumptions")[2]


def test_training_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "train", "v2")
    assert found["measured"]["mfu_6n"] == pytest.approx(0.208, abs=5e-4)
    assert found["measured"]["mfu_with_attention"] == pytest.approx(0.257, abs=5e-4)
    assert round(100 * found["measured"]["saving"], 3) == 42.515
    assert found["gpu_hours"] == pytest.approx(8.1 * 172.8e3, rel=0.01)
    assert len(found["memory_per_rank_bytes"]) == 16
    for rank in found["memory_per_rank_bytes"]:
        assert sum(value for kind, value in rank.items() if kind != "total") == pytest.approx(rank["total"])
    measured = plan(capsys, "train", "v2", "measured_gpu_hours=86400")["measured"]
    assert measured["mfu_6n"] == pytest.approx(2 * found["measured"]["mfu_6n"])


def test_serving_v2_prints_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "serve", "v2"]) == 0
    out, _ = capsys.readouterr()
    for text in ("404.3", "15.6M", "1.95M", "1.30M", "25,920", "389,120", "5.76", "Sensitivity", "as much as plain TP-8", "not public"):
        assert text in out
    found = plan(capsys, "serve", "v2")
    ours, plain, theirs = found["cases"].values()
    assert ours["generated_per_second"] > 50e3
    assert ours["prompt_per_second"] > 100e3
    assert found["ratio"] == pytest.approx(5.76, rel=0.25)
    assert found["ratio"] == pytest.approx(ours["generated_per_second"] / theirs["generated_per_second"])
    assert plain["generated_per_second"] < 50e3
    assert {"prompts and answers x 2", "prompts and answers / 2", "utilisation 0.504", "67B with fp8 weights and products"} <= {
        row["change"] for row in found["sensitivity"]
    }
    assert [figure["published"] for figure in found["published"]] == [55.5e3, 9.65e3, 5.76, 100e3]
    assert "MLA has one latent for all heads" in found["words"][0]
    assert any("not public" in assumed["why"] for assumed in found["assumptions"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, "train", name)["fits"]
    hardware = ["hardware=cpu", "gpus=1"] if name in ("tour", "nano", "small") else ["gpus=8", "weight_bits=8"]
    case = next(iter(plan(capsys, "serve", name, *hardware)["cases"].values()))
    assert case["fits"]
    assert case["generated_per_second"] > 0


def test_a_config_and_a_machine_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("nano").to_dict()))
    (tmp_path / "toy.toml").write_text(MACHINE)
    found = plan(capsys, "train", str(tmp_path / "config.json"), f"hardware={tmp_path}/toy.toml", "seq_len=512")
    assert found["hardware"]["name"] == "toy"
    assert (found["layout"]["gpus"], found["layout"]["seq_len"]) == (1, 512)
    twice = (tmp_path / "toy.toml").read_text().replace("1e12", "2e12")
    (tmp_path / "fast.toml").write_text(twice)
    faster = plan(capsys, "train", str(tmp_path), f"hardware={tmp_path}/fast.toml", "seq_len=512")
    assert faster["tokens_per_second"] == pytest.approx(2 * found["tokens_per_second"])


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("train v2 pq=1", "override 'pq=1': unknown key 'pq'", "did you mean 'pp'?"),
        ("serve v2 yardstick.weight_bit=8", "override 'yardstick.weight_bit=8': unknown key", "did you mean 'yardstick.weight_bits'?"),
        ("train v2 hardware=h80", "unknown recipe 'h80'; shipped: a100, cpu, h100, h200, h800", "did you mean 'h800'?"),
        ("train v2 zero=4", "override 'zero=4': zero = 4", None),
        ("train v2 schedule=1f2b", "override 'schedule=1f2b'", "did you mean '1f1b'?"),
        ("train v2 ep=7", "ep = 7 does not cut 160 routed experts in 8 groups", "use ep = 1, 2, 4, 8, 16"),
        ("train v2 gpus=1000", "gpus = 1000 is not a multiple of pp x ep = 16 x 8 = 128", "pp = 16 and ep = 8 are the recipe's"),
        ("train v2-lite pp=3", "gpus = 256 is not a multiple of pp x ep = 3 x 1", "ep = 1 and gpus = 256 are the recipe's"),
        ("train v2-lite pp=3 --search", "gpus = 256 is not a multiple of pp = 3", "state another"),
        ("train v2 pp=16 ep=8 dp=16 gpus=1024", "gpus = 1024 is not pp x ep x dp = 16 x 8 x 16 = 2048", "leave one of them out"),
        ("train v2 gpus=8 --search", "does not fit on 8 x H800: the smallest layout", "use more gpus"),
        ("train v3", "'v3' is neither a preset nor an existing path", "did you mean 'v2"),
        ("train v2 --out plan.pdf", "--out = plan.pdf must be a .png file or a folder", None),
        ("serve v2 gpus=3", "gpus = 3, attention=dp: ep = 3 does not cut", "as gpus"),
        ("serve v2-lite fit=true", "fit = true fits a model of V2's shape", "use the preset v2"),
        ("serve v2 attention=tp fit=true", "no traffic and utilisation give > 50K", "use attention=dp"),
        ("serve v2 hardware=h100 fit=true", "fit = true needs the published 8 x H800, not 8 x H100", "leave hardware"),
        ("serve v2 yardstick.gpus=3", "yardstick.gpus = 3 does not divide gpus = 8", "use a divisor"),
        ("learn v2", "invalid value for 'train|serve': 'learn' is not one of", None),
    ],
)
def test_bad_requests_say_what_and_what_to_do(words: str, error: str, hint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert error in err
    assert hint is None or hint in err.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train v2 recompute=none", "does not fit: rank 1 of the pipeline needs "),
        ("serve v2 gpus=2", "does not fit: weights "),
    ],
)
def test_what_does_not_fit_is_shown_and_refused(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert "tokens/s" not in out.partition("Assumptions")[0].partition("Measured")[0], "no rate of what cannot run"
    assert main(["plan", *words.split(), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert "tokens_per_second" not in found
    assert not found.get("fits", False)


def test_the_search_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "train", "v2", "--search", "micro_batch=1", "schedule=zb-h1")["search"]
    assert len(found["best"]) == 5
    assert all(best["schedule"] == "zb-h1" for best in found["best"])
    assert found["explanation"][1].startswith("Best: pp 8 x ep 8 x dp 32")
    assert found["explanation"][2].startswith("pp 16 x ep 8 x dp 16")
    serving = plan(capsys, "serve", "v2", "--search")["search"]
    prices = [layout["dollars_per_million"] for layout in serving]
    assert prices == sorted(prices)
    assert serving[0]["attention"] == "dp"


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every indented line of docs/plan.md, up to its last column, is one that the commands print; so are the rows of its table."""
    for command in ("train v2", "train v2 --search", "serve v2"):
        assert main(["plan", *command.split()]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    guide = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().splitlines()
    shown = [line.strip() for line in guide if line.startswith("    ") and not line.startswith(("    dsv2", "    $"))]
    assert len(shown) > 30
    for line in shown:
        start = " ".join(line.replace("...", "  ").split("  ")[0].split()) if "..." in line else " ".join(line.split()[:5])
        assert any(text.startswith(start) for text in printed), line
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in guide if line.startswith("| ") and "change" not in line]
    for numbers in rows[1:]:
        assert any(" ".join(numbers) in text for text in printed), numbers


def test_pictures_and_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "serve", "v2", "--out", str(tmp_path / "serve.png")]) == 0
    assert main(["plan", "train", "nano", "schedule=1f1b", "zero=0", "recompute=none", "micro_batch=1", "--out", str(tmp_path / "d")]) == 0
    for picture in (tmp_path / "serve.png", tmp_path / "d" / "plan.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "d" / "plan.json").read_text())["model"] == "nano"
    assert "wrote " in capsys.readouterr().err


def test_published_figures_are_not_held_against_other_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert "measured" not in plan(capsys, "train", "v2", "hardware=h100")
    assert "measured" not in plan(capsys, "train", "v2", "seq_len=2048")
    own = plan(capsys, "train", "v2", "hardware=a100", "measured_gpu_hours=400000")["measured"]
    assert own["mfu_6n"] == pytest.approx(128.25e9 * 1e12 / (4e5 * 3600 * 312e12), rel=1e-3)
    assert "saving" not in own
    assert main(["plan", "serve", "v2", "hardware=h200"]) == 0
    out, _ = capsys.readouterr()
    assert "Beside the published figures" not in out
    assert "instead of 5.76" not in out
