"""Multi-head Latent Attention, one token and one head at a time (P section 2.1, appendix C)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import rope
from .layers import rms_norm

# The latent norms keep this epsilon whatever `rms_norm_eps` says (spec 2.1).
LATENT_EPS = 1e-6


@dataclass(frozen=True)
class Mla:
    """One layer's attention: its weights by their names in the paper, and its sizes.

    `query_down` is None when queries are not compressed (V2-Lite); `query_content` and `query_rope` then read the hidden state.
    """

    num_heads: int
    scale: float
    theta: Tensor
    amplitude: float
    query_down: Tensor | None  # W^DQ [d_c', d]
    query_gain: Tensor | None  # [d_c']
    query_content: Tensor  # W^UQ [n_h, d_h, d_c' or d]
    query_rope: Tensor  # W^QR [n_h, d_h^R, d_c' or d]
    kv_down: Tensor  # W^DKV [d_c, d]
    kv_gain: Tensor  # [d_c]
    key_rope: Tensor  # W^KR [d_h^R, d]
    key_up: Tensor  # W^UK [n_h, d_h, d_c]
    value_up: Tensor  # W^UV [n_h, d_v, d_c]
    output: Tensor  # W^O [d, n_h * d_v]


def from_state(state: Mapping[str, Tensor], layer: int, config: Mapping[str, Any]) -> Mla:
    """Cut the checkpoint's fused matrices into the paper's (spec 1.3: per head, content rows before rope or value rows)."""
    prefix = f"model.layers.{layer}.self_attn."
    heads, content, latent = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    compressed = config["q_lora_rank"] is not None
    query = state[prefix + ("q_b_proj.weight" if compressed else "q_proj.weight")]
    query = query.view(heads, content + config["qk_rope_head_dim"], -1)
    kv_up = state[prefix + "kv_b_proj.weight"].view(heads, content + config["v_head_dim"], latent)
    kv_down = state[prefix + "kv_a_proj_with_mqa.weight"]
    return Mla(
        num_heads=heads,
        scale=rope.softmax_scale(config),
        theta=rope.frequencies(config),
        amplitude=rope.amplitude(config),
        query_down=state[prefix + "q_a_proj.weight"] if compressed else None,
        query_gain=state[prefix + "q_a_layernorm.weight"] if compressed else None,
        query_content=query[:, :content],
        query_rope=query[:, content:],
        kv_down=kv_down[:latent],
        kv_gain=state[prefix + "kv_a_layernorm.weight"],
        key_rope=kv_down[latent:],
        key_up=kv_up[:, :content],
        value_up=kv_up[:, content:],
        output=state[prefix + "o_proj.weight"],
    )


def queries(mla: Mla, h: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """q^C_{t,i} [n_h, d_h] and q^R_{t,i} [n_h, d_h^R] of one token (P eq 12-14; 37-40)."""
    if mla.query_down is None or mla.query_gain is None:
        source = h
    else:
        source = rms_norm(mla.query_down @ h, mla.query_gain, LATENT_EPS)  # c^Q_t, P eq 37
    content = torch.stack([mla.query_content[i] @ source for i in range(mla.num_heads)])  # P eq 38
    rotated = torch.stack([rope.rotate(mla.query_rope[i] @ source, position, mla.theta, mla.amplitude) for i in range(mla.num_heads)])
    return content, rotated


def cached(mla: Mla, h: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """c^KV_t [d_c] after its norm and k^R_t [d_h^R] after its rotation: all that is cached of one token (P eq 9, 15; 41, 43)."""
    latent = rms_norm(mla.kv_down @ h, mla.kv_gain, LATENT_EPS)  # P eq 41
    return latent, rope.rotate(mla.key_rope @ h, position, mla.theta, mla.amplitude)  # P eq 43


def attention(mla: Mla, h: Tensor, positions: Sequence[int], documents: Sequence[int]) -> Tensor:
    """u_t of every token, keys and values expanded per head (P eq 16-19; 44-47).

    Args:
        h: normalised layer input [T, d].
        positions: rotary position of each token; the causal order is that of the sequence, not that of the positions.
        documents: token t sees token j <= t only where documents[j] == documents[t].

    Returns:
        [T, d].
    """
    cache = [cached(mla, h[t], positions[t]) for t in range(len(h))]
    outputs = []
    for t in range(len(h)):
        q_content, q_rope = queries(mla, h[t], positions[t])
        visible = [j for j in range(t + 1) if documents[j] == documents[t]]
        heads = []
        for i in range(mla.num_heads):
            q = torch.cat([q_content[i], q_rope[i]])  # P eq 40
            keys = torch.stack([torch.cat([mla.key_up[i] @ cache[j][0], cache[j][1]]) for j in visible])  # P eq 42, 44
            values = torch.stack([mla.value_up[i] @ cache[j][0] for j in visible])  # P eq 45
            weights = torch.softmax(keys @ q * mla.scale, dim=0)
            heads.append(weights @ values)  # P eq 46
        outputs.append(mla.output @ torch.cat(heads))  # P eq 47
    return torch.stack(outputs)


def absorbed_attention(mla: Mla, h: Tensor, positions: Sequence[int], documents: Sequence[int]) -> Tensor:
    """The same u_t without ever forming a key or a value: W^UK moves to the query, W^UV to the output (P appendix C)."""
    cache = [cached(mla, h[t], positions[t]) for t in range(len(h))]
    outputs = []
    for t in range(len(h)):
        q_content, q_rope = queries(mla, h[t], positions[t])
        visible = [j for j in range(t + 1) if documents[j] == documents[t]]
        latents = torch.stack([cache[j][0] for j in visible])
        k_rope = torch.stack([cache[j][1] for j in visible])
        heads = []
        for i in range(mla.num_heads):
            q_latent = mla.key_up[i].T @ q_content[i]
            weights = torch.softmax((latents @ q_latent + k_rope @ q_rope[i]) * mla.scale, dim=0)
            heads.append(mla.value_up[i] @ (weights @ latents))
        outputs.append(mla.output @ torch.cat(heads))
    return torch.stack(outputs)
