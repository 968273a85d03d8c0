"""Muon: each matrix moves as torch.optim.Muon moves it alone, every parameter has one optimiser, and runs learn, stop and resume."""

import pytest
import torch
from training_runs import guarded, recipe, stopping_after, without_times

from dsv2.checkpoint.layout import load_training
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import CheckpointError, ConfigError
from dsv2.files import sha256_of
from dsv2.metrics import read_metrics
from dsv2.train.muon import Cut, MuonWithAdamW, hidden_matrices, orthogonalise
from dsv2.train.optimizer import OptimizerSection, make_optimizer, optimizer_tensors, restore_optimizer
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe
from reference.subject import our_model
from reference.tiny import LITE, V2, random_state, split_experts

MUON = OptimizerSection(kind="muon")


def muon_recipe(**run: object) -> PretrainRecipe:
    return recipe(**run).model_copy(update={"optimizer": MUON})


def muon_alone(matrix: torch.Tensor, gradients: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(matrix.clone())
    optimizer = torch.optim.Muon([parameter], lr=rate, weight_decay=decay, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((3, 16, 24), Cut(3, (8, 8))),  # gate and up of three experts
        ((3, 24, 8), Cut(3, (24,))),  # tall: their down
        ((2 * 14, 16), Cut(2, (8, 6))),  # two heads' keys and values
        ((20, 12), Cut(1, (20,))),
    ],
)
def test_each_matrix_moves_as_with_torchs_own_muon(shape, cut):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = [torch.randn(shape, generator=generator) * scale for scale in (1.0, 1e-3, 5.0, 0.1)]
    parameter = torch.nn.Parameter(start.clone())
    nothing = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer = MuonWithAdamW([(parameter, cut)], nothing, weight_decay=0.3, momentum=0.9, rms=0.2, products=torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 0.05
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    count = 0
    for number, stack in enumerate(cut.apply(parameter.detach())):
        for block, matrix in enumerate(stack):
            own = [cut.apply(tensor)[number][block] for tensor in (start, *gradients)]
            expected = muon_alone(own[0], own[1:], 0.05, 0.3)
            moved = (expected - own[0]).norm()
            assert (matrix - expected).norm() < 0.01 * moved, (number, block)  # bf16 products, summed in another order
            count += matrix.numel()
    assert count == start.numel()


@pytest.mark.parametrize("shape", [(4, 12, 20), (4, 20, 12)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    near = orthogonalise(matrices, torch.float32)
    inside = u.mT @ near @ vh.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.25
    assert torch.allclose(inside, torch.diag_embed(values), atol=1e-4)
    assert not orthogonalise(torch.zeros(1, 3, 4), torch.float32).any()


@pytest.mark.parametrize("config", [LITE, V2], ids=["lite", "v2"])
def test_every_parameter_has_one_optimiser_and_only_blocks_have_muon(config):
    model = our_model(random_state(config), config)
    optimizer = make_optimizer(model, MUON)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, decayed, gains = ([names[parameter] for parameter in group["params"]] for group in optimizer.param_groups)
    assert sorted(matrices + decayed + gains) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)]
    assert sorted(decayed) == sorted(["model.embed_tokens.weight", "lm_head.weight", *routers])
    assert all("norm" in name for name in gains)


def test_matrices_are_cut_where_the_paper_has_several():
    config = V2
    state = random_state(config)
    model = our_model(state, config)
    cuts, parameters = hidden_matrices(model), dict(model.named_parameters())
    experts, attention = "model.layers.1.mlp.experts", "model.layers.1.self_attn"
    gate, up = cuts[f"{experts}.gate_up_proj"].apply(parameters[f"{experts}.gate_up_proj"])
    published = split_experts(dict(model.state_dict()), config)
    for number in range(8):
        assert torch.equal(gate[number], published[f"{experts}.{number}.gate_proj.weight"])
        assert torch.equal(up[number], published[f"{experts}.{number}.up_proj.weight"])
    keys, values = cuts[f"{attention}.kv_b_proj.weight"].apply(parameters[f"{attention}.kv_b_proj.weight"])
    assert torch.equal(torch.cat([keys[0], values[0], keys[1], values[1]]), state[f"{attention}.kv_b_proj.weight"])
    latent, rope = cuts[f"{attention}.kv_a_proj_with_mqa.weight"].apply(parameters[f"{attention}.kv_a_proj_with_mqa.weight"])
    nope, turned = cuts[f"{attention}.q_b_proj.weight"].apply(parameters[f"{attention}.q_b_proj.weight"])
    shapes = [tuple(stack.shape) for stack in (keys, values, latent, rope, nope, turned)]
    assert shapes == [(2, 12, 16), (2, 10, 16), (1, 16, 32), (1, 8, 32), (2, 12, 20), (2, 8, 20)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_and_resumes_bit_for_bit(corpus, tmp_path, monkeypatch, precision):
    longer = muon_recipe(precision=precision, tokens=6144)
    pretrain(longer, corpus, tmp_path / "peace")
    with stopping_after(5, monkeypatch):
        pretrain(longer, corpus, tmp_path / "stopped")
    pretrain(longer, corpus, tmp_path / "stopped")
    last = latest_checkpoint(tmp_path / "peace")
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert sha256_of(last / name) == sha256_of(tmp_path / "stopped" / last.name / name)
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "peace")
    losses = [line["loss"] for line in read_metrics(tmp_path / "peace" / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    moments = {name.rsplit(".", 1)[1] for name in load_training(last).optimizer}
    assert moments == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


@pytest.mark.usefixtures("one_thread")
def test_a_run_does_not_go_on_with_the_other_optimiser(corpus, tmp_path):
    pretrain(recipe(tokens=512), corpus, tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.kind \('adamw' then, 'muon' now\)"):
        pretrain(muon_recipe(tokens=512), corpus, tmp_path)
    model = our_model(random_state(LITE), LITE)
    for first, second, lacks in ((OptimizerSection(), MUON, "momentum_buffer"), (MUON, OptimizerSection(), "exp_avg")):
        optimizer = make_optimizer(model, first)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with pytest.raises(CheckpointError, match=lacks) as caught:
            restore_optimizer(model, make_optimizer(model, second), optimizer_tensors(model, optimizer))
        assert "optimizer.kind" in str(caught.value)


@pytest.mark.usefixtures("one_thread")
def test_a_rollback_brings_momentum_back(corpus, tmp_path, monkeypatch):
    """Every step after the eighth spikes by decree: the weights and moments of step 12 are those of step 8."""
    from dsv2.train import loop
    from dsv2.train.guard import Spike

    changed = guarded(run=guarded().run.model_dump() | {"keep": 20, "tokens": 3072}, optimizer={"kind": "muon"})
    seen = 0

    def find(section, state, loss, grad_norm):
        nonlocal seen
        seen += 1
        return Spike("loss", loss, 0.0) if 10 <= seen <= 12 else None

    monkeypatch.setattr(loop, "find_spike", find)
    pretrain(changed, corpus, tmp_path)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert sha256_of(tmp_path / "step-12" / name) == sha256_of(tmp_path / "step-8" / name)


def test_muons_numbers_need_muon():
    with pytest.raises(ValueError, match=r"muon_rms = 0\.3 has no meaning with kind = 'adamw'"):
        OptimizerSection(muon_rms=0.3)
