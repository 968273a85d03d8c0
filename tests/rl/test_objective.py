"""The objectives against loops in float64 and finite differences, and what must hold of them whatever the numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.errors import ConfigError
from dsv2.rl.objective import (
    PRESETS,
    Objective,
    advantages,
    grpo_loss,
    importance_weights,
    kl,
    overlong_penalty,
    process_advantages,
    ratios,
)
from reference import grpo as reference

LENGTHS = [5, 3, 6, 1]
A = [1.2, -0.7, -1.1, 0.6]
MASK = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
OBJECTIVES = PRESETS | {"dr_grpo": PRESETS["dr_grpo"].model_copy(update={"constant_len": 9})}


def rows(seed, spread):
    """Log-probabilities around -1.5, NaN in the padding: ratios of several of them lie outside of the clips."""
    generator = torch.Generator().manual_seed(seed)
    values = -1.5 + spread * torch.randn(len(LENGTHS), 6, generator=generator, dtype=torch.float64)
    return values.masked_fill(~MASK, math.nan)


NOW, OLD, REF = rows(1, 0.3), rows(2, 0.3), rows(3, 0.3)
ADVANTAGES = torch.tensor(A, dtype=torch.float64)


def as_lists(values):
    return [row[:length].tolist() for row, length in zip(values, LENGTHS, strict=True)]


def gradient(objective, logp, old, ref, weights=ADVANTAGES):
    logp = logp.clone().requires_grad_()
    grpo_loss(objective, logp, old, ref, weights, MASK).loss.backward()
    return logp.grad


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v2", lambda now, old, ref: reference.v2_loss(now, old, ref, A, 0.2, 0.2, 0.04)),
        ("deepseekmath", lambda now, old, ref: reference.deepseekmath_loss(now, old, ref, A, 0.2, 0.2, 0.04)),
        ("dr_grpo", lambda now, old, ref: reference.dr_grpo_loss(now, old, A, 0.2, 0.2, 9)),
        ("dapo", lambda now, old, ref: reference.dapo_loss(now, old, A, 0.2, 0.28)),
    ],
)
def test_presets_equal_their_formula(name, expected):
    parts = grpo_loss(OBJECTIVES[name], NOW, OLD, REF, ADVANTAGES, MASK)
    assert parts.loss.item() == pytest.approx(expected(as_lists(NOW), as_lists(OLD), as_lists(REF)), abs=1e-12)
    assert parts.clipped_low > 0 or parts.clipped_high > 0, "the numbers are to reach a clip"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_equals_finite_differences(name):
    seen, step = gradient(OBJECTIVES[name], NOW, OLD, REF), 1e-6
    for place in MASK.nonzero().tolist():
        changed = []
        for sign in (1, -1):
            moved = NOW.clone()
            moved[tuple(place)] += sign * step
            changed.append(grpo_loss(OBJECTIVES[name], moved, OLD, REF, ADVANTAGES, MASK).loss.item())
        assert seen[tuple(place)].item() == pytest.approx((changed[0] - changed[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_update_has_the_gradient_of_the_policy_gradient(name):
    """With pi_theta = pi_old = pi_ref the loss is -A times the log-probability, divided as the preset says; the KL has no part in it."""
    divisor = {
        "v2": [len(LENGTHS)] * 4,
        "deepseekmath": [len(LENGTHS) * length for length in LENGTHS],
        "dr_grpo": [len(LENGTHS) * 9] * 4,
        "dapo": [sum(LENGTHS)] * 4,
    }[name]
    expected = (-ADVANTAGES / torch.tensor(divisor, dtype=torch.float64)).unsqueeze(1) * MASK
    torch.testing.assert_close(gradient(OBJECTIVES[name], NOW, NOW, NOW), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_rewards_give_no_gradient(name):
    weights = advantages(torch.full((1, 4), 0.1), OBJECTIVES[name].advantage).flatten().double()
    assert gradient(OBJECTIVES[name], NOW, OLD, NOW, weights).abs().max() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_never_matters(name):
    filled = [values.masked_fill(~MASK, filling) for values, filling in ((NOW, 3.0), (OLD, -math.inf), (REF, math.inf))]
    per_token = ADVANTAGES.unsqueeze(1).expand_as(NOW).masked_fill(~MASK, math.nan)
    assert torch.equal(gradient(OBJECTIVES[name], *filled, per_token), gradient(OBJECTIVES[name], NOW, OLD, REF))
    wider = [torch.nn.functional.pad(values, (0, 3)) for values in (NOW, OLD, REF)]
    loss = grpo_loss(OBJECTIVES[name], *wider, ADVANTAGES, torch.nn.functional.pad(MASK, (0, 3))).loss
    assert loss.item() == pytest.approx(grpo_loss(OBJECTIVES[name], NOW, OLD, REF, ADVANTAGES, MASK).loss.item(), abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_and_an_output_without_tokens_counts_nowhere(name):
    whole = grpo_loss(OBJECTIVES[name], NOW, OLD, REF, ADVANTAGES, MASK)
    denominator = sum(LENGTHS) if OBJECTIVES[name].normalise == "tokens" else len(LENGTHS)
    halves = [
        grpo_loss(OBJECTIVES[name], NOW[half], OLD[half], REF[half], ADVANTAGES[half], MASK[half], denominator=denominator)
        for half in (slice(0, 1), slice(1, 4))
    ]
    assert sum(half.loss.item() for half in halves) == pytest.approx(whole.loss.item(), abs=1e-12)
    mask = MASK.clone()
    mask[1] = False
    kept = [0, 2, 3]
    without = grpo_loss(OBJECTIVES[name], NOW[kept], OLD[kept], REF[kept], ADVANTAGES[kept], MASK[kept])
    assert grpo_loss(OBJECTIVES[name], NOW, OLD, REF, ADVANTAGES, mask).loss.item() == pytest.approx(without.loss.item(), abs=1e-12)


def test_what_is_watched():
    old = NOW - torch.log(torch.tensor([1.5, 1.1, 0.5, 0.5], dtype=torch.float64)).unsqueeze(1)
    parts = grpo_loss(PRESETS["deepseekmath"], NOW, old, REF, ADVANTAGES, MASK)
    assert parts.clipped_high.item() == pytest.approx(5 / 15) and parts.clipped_low.item() == pytest.approx(6 / 15)
    assert parts.ratio_max.item() == pytest.approx(1.5)
    whole = grpo_loss(PRESETS["v2"], NOW, old, REF, ADVANTAGES, MASK)
    assert whole.clipped_high.item() == pytest.approx(1 / 4) and whole.clipped_low.item() == pytest.approx(1 / 4)
    assert whole.ratio_max.item() == pytest.approx(1.5**5)
    assert parts.weight_mean is None and parts.weight_capped is None
    for sign, low_min, high_max in ((-1.0, 1 / 6, 0.0), (1.0, 0.0, 1 / 3)):  # each output's first token is clipped, of 5, 3 and 6
        old = NOW[:3].clone()
        old[:, 0] -= sign * math.log(1.5)
        parts = grpo_loss(PRESETS["deepseekmath"], NOW[:3], old, REF[:3], torch.full((3,), sign, dtype=torch.float64), MASK[:3])
        assert (parts.clipped_low_min.item(), parts.clipped_high_max.item()) == pytest.approx((low_min, high_max))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_kl_that_is_shown_is_k3_of_a_token_whatever_the_loss_has(name, kind):
    objective = OBJECTIVES[name].model_copy(update={"kl": kind, "kl_weight": 0.04})
    parts = grpo_loss(objective, NOW, OLD, REF, ADVANTAGES, MASK)
    pairs = zip(sum(as_lists(NOW), []), sum(as_lists(REF), []), strict=True)
    assert parts.kl.item() == pytest.approx(sum(reference.k3(now, ref) for now, ref in pairs) / 15)
    without = grpo_loss(objective.model_copy(update={"kl_weight": 0.0}), NOW, OLD, None, ADVANTAGES, MASK)
    assert parts.loss.item() == pytest.approx((without.loss + 0.04 * parts.kl_loss).item()) and without.kl is without.kl_loss is None


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"kl_weight = 0\.04 needs the reference"):
        grpo_loss(PRESETS["v2"], NOW, OLD, None, ADVANTAGES, MASK)
    with pytest.raises(ConfigError, match="no constant_len"):
        grpo_loss(PRESETS["dr_grpo"], NOW, OLD, None, ADVANTAGES, MASK)
    with pytest.raises(ConfigError, match="overlong_buffer = 0 tokens; allowed are 1 to 10"):
        overlong_penalty(3, 10, 0)


@given(st.lists(st.one_of(st.none(), st.floats(-100, 100, width=32)), min_size=1, max_size=8))
def test_z_scores_equal_the_loop(rewards):
    given_rewards = torch.tensor([[math.nan if reward is None else reward for reward in rewards]], dtype=torch.float64)
    seen = advantages(given_rewards)[0]
    scored = [reward for reward in rewards if reward is not None]
    if not scored or max(scored) - min(scored) <= 1e-6 * max(map(abs, scored)):
        assert seen.tolist() == [0.0] * len(rewards)
    else:
        assert seen.tolist() == pytest.approx(reference.z_scores(rewards), abs=1e-6)


def test_advantages_of_two_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, math.nan], [0.3, 0.3, 0.3, 0.3]])
    root = math.sqrt(2)  # of the population: mean 1/3, std sqrt(2)/3
    torch.testing.assert_close(advantages(rewards), torch.tensor([[root, -root / 2, -root / 2, 0], [0] * 4]))
    torch.testing.assert_close(advantages(rewards, "mean"), torch.tensor([[2 / 3, -1 / 3, -1 / 3, 0], [0] * 4]))
    torch.testing.assert_close(advantages(rewards, "none"), torch.tensor([[1.0, 0, 0, 0], [0.3] * 4]))


def test_rounding_is_no_difference():
    """0.1 + 0.2 and 0.3 differ in the last bit, which a division by the deviation would make a whole advantage."""
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3]], dtype=torch.float64)
    assert rewards[0, 0] != rewards[0, 1]
    assert advantages(rewards).abs().max() == 0


def test_process_supervision_equals_the_loop():
    step_rewards, step_ends, lengths = [[0.2, 1.0], [0.5], [-1.0, 0.0, 0.7]], [[1, 3], [2], [0, 1, 4]], [4, 4, 5]
    padded = torch.tensor([[[*rewards, math.nan, math.nan][:3] for rewards in step_rewards]], dtype=torch.float64)
    ends = torch.tensor([[[*ends, 99, 99][:3] for ends in step_ends]])
    seen = process_advantages(padded, ends, torch.tensor([lengths]))
    assert seen.shape == (1, 3, 5) and seen[0, 1, 3] == 0, "after the last step nothing is to come"
    for row, expected, length in zip(seen[0], reference.step_advantages(step_rewards, step_ends, lengths), lengths, strict=True):
        assert row[:length].tolist() == pytest.approx(expected, abs=1e-6)
        assert row[length:].abs().sum() == 0


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_k3_is_never_negative_and_the_estimators_are_their_formulas(logp, ref):
    now, then = torch.tensor([[logp]], dtype=torch.float64), torch.tensor([[ref]], dtype=torch.float64)
    assert kl(now, then).item() >= 0 and kl(now.float(), then.float()).item() >= 0
    assert kl(now, then).item() == pytest.approx(reference.k3(logp, ref), rel=1e-6, abs=1e-6)
    assert kl(now, then, "k1").item() == logp - ref
    assert kl(now, then, "k2").item() == pytest.approx((logp - ref) ** 2 / 2)


def test_the_gradient_of_k3_vanishes_at_the_reference():
    here = NOW[MASK].unsqueeze(0).requires_grad_()
    kl(here, here.detach()).sum().backward()
    assert here.grad.abs().max() == 0


def test_k1_and_k3_estimate_the_divergence():
    """Weighed with the policy's own probabilities both are the KL itself; the mean of k2 is not."""
    policy, ref = (torch.tensor(parts, dtype=torch.float64) for parts in ([0.5, 0.3, 0.2], [0.3, 0.3, 0.4]))
    true = (policy * (policy / ref).log()).sum().item()
    for kind in ("k1", "k3"):
        assert (policy * kl(policy.log().unsqueeze(0), ref.log().unsqueeze(0), kind)).sum().item() == pytest.approx(true)


