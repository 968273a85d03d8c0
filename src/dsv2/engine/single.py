"""One token of one request, straight through the weights: the absorbed reading of the model without modules, batches or masks.

At batch 1 a small model spends more time in calls than in arithmetic. This does the same operations on vectors, reading the model's own
parameters, so nothing is copied and changed weights are seen at once. ``model/`` stays the definition; the tests hold the two equal.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv2.engine.slab import LatentSlab
from dsv2.kernels import one_token_swiglu
from dsv2.model.attention import LATENT_NORM_EPS
from dsv2.model.config import ModelConfig
from dsv2.model.experts import LocalDispatch, RoutedExperts
from dsv2.model.layers import SwiGLU
from dsv2.model.moe import MoE
from dsv2.model.rope import rotation
from dsv2.model.router import route
from dsv2.model.transformer import Block, Transformer

Turn = tuple[Float[Tensor, " rope"], Float[Tensor, " rope"]]


def serves(model: Transformer, slab: LatentSlab) -> bool:
    """Tell whether the single-token path applies: fp32 weights and cache on a CPU, and a model that computes as ``Transformer`` does."""
    tensors = [*model.parameters(), slab.entries]
    plain = type(model).forward is Transformer.forward and type(model).logits is Transformer.logits
    plain = plain and all(isinstance(m.transport, LocalDispatch) for m in model.modules() if isinstance(m, RoutedExperts))
    return plain and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


class SingleDecoder:
    """The blocks of a model, unfolded for one token at a time."""

    def __init__(self, model: Transformer, slab: LatentSlab) -> None:
        self._frequencies, self._rotation_scale = model.frequencies, model.config.rotation_scale
        self._slab = slab
        self._embedding, self._head = model.model.embed_tokens.weight, model.lm_head.weight
        self._final_gain, self._eps = model.model.norm.weight, model.config.rms_norm_eps
        blocks = [block for block in model.model.layers if isinstance(block, Block)]
        self._layers = [(Attention(block, model.config), FeedForward(block, model.config)) for block in blocks]

    @torch.inference_mode()
    def decode(self, token: int, row: int, position: int) -> Float[Tensor, "1 vocab"]:
        """Append one token to a row of the slab; return the logits after it.

        Args:
            token: its id.
            row: of the slab; room for the token is reserved.
            position: tokens that the row holds already.
        """
        own, partner = rotation(torch.tensor([[position]]), self._frequencies, self._rotation_scale)
        turn = own[0, 0], partner[0, 0]
        x = self._embedding[token]
        entries = self._slab.entries[:, row, : position + 1].unbind(0)
        for (attention, feed_forward), cached in zip(self._layers, entries, strict=True):
            x = feed_forward(attention(x, cached, turn))
        return torch.mv(self._head, rms_norm(x, self._final_gain, self._eps)).unsqueeze(0)


def rms_norm(x: Float[Tensor, " size"], gain: Float[Tensor, " size"], eps: float) -> Float[Tensor, " size"]:
    """Normalise one vector: the statistic is one number, so it may as well be a Python float."""
    return x * (gain * (1.0 / math.sqrt(torch.dot(x, x).item() / len(x) + eps)))


class Attention:
    """The attention part of a block: its parameters, looked up once, and the absorbed reading for one token (appendix C)."""

    def __init__(self, block: Block, config: ModelConfig) -> None:
        module = block.self_attn
        self.gain, self.eps = block.input_layernorm.weight, config.rms_norm_eps
        self.heads, self.nope, self.rope, self.latent = module.heads, module.nope_dim, module.rope_dim, module.latent_dim
        self.scale = module.scale
        self.compressed = (module.q_a_proj.weight, module.q_a_layernorm.weight) if module.compressed_queries else None
        self.query = module.q_b_proj.weight if module.compressed_queries else module.q_proj.weight
        self.kv_a, self.latent_gain = module.kv_a_proj_with_mqa.weight, module.kv_a_layernorm.weight
        self.kv_b, self.out = module.kv_b_proj.weight, module.o_proj.weight

    def __call__(self, x: Tensor, cached: Float[Tensor, "all latent_and_rope"], turn: Turn) -> Tensor:
        """Write the token's latent and rotary key as the last entry; return x plus the attention over all entries."""
        normed = rms_norm(x, self.gain, self.eps)
        source = normed
        if self.compressed is not None:
            source = rms_norm(torch.mv(self.compressed[0], normed), self.compressed[1], LATENT_NORM_EPS)
        q = torch.mv(self.query, source).view(self.heads, -1)
        kv = torch.mv(self.kv_a, normed)
        rotary = torch.cat((q[:, self.nope :], kv[self.latent :].unsqueeze(0)))  # the shared key as one more head
        swapped = rotary.view(self.heads + 1, -1, 2).flip(-1).view(self.heads + 1, -1)
        rotary = torch.addcmul(rotary * turn[0], swapped, turn[1])
        latents, last = cached[:, : self.latent], cached[-1]
        last[: self.latent].copy_(rms_norm(kv[: self.latent], self.latent_gain, LATENT_NORM_EPS))
        last[self.latent :].copy_(rotary[-1])
        up = self.kv_b.view(self.heads, -1, self.latent)
        absorbed = torch.bmm(q[:, : self.nope].unsqueeze(1), up[:, : self.nope]).squeeze(1)
        scores = torch.mm(torch.cat((absorbed, rotary[:-1]), dim=1), cached.t()).mul_(self.scale)
        mixed = torch.mm(torch.softmax(scores, dim=-1), latents)
        values = torch.bmm(up[:, self.nope :], mixed.unsqueeze(2))
        return torch.addmv(x, self.out, values.view(-1))


class FeedForward:
    """The feed-forward part of a block, dense or MoE, for one token (eq 20)."""

    def __init__(self, block: Block, config: ModelConfig) -> None:
        self.gain, self.config = block.post_attention_layernorm.weight, config
        mlp = block.mlp
        self.centroids = mlp.gate.weight if isinstance(mlp, MoE) else None
        self.stacks = (mlp.experts.gate_up_proj, mlp.experts.down_proj) if isinstance(mlp, MoE) else None
        always = mlp.shared_experts if isinstance(mlp, MoE) else mlp
        self.always = (always.gate_proj.weight, always.up_proj.weight, always.down_proj.weight) if isinstance(always, SwiGLU) else None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x plus the layer's output."""
        normed = rms_norm(x, self.gain, self.config.rms_norm_eps)
        if self.always is not None:
            gate, up, down = self.always
            x = torch.addmv(x, down, F.silu(torch.mv(gate, normed)) * torch.mv(up, normed))
        if self.centroids is not None and self.stacks is not None:
            routing = route(torch.mv(self.centroids, normed).unsqueeze(0), self.config)
            x = x + one_token_swiglu(normed, routing.experts[0].tolist(), routing.gates[0], *self.stacks)
        return x
