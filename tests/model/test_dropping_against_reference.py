"""Device-level token dropping against the oracle: what stays, what a layer computes, gradients (P section 2.2.4; spec 3.4, 10.8)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.model.config import ModelConfig
from dsv2.model.dropping import Dropping, device_budget, drop_assignments, keep_within_budget
from dsv2.model.moe import MoE
from dsv2.model.router import Routing, route
from reference import dropping as oracle
from reference.subject import our_model
from reference.tiny import CONFIGS, V2, random_state, split_experts, stack_experts


@st.composite
def micro_batches(draw):
    """Routing of a few sequences with coarse affinities, so that equal ones are common; which sequences are protected; a capacity."""
    groups, group_len = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    chosen = draw(st.integers(1, groups * group_len))
    config = ModelConfig.from_dict(
        {**V2, "topk_method": "greedy", "n_routed_experts": groups * group_len, "n_group": groups, "num_experts_per_tok": chosen}
    )
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    # A common pull to the first experts makes devices overflow.
    logits = torch.randint(-1, 2, (batch * length, groups * group_len), generator=generator) - draw(
        st.sampled_from([0.0, 0.5])
    ) * torch.arange(groups * group_len)
    protected = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    return config, route(logits.float(), config), Dropping(draw(st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.0])), protected)


@settings(deadline=None, max_examples=200)
@given(micro_batches())
def test_what_stays_is_the_reference(case):
    config, routing, dropping = case
    kept = drop_assignments(routing, dropping, config)
    per_token = dropping.protected.repeat_interleave(len(routing.experts) // len(dropping.protected)).tolist()
    assert kept.tolist() == oracle.kept(
        routing.affinity.tolist(), routing.experts.tolist(), per_token, n_group=config.n_group, capacity_factor=dropping.capacity_factor
    )


@settings(deadline=None, max_examples=200)
@given(micro_batches())
def test_what_always_holds(case):
    config, routing, dropping = case
    kept = drop_assignments(routing, dropping, config)
    num_tokens, chosen = routing.experts.shape
    protected = dropping.protected.repeat_interleave(num_tokens // len(dropping.protected)).unsqueeze(-1).expand(-1, chosen)
    budget = device_budget(num_tokens, chosen, config.n_group, dropping.capacity_factor)
    affinity, devices = routing.affinity.gather(1, routing.experts), routing.experts // (routing.affinity.shape[-1] // config.n_group)
    assert kept[protected].all()
    for device in range(config.n_group):
        here = devices == device
        assert (here & kept).sum() <= max(budget, int((here & protected).sum())), "above budget only by what is protected"
        dropped, free = here & ~kept, here & kept & ~protected
        if dropped.any():
            assert (here & kept).sum() >= budget, "nothing is dropped below the budget"
            if free.any():
                assert affinity[dropped].max() <= affinity[free].min(), "the lowest go first"
    assert drop_assignments(routing, Dropping(1000.0, dropping.protected), config).all()
    assert drop_assignments(routing, Dropping(dropping.capacity_factor, torch.ones_like(dropping.protected)), config).all()


@settings(deadline=None, max_examples=50)
@given(micro_batches())
def test_each_device_alone_decides_as_the_one_process_does(case):
    """What expert parallelism will do: a device sees its own assignments only, in the same order."""
    config, routing, dropping = case
    num_tokens, chosen = routing.experts.shape
    whole = drop_assignments(routing, dropping, config).flatten()
    protected = dropping.protected.repeat_interleave(num_tokens // len(dropping.protected) * chosen)
    affinity = routing.affinity.gather(1, routing.experts).flatten()
    devices = (routing.experts // (routing.affinity.shape[-1] // config.n_group)).flatten()
    budget = device_budget(num_tokens, chosen, config.n_group, dropping.capacity_factor)
    for device in range(config.n_group):
        own = devices == device
        alone = keep_within_budget(affinity[own], devices[own] * 0, protected[own], num_devices=1, budget=budget)
        assert alone.tolist() == whole[own].tolist()


def test_worked_case():
    """Six tokens, top 2 of 4 experts on 2 devices: budget ceil(12 / 2) = 6; device 0 is sent 9 and sheds 3, one sequence is protected."""
    affinity = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.05, 0.05], [0.3, 0.25, 0.25, 0.2]] * 2)
    experts = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1], [0, 2], [1, 2]])
    routing = Routing(affinity, experts, affinity.gather(1, experts))
    config = ModelConfig.from_dict({**V2, "topk_method": "greedy", "n_routed_experts": 4, "num_experts_per_tok": 2})
    assert device_budget(6, 2, 2, 1.0) == 6
    assert device_budget(5, 3, 4, 1.0) == 4 and device_budget(6, 2, 2, 1.5) == 9
    nobody = drop_assignments(routing, Dropping(1.0, torch.tensor([False, False])), config)
    # affinities on device 0: .4 .3 | .5 .4 | .3 -- | .4 .3 | .5 -- | .25 --: out go .25 and the two last of the three .3
    assert nobody.tolist() == [[True, True], [True, True], [False, True], [True, False], [True, True], [False, True]]
    second = drop_assignments(routing, Dropping(1.0, torch.tensor([False, True])), config)
    # the last three tokens hold 4 of the 6 places whatever their affinity; .5 and the first of two .4 take the others
    assert second.tolist() == [[True, False], [True, False], [False, True], [True, True], [True, True], [True, True]]


@pytest.mark.parametrize("name", ["v2", "four-groups"])
@pytest.mark.parametrize("factor", [0.4, 1.0])
def test_a_layer_that_drops_is_the_reference(name, factor):
    config, prefix = CONFIGS[name], "model.layers.1.mlp."
    leaves = {key: tensor.requires_grad_() for key, tensor in stack_experts(random_state(config), config).items()}
    u = torch.randn(3, 7, config["hidden_size"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    protected = torch.tensor([False, True, False])
    expected, kept = oracle.layer(
        u.flatten(0, 1), split_experts(leaves, config), prefix, config, protected.repeat_interleave(7).tolist(), factor
    )
    layer = our_model(random_state(config), config).model.layers[1].mlp
    assert isinstance(layer, MoE)
    ours, stats = layer(u, Dropping(factor, protected))
    assert stats.kept is not None and not stats.kept.all()
    assert stats.kept.flatten(0, 1).tolist() == kept
    assert torch.allclose(ours.flatten(0, 1), expected, rtol=1e-6, atol=1e-9)
    mix = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (ours.flatten(0, 1) * mix).sum().backward()
    names = [key for key in leaves if key.startswith(prefix)]
    gradients = torch.autograd.grad((expected * mix).sum(), [leaves[key] for key in names], allow_unused=True)
    for key, gradient in zip(names, gradients, strict=True):
        found = layer.get_parameter(key.removeprefix(prefix)).grad
        assert found is not None and gradient is not None, key
        assert torch.allclose(found, gradient, rtol=1e-5, atol=1e-8), key


def test_nothing_dropped_is_no_dropping_bit_for_bit():
    config = CONFIGS["four-groups"]
    tokens = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for dropping in (None, Dropping(100.0, torch.tensor([False, True]))):
        model = our_model(random_state(config), config, torch.float32)
        output = model(tokens, dropping=dropping)
        output.hidden.square().sum().backward()
        results.append([output.hidden, *(parameter.grad for parameter in model.parameters())])
    for plain, wide in zip(*results, strict=True):
        assert (plain is None and wide is None) or torch.equal(plain, wide)


def test_gates_that_stay_are_not_renormalised_and_the_rest_still_acts():
    """All routed work dropped: the shared experts' output is what is left, to the bit."""
    config = CONFIGS["v2"]
    layer = our_model(random_state(config), config).model.layers[1].mlp
    assert isinstance(layer, MoE) and layer.shared_experts is not None
    x = torch.randn(2, 3, config["hidden_size"], dtype=torch.float64)
    out, stats = layer(x, Dropping(1e-9, torch.tensor([False, False])))
    assert stats.kept is not None and not stats.kept.any()
    assert torch.equal(out, layer.shared_experts(x))
