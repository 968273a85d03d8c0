"""Optimiser steps against the oracle: gradient over micro-batches, clip, AdamW, decay on matrices only (P section 3.1.2; spec 10.11)."""

import pytest
import torch

from dsv2.data.batch import Batch
from dsv2.errors import Dsv2Error
from dsv2.model.dropping import Dropping
from dsv2.train import step as step_module
from dsv2.train.losses import BalanceSection, batch_losses
from dsv2.train.optimizer import OptimizerSection, make_optimizer, optimizer_tensors, restore_optimizer
from dsv2.train.step import TrainingDiverged, train_step
from reference import balance, training, transformer
from reference.subject import our_model
from reference.tiny import V2, random_state, split_experts, stack_experts

CONFIG = {**V2, "num_hidden_layers": 2}
RATES = [0.01, 0.02, 0.005]
SECTION = OptimizerSection()
BALANCE = BalanceSection(expert=0.1)


def batch_of(seed):
    """Two rows with unequal numbers of labels: a mean per micro-batch would weigh them wrongly."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 128, (2, 6), generator=generator)
    labels = torch.randint(0, 128, (2, 6), generator=generator)
    labels[0, 1:] = -100
    return Batch(tokens, labels, torch.arange(6).expand(2, 6), torch.zeros(2, 6, dtype=torch.int64))


def step(model, optimizer, batch, rate, *, rows=1, clip_norm=1.0):
    return train_step(model, optimizer, batch.split(rows), lr=rate, clip_norm=clip_norm, balance=BALANCE, autocast=None)


def reference_loss(leaves, batch):
    state = split_experts(leaves, CONFIG)
    rows = [transformer.forward(state, CONFIG, tokens) for tokens in batch.tokens.tolist()]
    hidden = torch.cat([row.hidden for row in rows])
    loss = training.cross_entropy(hidden, state["lm_head.weight"], batch.labels.flatten())
    return loss, 0.1 * balance.batch_mean([balance.expert_loss(row.affinities[0], row.experts[0]) for row in rows])


def reference_step(leaves, moments, batch, number, rate):
    """One update in place; returns loss, balance loss and the gradient norm before clipping."""
    loss, balance_loss = reference_loss(leaves, batch)
    gradients, norm = training.clip(torch.autograd.grad(loss + balance_loss, list(leaves.values())), 1.0)
    for name, gradient in zip(leaves, gradients, strict=True):
        first, second = moments[name]
        new, first, second = training.adamw_step(leaves[name].detach(), gradient, first, second, number, rate=rate)
        leaves[name], moments[name] = new.requires_grad_(), (first, second)
    return loss.item(), balance_loss.item(), norm


@pytest.mark.parametrize("rows", [1, 2], ids=["two-micro-batches", "one-micro-batch"])
def test_three_steps(rows):
    state = random_state(CONFIG)
    leaves = {name: tensor.requires_grad_() for name, tensor in stack_experts(state, CONFIG).items()}
    moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor)) for name, tensor in leaves.items()}
    model = our_model(state, CONFIG)
    optimizer = make_optimizer(model, SECTION)
    for number, rate in enumerate(RATES, start=1):
        expected = reference_step(leaves, moments, batch_of(number), number, rate)
        result = step(model, optimizer, batch_of(number), rate, rows=rows)
        assert (result.loss, result.balance_loss, result.grad_norm) == pytest.approx(expected, rel=1e-5)
        assert result.grad_norm > 1  # the clip is at work
        assert result.load.shares.shape == (1, 8)
        assert result.load.shares.sum().item() == pytest.approx(1.0)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, leaves[name], rtol=0, atol=1e-6), name


def test_matrices_decay_and_gains_do_not():
    model = our_model(random_state(CONFIG), CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, SECTION)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1.0 if parameter.dim() == 1 else 1 - 0.5 * 0.1
        assert torch.allclose(parameter, before[name] * kept), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_moments_restored_by_name_continue_the_run():
    state = random_state(CONFIG)
    undisturbed, resumed = our_model(state, CONFIG), our_model(state, CONFIG)
    optimizer = make_optimizer(undisturbed, SECTION)
    first_half = make_optimizer(resumed, SECTION)
    for model, own in ((undisturbed, optimizer), (resumed, first_half)):
        step(model, own, batch_of(1), 0.01)
    second_half = make_optimizer(resumed, SECTION)
    restore_optimizer(resumed, second_half, optimizer_tensors(resumed, first_half))
    step(undisturbed, optimizer, batch_of(2), 0.02)
    step(resumed, second_half, batch_of(2), 0.02)
    for (name, a), b in zip(undisturbed.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimiser_that_never_stepped_is_restored_as_it_was():
    model = our_model(random_state(CONFIG), CONFIG)
    optimizer = make_optimizer(model, SECTION)
    restore_optimizer(model, optimizer, optimizer_tensors(model, make_optimizer(model, SECTION)))
    assert not optimizer.state
    step(model, optimizer, batch_of(1), 0.01)


def test_moments_of_another_model_are_refused_by_name():
    model = our_model(random_state(CONFIG), CONFIG)
    optimizer = make_optimizer(model, SECTION)
    step(model, optimizer, batch_of(1), 0.01)
    tensors = optimizer_tensors(model, optimizer)
    del tensors["model.norm.weight.exp_avg_sq"]
    with pytest.raises(Dsv2Error, match=r"model\.norm\.weight\.exp_avg_sq"):
        restore_optimizer(model, make_optimizer(model, SECTION), tensors)


def test_a_step_that_diverges_changes_nothing():
    model = our_model(random_state(CONFIG), CONFIG)
    optimizer = make_optimizer(model, SECTION)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(Dsv2Error, match="diverged"):
        step(model, optimizer, batch_of(1), 0.01)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
        assert parameter.grad is None


def test_dropping_follows_its_sequences_into_the_micro_batches(monkeypatch):
    seen = []
    real = step_module.batch_losses

    def watch(model, batch, balance, *, dropping, recompute):
        seen.append((batch.tokens.tolist(), dropping.protected.tolist(), dropping.capacity_factor))
        return real(model, batch, balance, dropping=dropping, recompute=recompute)

    monkeypatch.setattr(step_module, "batch_losses", watch)
    model, batch = our_model(random_state(CONFIG), CONFIG), batch_of(1)
    result = train_step(
        model, make_optimizer(model, SECTION), batch.split(1), lr=0.01, clip_norm=1.0, balance=BALANCE, autocast=None,
        dropping=Dropping(0.5, torch.tensor([False, True])),
    )  # fmt: skip
    assert seen == [([batch.tokens[0].tolist()], [False], 0.5), ([batch.tokens[1].tolist()], [True], 0.5)]
    assert result.load is not None and result.load.dropped is not None
    # 6 tokens of 3 experts on 2 devices, budget round(0.5 * 9): the free sequence sheds what exceeds 2 x 4 of its 18, the other nothing
    assert result.load.dropped.sum() >= 18 - 2 * 4
    assert result.load.dropped.sum() <= 18


def test_a_step_that_is_not_accepted_changes_nothing():
    model = our_model(random_state(CONFIG), CONFIG)
    optimizer = make_optimizer(model, SECTION)
    step(model, optimizer, batch_of(1), 0.01)
    before = {name: value.clone() for name, value in [*model.named_parameters(), *optimizer_tensors(model, optimizer).items()]}
    judged = []
    result = train_step(
        model, optimizer, [batch_of(2)], lr=0.01, clip_norm=1.0, balance=BALANCE, autocast=None,
        accept=lambda loss, grad_norm: judged.append((loss, grad_norm)) or False,
    )  # fmt: skip
    assert result.skipped and judged == [(result.loss, result.grad_norm)]
    for name, value in [*model.named_parameters(), *optimizer_tensors(model, optimizer).items()]:
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not step(model, optimizer, batch_of(2), 0.01).skipped


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_recompute_gives_the_same_gradients_to_the_bit(autocast):
    config = {**CONFIG, "num_hidden_layers": 3}
    gradients = []
    for recompute in (False, True):
        model = our_model(random_state(config), config, torch.float32)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            losses = batch_losses(model, batch_of(1), BALANCE, dropping=Dropping(0.8, torch.tensor([False, True])), recompute=recompute)
        (losses.nll + losses.balance).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


def test_bf16_has_fp32_masters_gradients_and_moments():
    model = our_model(random_state(CONFIG), CONFIG, torch.float32)
    optimizer = make_optimizer(model, SECTION)
    dtypes = set()
    handles = [p.register_post_accumulate_grad_hook(lambda p: dtypes.add(p.grad.dtype)) for p in model.parameters()]
    for rate in RATES:  # steps so small that bf16 weights would not move
        train_step(model, optimizer, [batch_of(1)], lr=rate * 1e-6, clip_norm=1.0, balance=BALANCE, autocast=torch.bfloat16)
    assert dtypes == {torch.float32} and len(handles) == len(list(model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for value in optimizer_tensors(model, optimizer).values()} == {torch.float32}
    start = our_model(random_state(CONFIG), CONFIG, torch.float32).lm_head.weight
    moved = (model.lm_head.weight != start).double().mean()
    assert moved > 0.2 and (model.lm_head.weight.bfloat16() != start.bfloat16()).double().mean() < moved / 20


def test_divergence_says_where():
    model = our_model(random_state(CONFIG), CONFIG)
    optimizer = make_optimizer(model, SECTION)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(TrainingDiverged, match="micro-batch 0"):
        step(model, optimizer, batch_of(1), 0.01)
    model = our_model(random_state(CONFIG), CONFIG)
    name, parameter = list(model.named_parameters())[5]
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingDiverged, match=f"first at {name}"):
        step(model, make_optimizer(model, SECTION), batch_of(1), 0.01)
