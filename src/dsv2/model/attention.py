"""Multi-head Latent Attention: one set of weights, two readings (section 2.1; spec 2).

Expanded (MHA): keys and values are rebuilt from the latent; cheapest where a latent serves many queries: training and prefill.
Absorbed (MQA): W^UK moves to the query and W^UV behind the weighted sum, so a step reads the latents only; cheapest for one new token.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsv2.kernels.attention import attend
from dsv2.kernels.autocast import compute_dtype
from dsv2.kernels.permute import permute_rows
from dsv2.model.cache import LatentCache
from dsv2.model.config import ModelConfig
from dsv2.model.layers import RMSNorm
from dsv2.model.rope import Rotation, rotate
from dsv2.model.segments import Segments

LATENT_NORM_EPS = 1e-6  # the two latent norms keep this whatever the config's rms_norm_eps says (spec 2.1)


class LatentAttention(nn.Module):
    """MLA of one layer; parameter names as in published checkpoints (spec 1.3)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope_dim, self.rope_dim, self.value_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        self.scale = config.softmax_scale
        hidden, query_width = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        self.compressed_queries = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, hidden, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch new hidden"],
        rotation: Rotation,
        *,
        segments: Segments | None = None,
        cache: LatentCache | None = None,
    ) -> Float[Tensor, "batch new hidden"]:
        """Attend from each token to itself and the tokens before it in its document.

        Args:
            x: h_t, normalised layer input.
            rotation: cos and sin at the tokens' positions.
            segments: documents of a packed batch; None: every row is one document. Not together with a cache.
            cache: earlier latents; the new ones are appended to it.

        Returns:
            u_t (eq 19), without residual.
        """
        x = x.to(compute_dtype(x))  # once for both products
        q_nope, q_rope = self.queries(x, rotation)
        kv_latent, k_rope = self.latents(x, rotation)
        if cache is None:
            heads_out = self._expanded(q_nope, q_rope, kv_latent, k_rope, segments)
        else:
            kv_latent, k_rope = cache.append(self.layer, kv_latent, k_rope)
            read = self.attend_absorbed if x.shape[1] == 1 else self.attend_expanded
            heads_out = read(q_nope, q_rope, kv_latent, k_rope, cache.visible)
        out: Tensor = self.o_proj(heads_out.flatten(2))
        return out

    def queries(
        self, x: Float[Tensor, "batch new hidden"], rotation: Rotation
    ) -> tuple[Float[Tensor, "batch new heads nope"], Float[Tensor, "batch new heads rope"]]:
        """Return q^C and the rotated q^R (eq 12-14, 37-40)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed_queries else self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split((self.nope_dim, self.rope_dim), dim=-1)
        return q_nope, rotate(q_rope, rotation)

    def latents(
        self, x: Float[Tensor, "batch new hidden"], rotation: Rotation
    ) -> tuple[Float[Tensor, "batch new latent"], Float[Tensor, "batch new rope"]]:
        """Return what is cached: c^KV after its norm and k^R after its rotation (eq 9, 15)."""
        kv_latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent_dim, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(kv_latent), rotate(k_rope, rotation)

    def attend_expanded(
        self,
        q_nope: Float[Tensor, "batch new heads nope"],
        q_rope: Float[Tensor, "batch new heads rope"],
        kv_latent: Float[Tensor, "batch all latent"],
        k_rope: Float[Tensor, "batch all rope"],
        visible: Bool[Tensor, "batch new all"] | None,
    ) -> Float[Tensor, "batch new heads value"]:
        """Rebuild k^C and v^C from the latents and attend per head (eq 10, 11, 18); ``visible`` None: causal."""
        q, k, v = self._expand(q_nope, q_rope, kv_latent, k_rope)
        return attend(q, k, v, scale=self.scale, visible=visible)

    def attend_absorbed(
        self,
        q_nope: Float[Tensor, "batch new heads nope"],
        q_rope: Float[Tensor, "batch new heads rope"],
        kv_latent: Float[Tensor, "batch all latent"],
        k_rope: Float[Tensor, "batch all rope"],
        visible: Bool[Tensor, "batch new all"] | None,
    ) -> Float[Tensor, "batch new heads value"]:
        """Attend in latent space, as if to one key/value head of width d_c (appendix C); ``visible`` None: all entries.

        scores = (q^C W^UK) . c + q^R . k^R; the values are the latents themselves, mapped by W^UV once per head at the end.
        """
        batch, new, heads = q_nope.shape[:3]
        up_k, up_v = self.kv_b_proj.weight.view(heads, -1, self.latent_dim).split((self.nope_dim, self.value_dim), dim=1)
        q_latent = torch.bmm(q_nope.reshape(-1, heads, self.nope_dim).transpose(0, 1), up_k).transpose(0, 1)
        q_latent = q_latent.reshape(batch, new * heads, self.latent_dim)
        scores = torch.bmm(q_latent, kv_latent.transpose(1, 2))
        scores = torch.baddbmm(scores, q_rope.reshape(batch, new * heads, -1), k_rope.transpose(1, 2), beta=self.scale, alpha=self.scale)
        if visible is not None:
            scores = scores.unflatten(1, (new, heads)).masked_fill(~visible.unsqueeze(2), -math.inf).flatten(1, 2)
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(kv_latent.dtype)
        mixed = torch.bmm(probabilities, kv_latent).view(batch * new, heads, self.latent_dim)
        return torch.bmm(mixed.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1).reshape(batch, new, heads, self.value_dim)

    def _expand(self, q_nope: Tensor, q_rope: Tensor, kv_latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_nope, v = self.kv_b_proj(kv_latent).unflatten(-1, (self.heads, -1)).split((self.nope_dim, self.value_dim), dim=-1)
        shared_rope = k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)  # one rotary key for all heads
        return torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, shared_rope), dim=-1), v

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, kv_latent: Tensor, k_rope: Tensor, segments: Segments | None
    ) -> Float[Tensor, "batch new heads value"]:
        """Causal attention within each document of a packed batch: one call per document length."""
        q, k, v = self._expand(q_nope, q_rope, kv_latent, k_rope)
        if segments is None or segments.order is None or segments.inverse is None:
            return attend(q, k, v, scale=self.scale)
        batch, tokens = q.shape[:2]
        sizes = [count * length for count, length in segments.groups]
        q, k, v = (permute_rows(t.flatten(0, 1), segments.order, segments.inverse) for t in (q, k, v))
        pieces = [
            attend(*(t.unflatten(0, group) for t in qkv), scale=self.scale).flatten(0, 1)
            for group, *qkv in zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        ]
        out: Tensor = permute_rows(torch.cat(pieces), segments.inverse, segments.order).unflatten(0, (batch, tokens))
        return out
