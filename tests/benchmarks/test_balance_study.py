"""The balance study's own logic: its arms, its arithmetic on metrics made by hand, and that its page shows its results."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from dsv2.config import load_recipe
from dsv2.train.recipe import PretrainRecipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
study, measures, page = (importlib.import_module(name) for name in ("balance_study", "balance_measures", "balance_page"))


def leaves(arm: str) -> dict[str, object]:
    """Every value of an arm's recipe by its dotted name."""

    def walk(value: object, path: str) -> dict[str, object]:
        if not isinstance(value, dict):
            return {path: value}
        return {name: leaf for key, each in value.items() for name, leaf in walk(each, f"{path}.{key}".lstrip(".")).items()}

    overrides = study.ARMS[arm].overrides()
    return walk(load_recipe(str(study.RECIPE), PretrainRecipe, folder="pretrain", overrides=overrides).model_dump(), "")


def different(one: str, other: str) -> set[str]:
    a, b = leaves(one), leaves(other)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_an_arm_differs_from_the_baseline_in_one_factor() -> None:
    base = leaves("baseline")
    paper = {"alpha_1": 0.003, "alpha_2": 0.05, "alpha_3": 0.02, "M": 3, "dropping": None}  # section 3.1.2; dropping is an arm
    assert {factor: base[field] for factor, field in study.FACTORS.items()} == paper
    contrasts = {"no-losses", "no-losses-dropping"}
    for arm in study.ARMS.keys() - {"baseline"} - contrasts:
        assert different(arm, "baseline") == {study.FACTORS[factor] for factor in study.ARMS[arm].changes}
        assert len(study.ARMS[arm].changes) == 1
    assert different("no-losses", "baseline") == {"balance.expert", "balance.device", "balance.communication"}
    assert different("no-losses-dropping", "no-losses") == {"dropping.capacity_factor"}


def test_runs_of_one_seed_share_steps_weights_and_data(tmp_path: Path) -> None:
    runs = study.plan(tmp_path, quick=False)
    assert len({run.folder for run in runs}) == len(runs) == 3 * len(study.ARMS)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs), "seed by seed"
    for run in runs:
        assert run.recipe.run.seed == run.seed and run.num_steps == 400 and run.recipe.run.deterministic


def step(number: int, counts: list[int], *, reached: int = 2, dropped: int | None = None) -> dict:
    """A line of metrics with one layer, four experts on two devices and eight assignments."""
    total = sum(counts)
    devices = [sum(counts[:2]) / total, sum(counts[2:]) / total]
    router = {
        "max_over_mean": [4 * max(counts) / total], "dead_experts": [counts.count(0)], "device_load": [devices],
        "sends_per_token": [reached - 0.5], "most_sends": [reached], "received_max": [1.0 + number / 100],
    } | ({} if dropped is None else {"dropped": [dropped], "computed_max": [1.25]})  # fmt: skip
    return {
        "step": number, "kind": "train", "tokens": 4 * number, "loss": float(number), "elapsed_s": 2.0 * number,
        "load": [[count / total for count in counts]], "router": router,
    }  # fmt: skip


def run_of(**options: int) -> list[dict]:
    """Ten steps; the last two are the window."""
    lines = [step(number, [8, 0, 0, 0], **options) for number in range(1, 9)]
    lines += [step(9, [4, 2, 2, 0], **options), step(10, [4, 0, 2, 2], **options)]
    return [*lines, {"step": 10, "kind": "validation", "bits_per_byte": {"en": 2.0, "zh": 3.0}}]


