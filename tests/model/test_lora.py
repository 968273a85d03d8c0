"""Adapters: nothing changes at their beginning, the sum that is trained is the sum that is merged, and merging leaves no trace."""

import pytest
import torch

from dsv2.errors import ConfigError
from dsv2.model.init import initialise
from dsv2.model.lora import Adapter, LoraSection, adapt, adapter_tensors, is_adapted, merged
from dsv2.model.transformer import Transformer
from dsv2.presets import preset

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16, "vocab_size": 128,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)


def model_with(section: LoraSection | None, seed: int = 0) -> Transformer:
    model = Transformer(preset("tour", **SMALL))
    initialise(model, seed)
    if section is not None:
        adapt(model, section, seed)
    return model


def logits(model: Transformer) -> torch.Tensor:
    return model.logits(model(TOKENS).hidden)


def trained(recompute: bool = False) -> Transformer:
    """A model whose adapters had a gradient step."""
    model = model_with(LoraSection(rank=4, alpha=8))
    for _ in range(2):  # A has no gradient while B is zero
        output = model(TOKENS, recompute=recompute)
        model.logits(output.hidden).square().mean().backward()
        with torch.no_grad():
            for parameter in adapter_tensors(model).values():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    return model


def test_training_begins_at_the_model_itself():
    torch.testing.assert_close(logits(model_with(LoraSection(rank=4, alpha=8))), logits(model_with(None)), rtol=0, atol=1e-6)


def test_only_adapters_are_trained_and_every_one_of_them():
    model = trained()
    model.logits(model(TOKENS).hidden).square().mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(adapter_tensors(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in adapter_tensors(model).values())
    assert {name.split(".", 3)[3] for name in with_gradient if ".layers.1.mlp.experts." in name} == {
        "mlp.experts.gate_up_proj_adapter.a", "mlp.experts.gate_up_proj_adapter.b",
        "mlp.experts.down_proj_adapter.a", "mlp.experts.down_proj_adapter.b",
    }  # fmt: skip


def test_the_merged_model_is_the_trained_one_and_merging_leaves_no_trace():
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = Transformer(model.config)
    with merged(model):
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if "_adapter" not in name})
        inside = logits(model)
        assert model.model.layers[0].self_attn.o_proj.weight is model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    torch.testing.assert_close(logits(plain), inside, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), inside, rtol=0, atol=1e-6)
    assert (inside - logits(model_with(None))).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert is_adapted(model)
    assert not is_adapted(plain)


def test_recomputed_blocks_give_the_same_gradients():
    kept, computed_again = trained(), trained(recompute=True)
    for name, value in adapter_tensors(kept).items():
        assert torch.equal(value, adapter_tensors(computed_again)[name]), name


def test_the_difference_is_alpha_over_rank_times_b_a():
    weight = torch.randn(3, 6, 5)
    adapter = Adapter(weight, rank=2, scale=8 / 2, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(adapter.b)
    expected = torch.stack([w + 4 * b @ a for w, a, b in zip(weight, adapter.a, adapter.b, strict=True)])
    torch.testing.assert_close(adapter(weight), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(weight), adapter(weight).float())


def test_targets_and_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"lora.targets: 'self_attn.k_proj' names no matrix"):
        model_with(LoraSection(rank=4, alpha=8, targets=("self_attn.o_proj", "self_attn.k_proj")))
    with pytest.raises(ConfigError, match="lora.rank = 16 is no less than the sizes"):
        model_with(LoraSection(rank=16, alpha=8, targets=("mlp.experts",)))
    chosen = model_with(LoraSection(rank=4, alpha=8, targets=("self_attn.o_proj",)))
    assert len(adapter_tensors(chosen)) == 2 * SMALL["num_hidden_layers"]
