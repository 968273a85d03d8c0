"""The published recipes, value by value (P section 3.1.2, appendix B; spec 4.1; Coder-V2 report section 3, spec 9.1)."""

import pytest

from dsv2.config import load_recipe
from dsv2.data.recipe import PrepareRecipe
from dsv2.model.accounting import count_parameters
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.schedule import check_batch, learning_rate, steps_of

# What spec 4.1 and 9.1 print; None: absent.
TABLE = {
    "v2": {
        "peak": 2.4e-4, "points": (0.6, 0.9), "batch": (2304, 9216), "ramp": 225e9, "tokens": 8.1e12, "balance": (0.003, 0.05, 0.02),
        "capacity": 1.0, "groups": (8, 3), "final": 2.3965e-5, "total": 235_741_434_880, "mixture": {}, "fim": 0.0, "start": None,
    },
    "v2-lite": {
        "peak": 4.2e-4, "points": (0.8, 0.9), "batch": (4608, 4608), "ramp": 0, "tokens": 5.7e12, "balance": (0.001, 0.0, 0.0),
        "capacity": None, "groups": (1, 1), "final": 4.194e-5, "total": 15_706_484_224, "mixture": {}, "fim": 0.0, "start": None,
    },
    "coder-v2": {
        "peak": 2.4e-4, "points": None, "batch": (9216, 9216), "ramp": 0, "tokens": 6e12, "balance": (0.003, 0.05, 0.02),
        "capacity": 1.0, "groups": (8, 3), "final": 2.4e-5, "total": 235_741_434_880,
        "mixture": {"code": 0.6, "math": 0.1, "text": 0.3}, "fim": 0.0, "start": "",
    },
    "coder-v2-lite": {
        "peak": 4.2e-4, "points": None, "batch": (4608, 4608), "ramp": 0, "tokens": 6e12, "balance": (0.001, 0.0, 0.0),
        "capacity": None, "groups": (1, 1), "final": 4.2e-5, "total": 15_706_484_224,
        "mixture": {"code": 0.6, "math": 0.1, "text": 0.3}, "fim": 0.5, "start": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_every_value_of_the_table(name):
    recipe, said = load_recipe(name, PretrainRecipe, folder="pretrain"), TABLE[name]
    config, rate, batch, run = recipe.model_config_for(None), recipe.learning_rate, recipe.batch, recipe.run
    # the same for all: AdamW 0.9 / 0.95 / 0.1, clip 1.0, 4096 tokens, 2000 steps of warm-up, N(0, 0.006), losses per sequence
    optimizer = recipe.optimizer
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.adam_epsilon, optimizer.clip_norm, run.seq_len, rate.warmup_steps) == (1e-8, 1.0, 4096, 2000)
    assert (config.initializer_range, config.max_position_embeddings, config.rope_scaling) == (0.006, 4096, None)
    assert (recipe.balance.scope, run.precision, recipe.dropping.protected_share) == ("sequence", "bf16", 0.1)
    # what differs
    assert (rate.peak, run.tokens) == (said["peak"], said["tokens"])
    assert (batch.initial_sequences or batch.sequences, batch.sequences, batch.ramp_tokens) == (*said["batch"], said["ramp"])
    if said["points"] is None:
        assert (rate.decay, rate.final_share) == ("cosine", 0.1)
    else:
        assert (rate.decay, rate.decay_points, rate.decay_factor) == ("steps", said["points"], 0.316)
    assert (recipe.balance.expert, recipe.balance.device, recipe.balance.communication) == said["balance"]
    assert recipe.dropping.capacity_factor == said["capacity"]
    assert (config.n_group, config.topk_group) == said["groups"]
    assert count_parameters(config).total == said["total"]
    mixture = {} if recipe.mixture is None else recipe.mixture.stages[0].weights
    assert (mixture, recipe.model.start) == (said["mixture"], said["start"])
    prepared = name if said["mixture"] else "clean"
    assert load_recipe(prepared, PrepareRecipe, folder="prepare").fim.rate == said["fim"]
    last = learning_rate(rate, step=10**6, tokens=run.tokens, total_tokens=run.tokens)
    assert last == pytest.approx(said["final"], rel=2e-4)
    check_batch(batch)


def test_steps_and_decay_points_of_the_table():
    lite = load_recipe("v2-lite", PretrainRecipe, folder="pretrain")
    assert sum(1 for _ in steps_of(lite.batch, 4096, lite.run.tokens)) == 301_997
    assert [point * lite.run.tokens for point in lite.learning_rate.decay_points] == pytest.approx([4.56e12, 5.13e12])
    large = load_recipe("v2", PretrainRecipe, folder="pretrain")
    assert [point * large.run.tokens for point in large.learning_rate.decay_points] == pytest.approx([4.86e12, 7.29e12])
    steps = list(steps_of(large.batch, 4096, large.run.tokens))
    ramp = sum(1 for consumed, _ in steps if consumed * 4096 < 225e9)
    # linear in tokens: 225e9 / (4096 * (9216 - 2304)) * ln(9216 / 2304) = 11.0K
    assert ramp == pytest.approx(11_017, abs=3) and len(steps) == pytest.approx(219_000, rel=0.005)


def test_continued_recipes_begin_before_the_first_decay():
    """4.2T tokens lie before 4.86T and 4.56T, so the checkpoint that Coder-V2 continues is at the peak rate."""
    for name in ("v2", "v2-lite"):
        recipe = load_recipe(name, PretrainRecipe, folder="pretrain")
        assert learning_rate(recipe.learning_rate, step=10**5, tokens=4_200_000_000_000, total_tokens=recipe.run.tokens) == (
            recipe.learning_rate.peak
        )