def test_importance_weights():
    behaviour = OLD - torch.log(torch.tensor([1.0, 1.5, 3.0, 0.5], dtype=torch.float64)).unsqueeze(1)
    for kind, expected in (("none", [1, 1, 1, 1]), ("truncate", [1, 1.5, 2, 0.5]), ("mask", [1, 1.5, 0, 0.5])):
        seen = importance_weights(behaviour, OLD.clone().requires_grad_(), MASK, kind, 2.0)
        assert not seen.requires_grad
        for row, length, weight in zip(seen, LENGTHS, expected, strict=True):
            assert row[:length].tolist() == pytest.approx([weight] * length)
    whole = importance_weights(behaviour, OLD, MASK, "truncate", 1e6, "output")
    assert whole[1].tolist() == pytest.approx([1.5**3] * 6)
    weights = importance_weights(behaviour, OLD, MASK, "truncate", 2.0).masked_fill(~MASK, math.nan)
    objective = PRESETS["deepseekmath"].model_copy(update={"kl_weight": 0.0, "correction": "truncate", "correction_cap": 2.0})
    parts = grpo_loss(objective, OLD, OLD, None, ADVANTAGES, MASK, weights)
    assert parts.loss.item() == pytest.approx(-sum(a * w for a, w in zip(A, [1, 1.5, 2, 0.5], strict=True)) / 4)
    assert parts.weight_mean.item() == pytest.approx((5 * 1 + 3 * 1.5 + 6 * 2 + 0.5) / 15)
    assert parts.weight_capped.item() == pytest.approx(6 / 15)
    assert (parts.weight_min.item(), parts.weight_max.item()) == pytest.approx((0.5, 2.0))


