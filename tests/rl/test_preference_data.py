"""What a run on preferences reads: no prompt is trained on and held out, whatever the loss makes of a pair."""

import json

import pytest
from preference_runs import make_pairs, make_start, make_tokenizer, reward_recipe

from dsv2.errors import DataError
from dsv2.rl.dpo import only_pairs
from dsv2.rl.preference_data import open_preferences
from dsv2.rl.preference_recipe import RewardLossSection
from dsv2.rl.reward_training import form_of


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
        assert f"loss.kind = '{kind}'" in reason and place.endswith(":151")
        with pytest.raises(DataError, match="1 of 151 training rows are refused"):
            open_preferences(
                reward_recipe(start, loss={"kind": kind}, data={"max_refused": 0}), tokenizer, [pairs], form=form_of(recipe.loss)
            )
