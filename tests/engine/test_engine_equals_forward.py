"""The engine against the whole forward pass: prefill + decode, batched = alone, in any order, joining at any time (real model)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.engine.engine import Engine
from dsv2.engine.request import Output, Request, SamplingParams
from dsv2.engine.runner import Runner
from dsv2.engine.slab import LatentSlab
from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.tokenizer.tokenizer import Tokenizer

YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
SHAPES: dict[str, dict[str, Any]] = {
    "lite": {"rope_scaling": YARN},
    "compressed queries, groups": {
        "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0,
    },
    "dense": {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None},
}  # fmt: skip


def runner_of(model: Transformer, **settings: Any) -> Runner:
    config, weight = model.config, next(model.parameters())
    slab = LatentSlab(config.num_hidden_layers, 4, 96, config.kv_lora_rank, config.qk_rope_head_dim, settings.get("dtype", weight.dtype))
    return Runner(model, slab)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_lens", [[5], [1], [3, 3], [1, 30, 8]])
def test_prefill_and_decode_give_the_logits_of_the_whole(
    small_config: Callable[..., ModelConfig], shape: str, prompt_lens: list[int]
) -> None:
    model = Transformer(small_config(**SHAPES[shape]))
    initialise(model, seed=1)
    num_new = 12
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 300, (length + num_new,), generator=generator) for length in prompt_lens]
    with torch.inference_mode():
        whole = [model.logits(model(row[None]).hidden)[0] for row in rows]
    runner = runner_of(model)
    for i, (row, length) in enumerate(zip(rows, prompt_lens, strict=True)):
        torch.testing.assert_close(runner.prefill(i, row[:length].tolist())[0], whole[i][length - 1], rtol=1e-5, atol=1e-5)
    for step in range(num_new):
        logits = runner.decode([int(row[n + step]) for row, n in zip(rows, prompt_lens, strict=True)], [n + step for n in prompt_lens])
        truth = torch.stack([full[n + step] for full, n in zip(whole, prompt_lens, strict=True)])
        torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5)


def test_a_cache_in_bfloat16_changes_the_logits_by_its_rounding_only(model: Transformer) -> None:
    tokens = list(range(20, 50))
    exact, rounded = runner_of(model), runner_of(model, dtype=torch.bfloat16)
    a, b = (torch.cat((runner.prefill(0, tokens), runner.decode([7], [30]))) for runner in (exact, rounded))
    assert not torch.equal(a, b)
    assert (a - b).abs().max() < 0.1 * a.std()


REQUESTS = [
    ("The river", SamplingParams(seed=1, max_tokens=20)),
    ("河流", SamplingParams(seed=2, max_tokens=9, top_k=20)),
    ("the boats run with", SamplingParams(temperature=0, max_tokens=15, logprobs=2)),
    ("", SamplingParams(seed=3, max_tokens=25, top_p=0.9, ignore_eos=True)),
    ("and " * 20, SamplingParams(seed=1, max_tokens=12, temperature=0.7)),
    ("The river", SamplingParams(seed=9, max_tokens=20)),
]


def numbered(tokenizer: Tokenizer, order: list[int]) -> list[Request]:
    return [Request(str(i), tuple(tokenizer.encode(REQUESTS[i][0])), REQUESTS[i][1]) for i in order]


@pytest.fixture(scope="module")
def alone(model: Transformer, tokenizer: Tokenizer) -> dict[str, Output]:
    return {r.request_id: Engine(model, tokenizer, max_batch=1).generate([r])[0] for r in numbered(tokenizer, list(range(len(REQUESTS))))}


def same(output: Output, truth: Output) -> None:
    assert (output.tokens, output.text, output.finish_reason) == (truth.tokens, truth.text, truth.finish_reason)
    if truth.logprobs is not None and output.logprobs is not None:
        assert [e.logprob for e in output.logprobs] == pytest.approx([e.logprob for e in truth.logprobs], abs=1e-4)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(len(REQUESTS))), st.integers(1, 6), st.lists(st.integers(0, 6), min_size=6, max_size=6))
def test_a_request_gives_the_same_text_whatever_else_runs(
    model: Transformer, tokenizer: Tokenizer, alone: dict[str, Output], order: list[int], max_batch: int, gaps: list[int]
) -> None:
    """In any order, at any batch size, with any number of steps between arrivals."""
    engine = Engine(model, tokenizer, max_batch=max_batch)
    parts: dict[str, list[Output]] = {name: [] for name in alone}

    def step() -> None:
        for output in engine.step():
            parts[output.request_id].append(output)

    for request, gap in zip(numbered(tokenizer, order), gaps, strict=True):
        engine.add(request)
        for _ in range(gap):
            step()
    while engine.has_work:
        step()
    for name, outputs in parts.items():
        whole = Output(
            name,
            tuple(token for output in outputs for token in output.tokens),
            "".join(output.text for output in outputs),
            outputs[-1].finish_reason,
            None,
            outputs[0].prompt_tokens,
        )
        same(whole, alone[name])


def test_whole_outputs_are_the_same_batched(model: Transformer, tokenizer: Tokenizer, alone: dict[str, Output]) -> None:
    for output in Engine(model, tokenizer, max_batch=4).generate(numbered(tokenizer, [5, 0, 3, 1, 4, 2])):
        same(output, alone[output.request_id])


def test_without_a_seed_two_answers_differ(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    a, b = engine.generate([Request(name, (0,), SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True)) for name in "ab"])
    assert a.tokens != b.tokens


def test_published_shapes_run(tokenizer: Tokenizer, small_config: Callable[..., ModelConfig]) -> None:
    """The nano preset as it is, but for its vocabulary."""
    model = Transformer(preset("nano", vocab_size=tokenizer.vocab_size))
    initialise(model, seed=0)
    engine = Engine(model, tokenizer, max_batch=2)
    assert engine.max_len == model.config.max_position_embeddings
    outputs = engine.generate([Request(str(i), (0,), SamplingParams(max_tokens=4, seed=i, ignore_eos=True)) for i in range(3)])
    assert [len(output.tokens) for output in outputs] == [4, 4, 4]
    assert engine.cache_bytes_per_token == model.config.num_hidden_layers * model.config.latent_dim * 4
