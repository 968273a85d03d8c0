"""Optimiser steps against the oracle: gradient over micro-batches, clip, AdamW, decay on matrices only (P section 3.1.2; spec 10.11)."""

import pytest
import torch

from dsv2.data.batch import Batch
from dsv2.errors import Dsv2Error
from dsv2.train.losses import BalanceSection
from dsv2.train.optimizer import AdamWSection, make_optimizer, optimizer_tensors, restore_optimizer
from dsv2.train.step import train_step
from reference import balance, training, transformer
from reference.subject import our_model
from reference.tiny import V2, random_state, split_experts, stack_experts

CONFIG = {**V2, "num_hidden_layers": 2}
RATES = [0.01, 0.02, 0.005]
SECTION = AdamWSection()
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
        assert result.load.shape == (1, 8)
        assert result.load.sum().item() == pytest.approx(1.0)
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
