"""What a run on preferences reads: no prompt is trained on and held out, whatever the loss makes of a pair."""

import json

import pytest
from preference_runs import make_start, make_tokenizer, reward_recipe

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
