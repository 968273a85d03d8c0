"""The whole native step over random models, weights, caches and batches: against the model in torch, and bit for bit against itself.

The model is given what a packed file stands for and a cache that rounds as the format says, and sends every token to the experts that the
native step chose: near-ties that rounding decides otherwise would make another function of it. How often they do is looked at, too.
"""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from random_steps import Text, described, poisoned_step, random_config, random_model, random_pieces, random_texts

from dsv2.engine.cache import LatentStore
from dsv2.engine.layout import SCHEMES, Scheme
from dsv2.engine.native import NativeStack, StackWeights
from dsv2.kernels.cpu.build import VARIANTS, Unavailable, cpu_features, plan
from dsv2.kernels.cpu.library import CacheFormat, Type, empty_tiles, pack_into
from dsv2.kernels.formats import dequantize_groups, from_tiles, round_latent_6, round_latent_8
from dsv2.model.router import route
from dsv2.model.transformer import Transformer

HERE = [name for name, (needed, _) in VARIANTS.items() if needed <= cpu_features()]
try:
    plan()
except Unavailable as reason:
    pytest.skip(f"no native kernels: {reason}", allow_module_level=True)

BITS = {"8": (8, 8), "mixed": (4, 8), "4": (4, 4)}  # of routed experts' weights, of all others
KEPT: dict[CacheFormat, Callable[[torch.Tensor], torch.Tensor]] = {
    CacheFormat.F32: lambda latent: latent,
    CacheFormat.BF16: lambda latent: latent.to(torch.bfloat16).float(),
    CacheFormat.EIGHT: round_latent_8,
    CacheFormat.SIX: round_latent_6,
}


def requantised(weight: torch.Tensor, bits: int) -> torch.Tensor:
    rows = weight.flatten(0, -2)
    kind = Type.I4 if bits == 4 else Type.I8
    data, scales = empty_tiles(*rows.shape, kind)
    pack_into(rows, kind, 0, data, scales)
    return dequantize_groups(*from_tiles(data, scales, *rows.shape, bits)).view_as(weight)


@torch.no_grad()
def as_packed(model: Transformer, scheme: Scheme) -> Transformer:
    """The model in fp32 with the values that its packed file stands for."""
    model, config = deepcopy(model).float(), model.config
    for name, weight in model.named_parameters() if scheme in BITS else ():
        bits = BITS[scheme][0 if ".mlp.experts." in name else 1]
        if name.endswith("kv_b_proj.weight"):  # W^UK is packed as the absorbed reading multiplies by it, by columns
            for head in weight.view(config.num_attention_heads, -1, config.kv_lora_rank):
                keys, values = head.split((config.qk_nope_head_dim, config.v_head_dim))
                keys.copy_(requantised(keys.t().contiguous(), bits).t())
                values.copy_(requantised(values, bits))
        elif weight.dim() > 1 and not name.endswith("mlp.gate.weight"):
            weight.copy_(requantised(weight, bits))
    return model


class WholeText:
    """A cache for one call with a whole text: gives back what a format keeps."""

    visible = None

    def __init__(self, kind: CacheFormat) -> None:
        self.latent, self.key = KEPT[kind], KEPT[min(kind, CacheFormat.BF16)]

    def append(self, layer: int, kv_latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latent(kv_latent), self.key(k_rope)


def in_torch(model: Transformer, tokens: list[int], kind: CacheFormat, experts: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of every token sent to these experts, and the experts that each layer's router would have chosen."""
    replayed = torch.from_numpy(experts).long()[:, None]
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), cache=WholeText(kind), experts=replayed)
        choices = [route(stats.affinity[0].log(), model.config).experts for stats in output.router_stats]
        return model.logits(output.hidden)[0], choices


def opened(chance: random.Random, weights: StackWeights, kind: CacheFormat, num_blocks: int, variant: str) -> NativeStack:
    store = LatentStore(weights.config, kind, num_blocks)
    np.frombuffer(store.memory.view(), np.uint8)[:] = 0xFF  # poison: bf16 and fp32 NaN
    return NativeStack(weights, store, threads=chance.randint(1, 3), num_tokens=weights.config.vocab_size, variant=variant)


