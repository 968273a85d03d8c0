"""Router: affinities, device-limited selection and gates against the oracle (P eq 20-22, section 2.2.2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.model.config import ModelConfig
from dsv2.model.router import Router, route
from reference import moe
from reference.tiny import LITE, V2


@st.composite
def routings(draw):
    groups = draw(st.integers(1, 5))
    group_len = draw(st.integers(1, 6))
    topk_group = draw(st.integers(1, groups))
    limited = draw(st.booleans())
    reachable = topk_group * group_len if limited else groups * group_len
    config = {
        **V2,
        "n_routed_experts": groups * group_len,
        "n_group": groups,
        "topk_group": topk_group,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "num_experts_per_tok": draw(st.integers(1, reachable)),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
    }
    return config, draw(st.integers(1, 6)), draw(st.integers(0, 2**31 - 1))


@settings(deadline=None, max_examples=150)
@given(routings())
def test_routing_is_the_reference(case):
    config, num_tokens, seed = case
    # Coarse logits: equal affinities are common, so the lower index must win on both sides.
    logits = torch.randint(-4, 5, (num_tokens, config["n_routed_experts"]), generator=torch.Generator().manual_seed(seed)).float()
    ours = route(logits, ModelConfig.from_dict(config))
    assert ours.affinity.dtype == ours.gates.dtype == torch.float32
    for t in range(num_tokens):
        affinity = torch.softmax(logits[t].double(), dim=0)
        assert torch.allclose(ours.affinity[t].double(), affinity, atol=1e-6)
        # Selected from our own fp32 affinities, so that a rounding cannot make two equal ones differ.
        experts = moe.select(ours.affinity[t], config)
        assert ours.experts[t].tolist() == experts
        assert torch.allclose(ours.gates[t].double(), moe.gates(affinity, experts, config), rtol=1e-5)


# 16 experts in 8 groups of 2; the unrestricted top-6 lie in five groups.
SPREAD = [0.16, 0.09, 0.15, 0.01, 0.14, 0.02, 0.13, 0.03, 0.12, 0.04, 0.05, 0.005, 0.02, 0.015, 0.01, 0.01]


def test_device_limit_binds_where_the_global_best_span_five_groups():
    raw = {**V2, "n_routed_experts": 16, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6}
    affinity = torch.tensor([SPREAD])
    ours = route(affinity.log(), ModelConfig.from_dict(raw))
    assert ours.experts.tolist() == [[0, 2, 4, 1, 5, 3]]
    assert ours.gates[0].tolist() == pytest.approx([16 * SPREAD[i] for i in (0, 2, 4, 1, 5, 3)], rel=1e-5)


def test_a_group_is_worth_its_best_expert_not_its_sum():
    raw = {**V2, "n_routed_experts": 6, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 2}
    affinity = torch.tensor([[0.30, 0.01, 0.20, 0.19, 0.15, 0.15]])
    assert route(affinity.log(), ModelConfig.from_dict(raw)).experts.tolist() == [[0, 1]]


def test_unreachable_groups_stay_out_when_affinities_underflow():
    raw = {**V2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 200.0]])
    assert route(logits, ModelConfig.from_dict(raw)).experts.tolist() == [[0, 1], [3, 2]]


def test_router_computes_in_fp32_whatever_the_model_is():
    """Two experts closer than bf16 resolves: their order must survive in a bf16 model and under autocast."""
    config = ModelConfig.from_dict({**LITE, "num_experts_per_tok": 1})
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([1.0, 2.0**-7])
    weight = torch.zeros(8, 32)
    weight[3, 0], weight[5, 0], weight[5, 1] = 4.0, 4.0, 0.5  # logits 4 and 4 + 2^-8
    for dtype, autocast in [(torch.float32, True), (torch.bfloat16, False)]:
        router = Router(config).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            router.weight.copy_(weight)
            routing = router(x.to(dtype))
        assert routing.experts.tolist() == [[5]]
        assert routing.affinity.dtype == torch.float32


def test_gates_carry_gradient_to_all_affinities():
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    route(logits, ModelConfig.from_dict(V2)).gates.sum().backward()
    assert logits.grad is not None and (logits.grad != 0).all()
