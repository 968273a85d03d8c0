"""The whole network of one sequence, from a state dict with Hugging Face's names (P section 2; spec 1.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import mla, moe
from .layers import rms_norm


@dataclass(frozen=True)
class Output:
    """What the network makes of one sequence; the lists have one entry per MoE layer.

    `latents` and `k_ropes` hold what each layer caches, [T, d_c] and [T, d_h^R].
    """

    hidden: Tensor  # after the final norm [T, d]
    logits: Tensor  # [T, V]
    affinities: list[Tensor]  # [T, N_r] each
    experts: list[Tensor]  # [T, K_r] each
    latents: list[Tensor]
    k_ropes: list[Tensor]


def is_moe_layer(layer: int, config: Mapping[str, Any]) -> bool:
    """All FFNs but the first `first_k_dense_replace` are MoE layers (P section 3.1.2), every `moe_layer_freq`-th of them."""
    return layer >= config["first_k_dense_replace"] and layer % config.get("moe_layer_freq", 1) == 0


def forward(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokens: Sequence[int],
    positions: Sequence[int] | None = None,
    documents: Sequence[int] | None = None,
    *,
    absorbed: bool = False,
) -> Output:
    """Run the network over one sequence; pre-norm blocks x + attn(norm(x)), x + ffn(norm(x)) (P section 2)."""
    positions = list(positions) if positions is not None else list(range(len(tokens)))
    documents = list(documents) if documents is not None else [0] * len(tokens)
    attend = mla.absorbed_attention if absorbed else mla.attention
    eps = config["rms_norm_eps"]
    output = Output(hidden=torch.empty(0), logits=torch.empty(0), affinities=[], experts=[], latents=[], k_ropes=[])
    x = torch.stack([state["model.embed_tokens.weight"][token] for token in tokens])
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        weights = mla.from_state(state, i, config)
        h = rms_norm(x, state[prefix + "input_layernorm.weight"], eps)
        cache = [mla.cached(weights, h[t], positions[t]) for t in range(len(h))]
        output.latents.append(torch.stack([latent for latent, _ in cache]))
        output.k_ropes.append(torch.stack([k_rope for _, k_rope in cache]))
        x = x + attend(weights, h, positions, documents)
        u = rms_norm(x, state[prefix + "post_attention_layernorm.weight"], eps)
        if is_moe_layer(i, config):
            ffn, affinity, experts = moe.layer(u, state, prefix + "mlp.", config)
            output.affinities.append(affinity)
            output.experts.append(experts)
        else:
            ffn = moe.expert(u, state, prefix + "mlp.")
        x = x + ffn
    hidden = rms_norm(x, state["model.norm.weight"], eps)
    head = state["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return Output(hidden, hidden @ head.T, output.affinities, output.experts, output.latents, output.k_ropes)