def test_a_far_ratio_stays_a_number():
    """A whole output of a thousand tokens may be e^200 times as likely as it was."""
    far = torch.full((1, 1000), -1.0, requires_grad=True)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    for advantage in (1.0, -1.0, 0.0):
        parts = grpo_loss(PRESETS["v2"], far, far.detach() - 0.2, far.detach() + 0.2, torch.tensor([advantage]), mask)
        (slope,) = torch.autograd.grad(parts.loss, far)
        assert parts.loss.isfinite() and slope.isfinite().all()
    assert ratios(far, far.detach() - 0.01, mask, "output")[0, 0].item() == pytest.approx(math.exp(10), rel=1e-3)


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (60, 0.0), (70, -0.25), (100, -1.0), (120, -1.0)])
def test_the_soft_penalty_of_long_answers(length, penalty):
    assert overlong_penalty(length, max_len=100, buffer=40) == penalty


def test_the_presets_are_the_papers_choices():
    assert {name: (p.ratio, p.advantage, p.normalise, p.clip_high, p.kl_weight) for name, p in PRESETS.items()} == {
        "v2": ("output", "zscore", "output", 0.2, 0.04),
        "deepseekmath": ("token", "zscore", "output", 0.2, 0.04),
        "dr_grpo": ("token", "mean", "constant", 0.2, 0.0),
        "dapo": ("token", "zscore", "tokens", 0.28, 0.0),
    }
    assert Objective() == PRESETS["deepseekmath"]