def test_figures_are_of_the_last_fifth() -> None:
    figures = measures.figures_of(run_of(dropped=2), limit=2, assigned=8, domain_bytes={"en": 300, "zh": 100})
    expected = {
        "held_out": 2.25, "loss": 9.5, "expert": 2.0, "expert_worst": 2.0, "device": (1.5 + 1.0) / 2, "received": 1.095, "dead": 1.0,
        "expert_lasting": 2.0, "dead_lasting": 0.0, "sends": 1.5, "most_sends": 2.0, "seconds": 20.0, "dropped": 0.25, "dropped_all": 0.25,
        "computed": 1.25,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert "dropped" not in measures.figures_of(run_of(), limit=2, assigned=8, domain_bytes={"en": 1})


def test_a_token_that_reached_too_many_devices_at_any_step_stops_the_study() -> None:
    lines = run_of()
    lines[0]["router"]["most_sends"] = [3]
    with pytest.raises(AssertionError, match="reached 3 devices; the limit is M = 2"):
        measures.figures_of(lines, limit=2, assigned=8, domain_bytes={"en": 1})


def test_layers_are_averaged_and_the_worst_is_named() -> None:
    assert measures.mean_and_worst([[1.0, 4.0], [3.0, 2.0]]) == (2.5, 3.0)


def test_what_overlaps_is_noise() -> None:
    assert measures.side([2.0, 3.0], [1.0, 1.9]) == 1
    assert measures.side([1.0, 1.9], [2.0, 3.0]) == -1
    assert measures.side([1.0, 2.0], [2.0, 3.0]) == 0
    assert measures.side([5.0], [1.0]) == 0, "one seed says nothing of noise"
    assert [page.verdict(found, 1) for found in (1, 0, -1)] == ["yes", "inside the noise", "**no: the other way**"]
    assert [page.verdict(found, -1) for found in (-1, 0)] == ["yes", "inside the noise"]
    assert page.verdict(1, 0) == "**no: higher**" and page.verdict(0, 0) == "yes: inside the noise"


def made_results(tmp_path: Path) -> dict:
    """Results of all arms from hand-made metrics, through the file."""
    arms = {}
    for place, (name, arm) in enumerate(study.ARMS.items()):
        dropped = {"dropped": place} if "dropping" in arm.changes else {}
        seeds, courses = [], []
        for seed in range(3):
            lines = run_of(**dropped)
            lines[-1]["bits_per_byte"]["en"] += place + seed / 10
            seeds.append({"seed": seed} | measures.figures_of(lines, limit=8, assigned=8, domain_bytes={"en": 1}))
            courses.append(measures.course_of(lines, assigned=8))
        arms[name] = {"label": arm.label, "changes": dict(arm.changes), "seeds": seeds, "course": measures.merge_courses(courses)}
    setup = dict.fromkeys(("parameters", "activated", "moe_layers", "experts", "chosen", "devices", "steps", "step_tokens"), 1)
    chance = measures.chance_of([step(1, [4, 2, 2, 0]), step(3, [2, 2, 2, 2])])
    assert chance == pytest.approx({"expert": 1.5, "device": 1.25, "received": 1.02, "dead": 0.5, "sends": 1.5})
    results = {"chance": chance, "setup": setup | {"held_out_bytes": 1, "torch": "2", "cpu": "x"}, "arms": arms}
    file = tmp_path / "results.json"
    file.write_text(measures.to_json(results))
    return json.loads(file.read_text())


def test_tables_and_pictures_come_from_the_file(tmp_path: Path) -> None:
    results = made_results(tmp_path)
    assert results["arms"]["baseline"]["course"]["expert"][-1] == [2.0, 2.0, 2.0]
    quality = page.blocks(results)["quality"].splitlines()
    assert page.blocks(results)["balance"].endswith("| chance alone, M = 3 | 1.50 | - | 0.50 | - | 1.25 | 1.02 | 1.50 | - |")
    assert quality[2].startswith("| baseline: 0.003, 0.05, 0.02, M = 3 | 2.100 (2.000 to 2.200) | 9.500 | - |")
    assert quality[3].startswith("| alpha_1 = 0 | **3.100** (3.000 to 3.200) | 9.500 |"), "bold: all seeds above the baseline's"
    assert all(picture.startswith(b"\x89PNG") for picture in page.pictures(results).values())
    with pytest.raises(ValueError, match="0 pairs of markers for 'setup'"):
        page.fill("no markers", results)


def test_the_page_shows_the_results_that_lie_beside_it() -> None:
    """As long as there are none, it shows none."""
    text = (ROOT / "docs" / "balance.md").read_text(encoding="utf-8")
    file = ROOT / "docs" / "balance" / "results.json"
    if not file.exists():
        shown = re.findall(r"<!-- \w+: from results.json -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert len(shown) == 4 and not any(block.strip() for block in shown), "tables that no results.json backs"
        return
    results = json.loads(file.read_text(encoding="utf-8"))
    assert page.fill(text, results) == text
    assert {name: arm["changes"] for name, arm in results["arms"].items()} == {n: dict(a.changes) for n, a in study.ARMS.items()}
    shown = re.findall(r"\]\(balance/(\w+\.png)\)", text)
    assert sorted(shown) == ["arms.png", "course.png", "dropping.png"]
    assert all((file.parent / name).is_file() for name in shown)
