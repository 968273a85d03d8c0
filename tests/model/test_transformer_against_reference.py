"""The whole model against the oracle: logits, router statistics, gradients, documents, causality."""

import pytest
import torch

from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from reference import transformer
from reference.subject import our_model
from reference.tiny import CONFIGS, V2, random_state, split_experts, stack_experts

BATCH = [[0, 5, 17, 99, 5, 2, 64, 127, 3, 3], [1, 1, 80, 42, 7, 7, 9, 120, 0, 31]]
POSITIONS = [[0, 1, 2, 3, 50, 1000, 4095, 4096, 4097, 5000], [7, 8, 9, 10, 11, 12, 13, 4500, 4600, 4700]]


def reference_logits(state, config, batch, positions=None, documents=None):
    positions, documents = positions or [None] * len(batch), documents or [None] * len(batch)
    return [transformer.forward(state, config, *row) for row in zip(batch, positions, documents, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_router_statistics(name, dtype):
    config = CONFIGS[name]
    state = random_state(config)
    expected = reference_logits(state, config, BATCH, POSITIONS)
    model = our_model(state, config, dtype)
    with torch.no_grad():
        output = model(torch.tensor(BATCH), positions=torch.tensor(POSITIONS))
        logits = model.logits(output.hidden)
    assert logits.dtype == output.hidden.dtype == dtype
    for row, reference in enumerate(expected):
        # The angles are fp32 in every dtype (as DeepSeek trained), which is what is left at position 5000.
        assert torch.allclose(logits[row].double(), reference.logits, rtol=0, atol=1e-4)
        assert torch.allclose(output.hidden[row].double(), reference.hidden, rtol=0, atol=1e-4)
    moe_layers = [i for i in range(config["num_hidden_layers"]) if transformer.is_moe_layer(i, config)]
    assert [stats.layer for stats in output.router_stats] == moe_layers
    for index, stats in enumerate(output.router_stats):
        for row, reference in enumerate(expected):
            assert torch.allclose(stats.affinity[row].double(), reference.affinities[index], rtol=0, atol=1e-5)
            assert torch.equal(stats.experts[row], reference.experts[index])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name):
    """Every parameter's gradient of a loss on logits and affinities, ours written by hand in places, against autograd of the oracle."""
    config = CONFIGS[name]
    state = random_state(config)
    leaves = {key: tensor.requires_grad_() for key, tensor in stack_experts(state, config).items()}
    model = our_model(state, config)
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(2, 10, config["vocab_size"], generator=generator, dtype=torch.float64)
    affinity_mix = torch.randn(10, config["n_routed_experts"], generator=generator, dtype=torch.float64)

    output = model(torch.tensor(BATCH))
    ours = (model.logits(output.hidden) * mix).sum() + sum((stats.affinity * affinity_mix).sum() for stats in output.router_stats)
    ours.backward()
    rows = reference_logits(split_experts(leaves, config), config, BATCH)
    expected = sum((row.logits * m).sum() + sum((a * affinity_mix).sum() for a in row.affinities) for row, m in zip(rows, mix, strict=True))
    expected.backward()

    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == leaves.keys()
    for key, leaf in leaves.items():
        error = (parameters[key].grad - leaf.grad).norm() / leaf.grad.norm()
        assert error < 1e-5, key


DOCUMENTS = [
    [[0] * 10, [0] * 10],  # whole rows
    [[0] * 3 + [1] * 7, [0] * 7 + [1] * 3],
    [[0, 1, 2, 2, 3, 3, 3, 4, 4, 5], [0] * 9 + [1]],  # single tokens, several runs of one length
]


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_documents_are_separate_sequences(documents):
    state = random_state(V2)
    positions = [[t - row.index(row[t]) for t in range(len(row))] for row in documents]
    model = our_model(state, V2)
    output = model(torch.tensor(BATCH), positions=torch.tensor(positions), document_ids=torch.tensor(documents))
    packed = model.logits(output.hidden)
    for row, expected in enumerate(reference_logits(state, V2, BATCH, positions, documents)):
        assert torch.allclose(packed[row], expected.logits, rtol=0, atol=1e-5)
    for row, ids in enumerate(documents):
        for document in set(ids):
            own = [t for t, d in enumerate(ids) if d == document]
            alone = model.logits(model(torch.tensor([[BATCH[row][t] for t in own]])).hidden)
            assert torch.allclose(packed[row, own], alone[0], rtol=0, atol=1e-9)


def test_gradients_do_not_cross_documents():
    state = random_state(V2)
    model = our_model(state, V2)
    embedding = model.model.embed_tokens.weight
    documents = torch.tensor([[0] * 4 + [1] * 6])
    output = model(torch.tensor([list(range(10))]), document_ids=documents)
    model.logits(output.hidden)[0, 6].sum().backward()  # token 6 is the third of document 1
    touched = embedding.grad[:10].abs().sum(dim=1) > 0
    assert touched.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_no_token_sees_the_future():
    state = random_state(V2)
    model = our_model(state, V2)
    changed = [row[:5] + [11, 12, 13, 14, 15] for row in BATCH]
    with torch.no_grad():
        before, after = (model.logits(model(torch.tensor(b)).hidden) for b in (BATCH, changed))
    assert torch.allclose(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_dense_model_and_model_without_shared_experts():
    """n_routed_experts null makes every layer dense; n_shared_experts null or 0 leaves the routed experts alone."""
    dense = {**V2, "n_routed_experts": None, "first_k_dense_replace": 3}
    state = random_state(dense)
    expected = transformer.forward(state, dense, BATCH[0]).logits
    model = our_model(state, dense)
    assert torch.allclose(model.logits(model(torch.tensor(BATCH[:1])).hidden)[0], expected, atol=1e-5)
    routed_only = {**V2, "n_shared_experts": 0}
    state = {name: t for name, t in random_state(routed_only).items() if "shared_experts" not in name}
    expected = transformer.forward(state, routed_only, BATCH[0]).logits
    model = our_model(state, routed_only)
    assert torch.allclose(model.logits(model(torch.tensor(BATCH[:1])).hidden)[0], expected, atol=1e-5)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    config = {**V2, "topk_method": "greedy", "num_experts_per_tok": 1}
    state = random_state(config)
    model = our_model(state, config)
    output = model(torch.tensor([[3]]))
    model.logits(output.hidden).sum().backward()
    chosen = output.router_stats[0].experts.flatten().tolist()
    gradient = model.model.layers[1].mlp.experts.down_proj.grad.flatten(1).abs().sum(dim=1)
    assert [bool(g) for g in gradient] == [e in chosen for e in range(8)]


def test_initial_weights_follow_the_recipe_and_the_seed():
    config = ModelConfig.from_dict({**V2, "initializer_range": 0.006, "hidden_size": 64, "intermediate_size": 256})
    first, again, other = Transformer(config), Transformer(config), Transformer(config)
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        initialise(model, seed)
    for name, parameter in first.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.2), name
            assert not torch.equal(parameter, other.get_parameter(name))
        assert torch.equal(parameter, again.get_parameter(name))
