"""`dsv2 pretrain` lets the model write: prompts continued, holes filled, and nothing else changed."""

from pathlib import Path

import pytest
from training_runs import recipe, require_equal, without_times

from dsv2 import samples
from dsv2.config import dump_toml
from dsv2.errors import ConfigError
from dsv2.files import atomic_write
from dsv2.train import pretrain

SECTION = {"prompts": ["ab"], "fill": [{"prefix": "def f(", "suffix": "):\n"}], "max_tokens": 4}


def sampling_recipe(**changes):
    return pretrain.PretrainRecipe.model_validate(recipe().model_dump() | {"samples": SECTION | changes})


def test_samples_are_written_and_the_weights_do_not_notice(one_thread, corpus, data_folder: Path, tmp_path: Path):
    atomic_write(tmp_path / "recipe.toml", dump_toml(sampling_recipe()))
    samples.run(str(tmp_path / "recipe.toml"), data=data_folder, out=tmp_path / "with")
    pretrain.pretrain(sampling_recipe(), corpus, tmp_path / "without")
    lines = without_times(tmp_path / "with")
    drawn = [line for line in lines if line["kind"] == "sample"]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert [line["prompt"] for line in drawn[:2]] == ["ab", f"def f({samples.HOLE}):\n"]
    assert sorted({line["step"] for line in drawn}) == sorted({step for step in steps if step % 4 == 0} | {steps[-1]})
    (tmp_path / "with" / "metrics.jsonl").write_text(
        "".join(line for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines(keepends=True) if '"sample"' not in line)
    )
    require_equal(tmp_path / "with", tmp_path / "without")


def test_a_prompt_must_fit_the_context(corpus):
    with pytest.raises(ConfigError, match="max_tokens = 63; the context holds 64"):
        samples.recipe_sampler(sampling_recipe(max_tokens=63), corpus.tokenizer)