def run_together(stack: NativeStack, texts: list[Text], chance: random.Random) -> dict[Text, dict[int, np.ndarray]]:
    """Run texts beside each other, in random pieces; return logits of some positions of each."""
    found: dict[Text, dict[int, np.ndarray]] = {text: {} for text in texts}
    while any(text.done < len(text.tokens) for text in texts):
        turns = random_pieces(chance, texts)
        answered = poisoned_step(stack, [piece for _, piece in turns], want_experts=False)
        assert np.array_equal(answered.best, answered.logits.argmax(-1))
        assert np.array_equal(answered.best_logit, answered.logits.max(-1, initial=-np.inf))
        rows = iter(answered.logits.copy())
        for text, piece in turns:
            found[text].update({piece.position + row: next(rows) for row in piece.wanted})
    stack.close()
    return found


def run_alone(stack: NativeStack, text: Text, chance: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Run a text by itself, in other pieces and blocks but read alike; return logits and experts of every token."""
    again, logits, experts = Text(text.tokens, list(range(len(text.blocks))), text.expanded), [], []
    while again.done < len(again.tokens):
        answered = poisoned_step(stack, [again.next_piece(chance.choice([1, 7, 64, 200]))], want_experts=True)
        assert answered.experts is not None
        logits.append(answered.logits.copy())
        experts.append(answered.experts)
    stack.close()
    return np.concatenate(logits), np.concatenate(experts, axis=1)


def noise(scheme: Scheme, kind: CacheFormat) -> tuple[float, float, float]:
    """Median and largest error of a row of logits relative to its length, and the share of tokens that may be routed otherwise.

    About twice the most that 600 random models had. A cache of few bits makes a whole step of a difference in the last bit, now and then;
    bf16 and quantised products round their activations, which 6 bits amplify, and a row whose parts nearly cancel may lose half of itself.
    """
    if scheme == "fp32":
        return (3e-6, 2e-5, 0.0) if kind == CacheFormat.F32 else (4e-4, 0.1, 0.02)
    if kind == CacheFormat.SIX:
        return 0.35, 1.0, 0.5
    return (0.04, 0.5, 0.2) if scheme == "bf16" else (0.08, 0.8, 0.4)


def check_a_model(chance: random.Random, scheme: Scheme, kind: CacheFormat, variant: str, longest: int) -> None:
    config = random_config(chance, kind)
    model = random_model(config, chance.randrange(2**32)).to(torch.bfloat16 if scheme == "bf16" else torch.float32)
    texts, weights = random_texts(chance, config.vocab_size, longest), described(chance, model, scheme)
    note(f"{config!r}, texts {[(len(text.tokens), text.expanded) for text in texts]}")
    together = run_together(opened(chance, weights, kind, sum(len(text.blocks) for text in texts), variant), texts, chance)
    twin = as_packed(model, scheme)
    errors, flips = [], [np.zeros(1)]
    for text in texts:
        logits, experts = run_alone(opened(chance, weights, kind, len(text.blocks), variant), text, chance)
        for position, row in together[text].items():
            assert np.array_equal(row, logits[position]), f"a row at position {position} depends on what shares its step"
        expected, choices = in_torch(twin, text.tokens, kind, experts)
        errors.append((torch.from_numpy(logits) - expected).norm(dim=1) / expected.norm(dim=1))
        flips += [(np.sort(chosen) != np.sort(own.numpy())).any(-1) for chosen, own in zip(experts, choices, strict=True)]
    error, (median, largest, flipped) = torch.cat(errors), noise(scheme, kind)
    assert error.median() <= median and error.max() <= largest, (error.median(), error.max())
    assert np.concatenate(flips).mean() <= flipped


CASE: Any = (st.randoms(use_true_random=False), st.sampled_from(SCHEMES), st.sampled_from(list(CacheFormat)), st.sampled_from(HERE))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(*CASE)
def test_any_model_computes_what_torch_does_whatever_shares_its_steps(
    chance: random.Random, scheme: Scheme, kind: CacheFormat, variant: str
) -> None:
    check_a_model(chance, scheme, kind, variant, longest=150)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000, derandomize=True)
@given(*CASE)
def test_very_many_models(chance: random.Random, scheme: Scheme, kind: CacheFormat, variant: str) -> None:
    check_a_model(chance, scheme, kind, variant, longest=700)  # several spans of keys
