"""The native step and its torch twin against the whole forward pass: every reading, chunking, paging, batch and cache format."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.engine.cache import LatentStore
from dsv2.engine.native import NativeStack, Piece, weights_of
from dsv2.engine.torch_stack import TorchStack
from dsv2.kernels.cpu.build import VARIANTS, Unavailable, cpu_features, plan
from dsv2.kernels.cpu.library import CacheFormat
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer

YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
SHAPES: dict[str, dict[str, Any]] = {
    "lite": {"rope_scaling": YARN},
    "compressed queries, groups": {
        "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0,
    },
    "dense": {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None},
    "whole registers": {
        "kv_lora_rank": 64, "qk_rope_head_dim": 32, "num_attention_heads": 16, "norm_topk_prob": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
LENGTH, BLOCKS = 200, [3, 7, 1, 5]
HERE = [name for name, (needed, _) in VARIANTS.items() if needed <= cpu_features()]
try:
    plan()
except Unavailable as reason:
    pytest.skip(f"no native kernels: {reason}", allow_module_level=True)


def lively(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose every part matters: unit-size activations, gains other than 1."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.to(dtype).eval()


def native(model: Transformer, kind: CacheFormat = CacheFormat.F32, variant: str | None = None, blocks: int = 12) -> NativeStack:
    config = model.config
    store = LatentStore(config, kind, blocks)
    np.frombuffer(store.memory.view(), np.uint8)[:] = 0xFF  # poison: bf16 and fp32 NaN
    return NativeStack(weights_of(model), store, threads=2, num_tokens=config.vocab_size, variant=variant)


def tokens_of(config: ModelConfig, count: int = LENGTH, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def whole(model: Transformer, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(torch.tensor([tokens])).hidden)[0].float()


def run(stack: Any, tokens: list[int], cuts: list[int], expanded: Callable[[int], bool]) -> torch.Tensor:
    """Feed a sequence in pieces that end at the cuts; return the logits of every token."""
    rows, start = [], 0
    for cut in [*cuts, len(tokens)]:
        answered = stack.step([Piece(tokens[start:cut], start, BLOCKS, expanded(start), range(cut - start))])
        rows.append(torch.tensor(answered.logits.copy()))
        start = cut
    return torch.cat(rows)


READINGS = {"expanded": lambda start: True, "absorbed": lambda start: False, "both": lambda start: start < 128}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", HERE)
def test_fp32_equals_the_model_in_every_reading_and_chunking(small_config: Any, shape: str, variant: str) -> None:
    model = lively(small_config(max_position_embeddings=256, **SHAPES[shape]))
    tokens = tokens_of(model.config)
    expected = whole(model, tokens)
    for expanded in READINGS.values():
        for cuts in ([], [64, 128], [1, 2, 65, 70]):
            found = run(native(model, variant=variant), tokens, cuts, expanded)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_torch_stack_equals_the_model(small_config: Any, shape: str) -> None:
    model = lively(small_config(max_position_embeddings=256, **SHAPES[shape]))
    tokens = tokens_of(model.config)
    stack = TorchStack(model, CacheFormat.F32, 12, num_tokens=model.config.vocab_size)
    for cuts in ([], [64, 128], [1, 2, 65, 70]):
        torch.testing.assert_close(run(stack, tokens, cuts, lambda start: True), whole(model, tokens), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_shares_its_step(small_config: Any, dtype: torch.dtype) -> None:
    """Alone or among others, token by token or in chunks: the reading decides the bits, not the company."""
    model = lively(small_config(max_position_embeddings=256), dtype)
    kind = CacheFormat.BF16 if dtype == torch.bfloat16 else CacheFormat.F32
    tokens, other = tokens_of(model.config, 150), tokens_of(model.config, 90, seed=1)
    alone = run(native(model, kind), tokens, [128], lambda start: start < 128)
    pieces = run(native(model, kind), tokens, [64, 128, *range(129, 150)], lambda start: start < 128)
    assert torch.equal(alone, pieces)
    stack, rows = native(model, kind), []
    for start in range(128):
        if start % 64 == 0:  # the prompt, beside another sequence
            both = [Piece(tokens[start : start + 64], start, BLOCKS, True, range(64)), Piece(other[:1], 0, [0], False, range(1))]
            rows.append(torch.tensor(stack.step(both).logits[:64].copy()))
    for start in range(128, 150):
        third = Piece(other[start - 128 : start - 120], start - 128, [9], start % 2 == 0, range(8))
        both = [Piece(other[: start - 127], 0, [10], True, []), Piece(tokens[start : start + 1], start, BLOCKS, False, [0]), third]
        rows.append(torch.tensor(stack.step(both).logits[:1].copy()))
    assert torch.equal(torch.cat(rows), alone)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("kind", list(CacheFormat))
def test_every_cache_format_rounds_as_defined(small_config: Any, kind: CacheFormat, variant: str) -> None:
    config = small_config(max_position_embeddings=256, kv_lora_rank=64, **SHAPES["dense"])  # no router that a rounding could flip
    model, tokens = lively(config), tokens_of(config)
    twin = TorchStack(model, kind, 12, num_tokens=config.vocab_size)
    expected = run(twin, tokens, [64, 128], lambda start: True)
    far = (expected - whole(model, tokens)).abs().median()
    for expanded in READINGS.values():
        near = (run(native(model, kind, variant), tokens, [64, 128], expanded) - expected).abs().median()
        assert near < 1e-5 if kind == CacheFormat.F32 else near < 0.05 * far


def test_bf16_weights_are_as_near_to_fp32_as_torch_is(small_config: Any) -> None:
    model = lively(small_config(max_position_embeddings=256, **SHAPES["dense"]), torch.bfloat16)
    tokens = tokens_of(model.config)
    torch_error = (whole(model, tokens) - whole(model.float(), tokens)).abs().median()
    exact = whole(model, tokens)  # float() changed the model in place
    model.to(torch.bfloat16)
    for expanded in READINGS.values():
        found = run(native(model, CacheFormat.BF16), tokens, [64, 128], expanded)
        assert (found - exact).abs().median() < torch_error


def test_the_routed_experts_are_those_of_the_model(small_config: Any) -> None:
    model = lively(small_config(**SHAPES["compressed queries, groups"] | {"topk_group": 1}))
    tokens = tokens_of(model.config, 40)
    with torch.inference_mode():
        expected = [stats.experts[0].numpy() for stats in model(torch.tensor([tokens])).router_stats]
    for stack in (native(model), TorchStack(model, CacheFormat.F32, 12, num_tokens=300)):
        answered = stack.step([Piece(tokens, 0, BLOCKS, True, [])], want_experts=True)
        assert answered.experts is not None and np.array_equal(answered.experts, np.stack(expected))
        assert len(answered.logits) == 0


def test_the_best_id_is_the_first_of_the_largest_in_use(small_config: Any) -> None:
    model = lively(small_config())
    with torch.no_grad():
        model.lm_head.weight[7] = model.lm_head.weight[2]
        model.lm_head.weight[300:] = 5 * model.lm_head.weight[2]  # not in use
    store = LatentStore(model.config, CacheFormat.F32, 4)
    stack = NativeStack(weights_of(model), store, threads=1, num_tokens=300)
    answered = stack.step([Piece(tokens_of(model.config, 30), 0, [1], True, range(30))])
    assert np.array_equal(answered.best, answered.logits[:, :300].argmax(1))
    assert np.array_equal(answered.best_logit, answered.logits[:, :300].max(1))
    with torch.no_grad():
        model.lm_head.weight[150] = torch.nan  # one logit of many
    assert np.isnan(stack.step([Piece([5], 30, [1], False, [0])]).best_logit).all()


@pytest.mark.parametrize(
    "piece",
    [Piece([10**6], 0, [1], True, []), Piece([1], 0, [99], True, []), Piece([1], 64, [1], False, []), Piece([1], 0, [1], True, [3])],
)
def test_what_does_not_exist_is_refused(small_config: Any, piece: Piece) -> None:
    with pytest.raises(ValueError, match="exist|hold"):
        native(lively(small_config())).step([piece])


def test_spans_are_merged(small_config: Any) -> None:
    """Keys in spans of 512: several threads' parts of one sequence, and the order of a chunk too large to be kept in parts."""
    model = lively(small_config(max_position_embeddings=2048, num_hidden_layers=2))
    tokens = tokens_of(model.config, 1300)
    expected = whole(model, tokens)
    stack = native(model, blocks=24)
    blocks = list(range(23, 1, -1))
    first = stack.step([Piece(tokens[:1280], 0, blocks, True, [1279])]).logits.copy()
    torch.testing.assert_close(torch.tensor(first[0]), expected[1279], rtol=1e-5, atol=2e-5)
    for position in range(1280, 1300):
        found = torch.tensor(stack.step([Piece(tokens[position : position + 1], position, blocks, False, [0])]).logits[0].copy())
        torch.testing.assert_close(found, expected[position], rtol=1e-5, atol=2e-5)
    absorbed = native(model, blocks=24)
    found = torch.tensor(absorbed.step([Piece(tokens, 0, blocks, False, range(1300))]).logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)


def test_any_number_of_layers(small_config: Any) -> None:
    """Every parallel loop of a step has a counter of its own, in however many layers."""
    model = lively(small_config(num_hidden_layers=500, hidden_size=16, intermediate_size=16, **SHAPES["dense"]))
    tokens = tokens_of(model.config, 20)
    found = run(native(model), tokens, [], lambda start: False)
    torch.testing.assert_close(found, whole(model, tokens), rtol=1e-3, atol=1e-3)
