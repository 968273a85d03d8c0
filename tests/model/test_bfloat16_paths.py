"""What runs in bf16 only (tiles of rows per expert): exact in double, and bf16 near fp64 on the real path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.kernels import attention, row_tile
from dsv2.model import experts as model_experts
from dsv2.model.experts import sort_by_expert
from reference import transformer
from reference.subject import our_model
from reference.tiny import LITE, V2, random_state, split_experts, stack_experts

BATCH = [[0, 5, 17, 99, 5, 2, 64, 127, 3, 3], [1, 1, 80, 42, 7, 7, 9, 120, 0, 31]]
DOCUMENTS = [[0] * 4 + [1] * 6, [0] * 10]


@settings(deadline=None, max_examples=60)
@given(chosen=st.lists(st.integers(0, 4), min_size=1, max_size=30), tile=st.integers(1, 7))
def test_rows_lie_by_expert_in_whole_tiles(chosen, tile):
    flat = torch.tensor(chosen)
    order, inverse, counts = sort_by_expert(flat, 5, tile)
    assert order[inverse].tolist() == list(range(len(chosen)))
    assert len(order) == sum(counts)
    expert_of_row = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    assert torch.equal(expert_of_row[inverse], flat)
    assert all(count % tile == 0 and count - chosen.count(expert) in range(tile) for expert, count in enumerate(counts))


@pytest.mark.parametrize("tile", [1, 3, 16])
def test_bf16_paths_in_double_are_the_reference(tile, monkeypatch):
    """Forward and every gradient, with the paths switched on that bf16 would take."""
    monkeypatch.setattr(model_experts, "row_tile", lambda rows: tile)
    monkeypatch.setattr(attention, "_BLOCK", 4)
    state = random_state(V2)
    leaves = {name: tensor.requires_grad_() for name, tensor in stack_experts(state, V2).items()}
    model = our_model(state, V2)
    mix = torch.randn(2, 10, 128, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    positions = [[*range(4), *range(6)], [*range(10)]]
    (model.logits(model(torch.tensor(BATCH), torch.tensor(positions), torch.tensor(DOCUMENTS)).hidden) * mix).sum().backward()
    rows = [transformer.forward(split_experts(leaves, V2), V2, *row) for row in zip(BATCH, positions, DOCUMENTS, strict=True)]
    sum((row.logits * m).sum() for row, m in zip(rows, mix, strict=True)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - leaves[name].grad).norm() < 1e-5 * leaves[name].grad.norm(), name


def test_a_bfloat16_step_is_near_the_exact_one():
    """Every expert chosen, so that no rounding flips a choice; 128 tokens in rows of 64: both bf16 paths run."""
    config = {**LITE, "num_experts_per_tok": 8}
    state = random_state(config)
    tokens = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    mix = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(1))
    exact, rounded = our_model(state, config), our_model(state, config, torch.float32)
    (exact.logits(exact(tokens).hidden) * mix).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert row_tile(torch.zeros(128, 32)) > 1
        output = rounded(tokens)
        (rounded.logits(output.hidden).float() * mix).sum().backward()
    assert all(stats.affinity.dtype == torch.float32 for stats in output.router_stats)
    for name, parameter in exact.named_parameters():
        error = (rounded.get_parameter(name).grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.05, (name, error)
