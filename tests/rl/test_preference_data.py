"""What a run on preferences reads: no prompt is trained on and held out, whatever the loss makes of a pair."""

import json

import pytest
from preference_runs import dpo_recipe, make_pairs, make_start, make_tokenizer, reward_recipe

from dsv2.errors import ConfigError, DataError
from dsv2.rl.preference_data import only_pairs, open_preferences
from dsv2.rl.preference_recipe import RewardLossSection
from dsv2.rl.reward_training import form_of
from dsv2.train.start import open_start


@pytest.mark.parametrize("kind", ["pairwise", "logistic"])
def test_no_prompt_is_on_both_sides(tmp_path, kind):
    tokenizer = make_tokenizer()
    file = tmp_path / "pairs.jsonl"
    rows = ({"prompt": f"{n} river", "chosen": f"stone {n} {answer}", "rejected": "model"} for n in range(60) for answer in range(3))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = reward_recipe(make_start(tmp_path / "start", tokenizer), loss={"kind": kind})
    data = open_preferences(recipe, tokenizer, [file], form=form_of(RewardLossSection(kind=kind)))

    def prompts(answers):
        return {tokenizer.decode(ids[~learn].tolist()) for ids, learn in zip(answers.tokens, answers.learn, strict=True)}

    held, trained = prompts(data.held_out["pairs"].answers), prompts(data.rows.answers)
    assert 3 <= len(held) <= 25
    assert not held & trained
    assert len(held | trained) == 60


def test_a_held_out_source_whose_rows_are_too_long_is_left_out(tmp_path):
    tokenizer = make_tokenizer()
    recipe = reward_recipe(make_start(tmp_path / "start", tokenizer))
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"prompt": f"{n} " + "river " * 99, "chosen": "a", "rejected": "b"}) + "\n" for n in range(50)))
    data = open_preferences(recipe, tokenizer, [make_pairs(tmp_path / "pairs.jsonl"), long], form=only_pairs)
    assert list(data.held_out) == ["pairs"]
    assert data.reports["training"].refused == {"a conversation is longer than 48 tokens": 50}
    for files, validation, purpose in (([long], [], "to train on"), ([tmp_path / "pairs.jsonl"], [long], "to validate on")):
        with pytest.raises(DataError, match=f"no preference is left {purpose}: .*longer than 48 tokens"):
            open_preferences(recipe, tokenizer, files, validation=validation, form=only_pairs)


def test_rows_that_a_loss_cannot_use_are_refused_and_counted(tmp_path):
    tokenizer, start = make_tokenizer(), tmp_path / "start"
    make_start(start, tokenizer)
    pairs = make_pairs(tmp_path / "pairs.jsonl")
    with pairs.open("a") as file:
        file.write(json.dumps({"prompt": "river", "completion": "stone", "score": 3}) + "\n")
    for kind in ("pairwise", "logistic"):
        recipe = reward_recipe(start, loss={"kind": kind}, data={"max_refused": 0.05})
        report = open_preferences(recipe, tokenizer, [pairs], form=form_of(recipe.loss)).reports["training"]
        ((reason, place),) = report.first_refused.items()
        assert "loss.kind = 'logistic'" in reason and place.endswith(":151")
        with pytest.raises(DataError, match="1 of 151 training rows are refused"):
            open_preferences(
                reward_recipe(start, loss={"kind": kind}, data={"max_refused": 0}), tokenizer, [pairs], form=form_of(recipe.loss)
            )


def test_lengths_that_a_recipe_leaves_open_follow_the_model(tmp_path):
    """A pair has a context for each of its answers; two answers that are judged one by one share no row of such a length."""
    tokenizer = make_tokenizer()
    start, pairs = make_start(tmp_path / "start", tokenizer), make_pairs(tmp_path / "pairs.jsonl")
    for recipe, expected in (
        (dpo_recipe(start, run={"seq_len": 0}), 128), (reward_recipe(start, run={"seq_len": 0}), 128),
        (reward_recipe(start, run={"seq_len": 0}, loss={"kind": "logistic"}), 64),
    ):  # fmt: skip
        fitted, opened = open_start(recipe)
        assert fitted == recipe.fitted(64) == fitted.fitted(64)
        form = form_of(fitted.loss) if expected == 64 else only_pairs
        assert open_preferences(fitted, opened.tokenizer, [pairs], form=form).rows.seq_len == expected
    with pytest.raises(ConfigError, match="run.seq_len = 129 exceeds 2 x the model's context of 64 tokens"):
        open_start(dpo_recipe(start, run={"seq_len": 129}))
