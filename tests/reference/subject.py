"""The model under test, filled with the oracle's weights, and the smallest cache that fits its seam."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer

from .tiny import stack_experts


def our_model(state: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Transformer:
    """A Transformer holding `state`; every one of its parameters must be in it and the other way round."""
    model = Transformer(ModelConfig.from_dict(dict(config))).to(dtype)
    weights = {name: tensor.detach().to(dtype) for name, tensor in stack_experts(state, config).items()}
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model.eval()


class ListCache:
    """A LatentCache that concatenates: per layer, [B, L, d_c] latents and [B, L, d_h^R] rotary keys."""

    def __init__(self) -> None:
        self.latents: dict[int, Tensor] = {}
        self.k_ropes: dict[int, Tensor] = {}
        self.visible: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self.latents[0].shape[1] if self.latents else 0

    def expect(self, batch: int, new: int) -> None:
        """Announce the next call's rows and new tokens per row: each sees all old ones and the new ones up to itself."""
        old = self.length
        self.visible = None if old == 0 else torch.ones(new, old + new, dtype=torch.bool).tril(old).expand(batch, -1, -1)

    def append(self, layer: int, kv_latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new entries behind the old ones and return all."""
        if layer in self.latents:
            kv_latent = torch.cat([self.latents[layer], kv_latent], dim=1)
            k_rope = torch.cat([self.k_ropes[layer], k_rope], dim=1)
        self.latents[layer], self.k_ropes[layer] = kv_latent, k_rope
        return kv_latent, k_rope


@torch.no_grad()
def logits_in_chunks(model: Transformer, tokens: Tensor, positions: Tensor, chunk_lens: list[int], cache: ListCache) -> Tensor:
    """Feed [B, T] tokens through the cache in chunks of the given lengths; chunks of one token take the absorbed reading."""
    pieces, start = [], 0
    for chunk_len in chunk_lens:
        own = slice(start, start + chunk_len)
        cache.expect(len(tokens), chunk_len)
        pieces.append(model.logits(model(tokens[:, own], positions=positions[:, own], cache=cache).hidden))
        start += chunk_len
    return torch.cat(pieces, dim=1)
