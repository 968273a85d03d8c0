"""Tokens to hidden states to logits: the blocks of section 2 stacked, pre-norm, with a final norm and a head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2.model.attention import LatentAttention
from dsv2.model.cache import LatentCache
from dsv2.model.config import Head, ModelConfig
from dsv2.model.dropping import Dropping
from dsv2.model.layers import RMSNorm, SwiGLU
from dsv2.model.moe import MoE
from dsv2.model.rope import Rotation, rope_frequencies, rotation
from dsv2.model.router import RouterStats
from dsv2.model.segments import Segments, find_segments


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a forward pass returns.

    Args:
        hidden: [B, S, D] after the final norm; ``Transformer.logits`` maps it to the vocabulary.
        router_stats: one record per MoE layer, in layer order.
    """

    hidden: Float[Tensor, "batch tokens hidden"]
    router_stats: tuple[RouterStats, ...]


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer) if config.is_moe_layer(layer) else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "batch tokens hidden"],
        turn: Rotation,
        segments: Segments | None,
        cache: LatentCache | None,
        dropping: Dropping | None = None,
        chosen: Int[Tensor, "batch tokens chosen"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], RouterStats | None]:
        """Return the block's output and, for a MoE layer, its router's statistics."""
        x = x + self.self_attn(self.input_layernorm(x), turn, segments=segments, cache=cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, dropping, chosen)
            return x + out, stats
        return x + self.mlp(normed), None


class Body(nn.Module):
    """Embedding, blocks, final norm: the part that published checkpoints prefix with ``model.``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A DeepSeek-V2 model. Its weights mean nothing until ``initialise`` or a checkpoint fills them."""

    head: ClassVar[Head] = "lm_head"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.frequencies = rope_frequencies(config)  # no buffer: a cast of the model to bf16 must not round them
        self.add_head()

    def add_head(self) -> None:
        """Put the head on the body; a reward model has another."""
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"] | None = None,
        document_ids: Int[Tensor, "batch tokens"] | None = None,
        cache: LatentCache | None = None,
        *,
        dropping: Dropping | None = None,
        recompute: bool = False,
        experts: Int[Tensor, "layers batch tokens chosen"] | None = None,
    ) -> ModelOutput:
        """Run the stack; the head is separate (``logits``), so that a loss can take the vocabulary in pieces.

        Args:
            tokens: ids.
            positions: absolute position of each token; None: 0, 1, 2, ... in every row.
            document_ids: of a packed batch: attention stays within runs of equal id. None: every row is one document.
            cache: latents of earlier tokens; then ``positions`` must say where the new ones stand.
            dropping: of a training step that drops tokens; None: every expert computes all that is sent to it.
            recompute: keep only each block's input for the backward pass, and compute the block again there: same gradients, less memory.
            experts: of each MoE layer, the experts to send each token to, instead of the routers' choice (router replay).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        segments = None if document_ids is None else find_segments(document_ids)
        turn = rotation(positions, self.frequencies.to(tokens.device), self.config.rotation_scale)
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        stats: list[RouterStats] = []
        for block in self.model.layers:
            chosen = experts[len(stats)] if experts is not None and isinstance(block.mlp, MoE) else None
            if recompute:  # the model draws no random numbers, so there is no state of them to keep
                x, layer_stats = checkpoint(
                    block, x, turn, segments, cache, dropping, chosen, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, layer_stats = block(x, turn, segments, cache, dropping, chosen)
            if layer_stats is not None:
                stats.append(layer_stats)
        return ModelOutput(self.model.norm(x), tuple(stats))

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Map hidden states to unnormalised scores over the vocabulary."""
        out: Tensor = self.lm_head(hidden)
        return out
