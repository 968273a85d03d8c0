"""The training loss of a packed batch against the oracle: cross entropy of next tokens in a document, three balance losses per layer."""

import math
from dataclasses import replace

import pytest
import torch

from dsv2.data.batch import IGNORE, Batch
from dsv2.model.config import ModelConfig
from dsv2.model.dropping import Dropping
from dsv2.train.losses import BalanceSection, balance_loss, batch_losses, token_nll
from reference import balance, training, transformer
from reference.subject import our_model
from reference.tiny import CONFIGS, random_state

TOKENS = [[0, 5, 17, 99, 1, 0, 64, 127, 3, 1], [0, 1, 0, 42, 7, 7, 9, 120, 2, 31]]
LABELS = [[5, 17, 99, 1, -100, 64, 127, 3, 1, -100], [1, -100, 42, 7, 7, 9, 120, 2, 31, 6]]
DOCUMENTS = [[0] * 5 + [1] * 5, [0] * 2 + [1] * 8]
POSITIONS = [[0, 1, 2, 3, 4] * 2, [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]]
ALPHAS = BalanceSection(expert=0.3, device=0.05, communication=0.02)


def packed_batch():
    return Batch(*(torch.tensor(part) for part in (TOKENS, LABELS, POSITIONS, DOCUMENTS)))


def reference_losses(state, config):
    """Summed cross entropy, and the weighted balance losses: per sequence, averaged over sequences, summed over layers."""
    rows = [transformer.forward(state, config, *row) for row in zip(TOKENS, POSITIONS, DOCUMENTS, strict=True)]
    head = state["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    nll = 0.0
    for row, labels in zip(rows, LABELS, strict=True):
        nll = nll + training.cross_entropy(row.hidden, head, torch.tensor(labels)) * sum(label != IGNORE for label in labels)
    groups = config["n_group"], config["topk_group"]
    total = 0.0
    for layer in range(len(rows[0].affinities)):
        pairs = [(row.affinities[layer], row.experts[layer]) for row in rows]
        total = total + 0.3 * balance.batch_mean([balance.expert_loss(*pair) for pair in pairs])
        total = total + 0.05 * balance.batch_mean([balance.device_loss(*pair, groups[0]) for pair in pairs])
        total = total + 0.02 * balance.batch_mean([balance.communication_loss(*pair, *groups) for pair in pairs])
    return nll, total


@pytest.mark.parametrize("name", ["lite", "v2", "four-groups", "tied-head"])
def test_losses_of_a_packed_batch(name):
    config = CONFIGS[name]
    state = random_state(config)
    expected_nll, expected_balance = reference_losses(state, config)
    ours = batch_losses(our_model(state, config), packed_batch(), ALPHAS)
    assert ours.nll.item() == pytest.approx(expected_nll.item(), rel=1e-6)
    assert ours.balance.item() == pytest.approx(expected_balance.item(), rel=1e-6)
    assert len(ours.router_stats) == ModelConfig.from_dict(config).num_moe_layers


def test_balance_of_v2_when_routing_is_even():
    """All three parts at their minimum of 1: the sum of the weights, once per layer."""
    from dsv2.model.router import RouterStats

    affinity = torch.full((2, 8, 8), 1 / 8)
    experts = torch.stack([torch.arange(8), (torch.arange(8) + 2) % 8], dim=-1).expand(2, 8, 2)
    config = ModelConfig.from_dict({**CONFIGS["four-groups"], "num_experts_per_tok": 2})
    weights = BalanceSection(expert=0.003, device=0.05, communication=0.02)
    stats = [RouterStats(layer, affinity, experts) for layer in range(3)]
    assert balance_loss(stats, weights, config).item() == pytest.approx(3 * 0.073, rel=1e-5)
    assert balance_loss(stats, BalanceSection(expert=0, device=0, communication=0), config).item() == 0
    assert balance_loss([], weights, config).item() == 0


def test_balance_is_of_the_choice_before_dropping():
    """f counts what the router chose (spec 10.9): the same losses whatever is dropped."""
    config = CONFIGS["four-groups"]
    model, batch = our_model(random_state(config), config), packed_batch()
    plain = model.model.layers[1].mlp(torch.randn(2, 10, config["hidden_size"], dtype=torch.float64))[1]
    dropped = replace(plain, kept=torch.zeros_like(plain.experts, dtype=torch.bool))
    assert balance_loss([dropped], ALPHAS, model.config).item() == balance_loss([plain], ALPHAS, model.config).item()
    losses = batch_losses(model, batch, ALPHAS, dropping=Dropping(0.5, torch.tensor([False, True])))
    assert all(layer.kept is not None and not layer.kept.all() for layer in losses.router_stats)
    assert losses.nll.item() != batch_losses(model, batch, ALPHAS).nll.item()


@pytest.mark.parametrize("name", ["v2", "four-groups"])
def test_pooled_losses_are_those_of_one_long_sequence(name):
    config = CONFIGS[name]
    state = random_state(config)
    pooled = ALPHAS.model_copy(update={"scope": "micro-batch"})
    ours = batch_losses(our_model(state, config), packed_batch(), pooled)
    rows = [transformer.forward(state, config, *row) for row in zip(TOKENS, POSITIONS, DOCUMENTS, strict=True)]
    expected, groups = 0.0, (config["n_group"], config["topk_group"])
    for layer in range(len(rows[0].affinities)):
        both = torch.cat([row.affinities[layer] for row in rows]), torch.cat([row.experts[layer] for row in rows])
        expected = expected + 0.3 * balance.expert_loss(*both)
        expected = expected + 0.05 * balance.device_loss(*both, groups[0]) + 0.02 * balance.communication_loss(*both, *groups)
    assert ours.balance.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.balance.item() != pytest.approx(batch_losses(our_model(state, config), packed_batch(), ALPHAS).balance.item(), rel=1e-4)


def test_a_uniform_model_costs_ln_of_the_vocabulary():
    config = CONFIGS["lite"]
    model = our_model(random_state(config), config, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    batch = packed_batch()
    nll = token_nll(model, model(batch.tokens).hidden, batch.labels)
    assert nll.item() / batch.num_labels == pytest.approx(math.log(config["vocab_size"]))
