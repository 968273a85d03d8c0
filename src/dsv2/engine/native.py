"""The layer stack in native code: a model's weights where they lie, one call for a whole step (kernels/cpu).

Plain weights are read in place, so a training loop that changes them changes what is generated. A row's logits depend on its own sequence
alone, whatever shares the step.
"""

import ctypes
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from dsv2.engine.cache import LatentStore
from dsv2.errors import CheckpointError, ConfigError, RequestError
from dsv2.kernels.cpu import library as native
from dsv2.model.attention import LATENT_NORM_EPS
from dsv2.model.config import ModelConfig
from dsv2.model.experts import LocalDispatch, RoutedExperts
from dsv2.model.layers import SwiGLU
from dsv2.model.moe import MoE
from dsv2.model.rope import rope_frequencies
from dsv2.model.transformer import Block, Transformer

_LARGEST_HEAD, _LARGEST_LATENT = 2048, 8192  # what the kernels keep on their stack


def serves(model: Transformer) -> bool:
    """Tell whether the native step computes what this model does: fp32 or bf16 on the CPU, and nothing put in a module's place."""
    plain = type(model).forward is Transformer.forward and type(model).logits is Transformer.logits
    plain = plain and all(isinstance(m.transport, LocalDispatch) for m in model.modules() if isinstance(m, RoutedExperts))
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return plain and dtypes <= {torch.float32, torch.bfloat16} and all(p.device.type == "cpu" for p in model.parameters())


@dataclass(slots=True)
class StackWeights:
    """A model's weights as the native step reads them.

    Args:
        config: of the model.
        layers: one structure per layer.
        final_norm: gain of the last norm.
        embedding: rows of the vocabulary.
        head: rows of the vocabulary.
        owners: whatever keeps the memory alive that the structures point to.
        weights_id: of the folder that they come from; None: they may change.
    """

    config: ModelConfig
    layers: list[native.Layer]
    final_norm: native.Vector
    embedding: native.Matrix
    head: native.Matrix
    owners: list[object] = field(default_factory=list)
    weights_id: str | None = None


def weights_of(model: Transformer) -> StackWeights:
    """Describe a model in memory; nothing is copied.

    Raises:
        ValueError: a weight is not contiguous fp32 or bf16 in the CPU's memory.
    """
    layers = [_layer_of(block) for block in model.model.layers if isinstance(block, Block)]
    body = model.model
    return StackWeights(
        model.config,
        layers,
        native.vector(body.norm.weight),
        native.matrix(body.embed_tokens.weight),
        native.matrix(model.lm_head.weight),
        # a parameter may get other memory at any time; what is described here stays until it is described again
        [model, *(parameter.detach() for parameter in model.parameters())],
    )


def _layer_of(block: Block) -> native.Layer:
    attention, mlp = block.self_attn, block.mlp
    named: dict[str, Tensor] = {
        "attention_norm": block.input_layernorm.weight,
        "latent_norm": attention.kv_a_layernorm.weight,
        "feed_forward_norm": block.post_attention_layernorm.weight,
        "latent": attention.kv_a_proj_with_mqa.weight,
        "up": attention.kv_b_proj.weight,
        "out": attention.o_proj.weight,
        "query": attention.q_b_proj.weight if attention.compressed_queries else attention.q_proj.weight,
    }
    if attention.compressed_queries:
        named |= {"query_down": attention.q_a_proj.weight, "query_norm": attention.q_a_layernorm.weight}
    always = mlp.shared_experts if isinstance(mlp, MoE) else mlp
    if isinstance(always, SwiGLU):
        named |= {"gate": always.gate_proj.weight, "up_gate": always.up_proj.weight, "down": always.down_proj.weight}
    layer = native.Layer()
    if isinstance(mlp, MoE):
        named |= {"router": mlp.gate.weight, "expert_gate_up": mlp.experts.gate_up_proj, "expert_down": mlp.experts.down_proj}
        layer.expert_width = layer.expert_stride = mlp.experts.down_proj.shape[-1]
    for name, tensor in named.items():
        setattr(layer, name, native.vector(tensor) if name in native.VECTORS else native.matrix(tensor))
    return layer


class Piece(NamedTuple):
    """Neighbouring tokens of one sequence in a step.

    Args:
        tokens: their ids.
        position: of the first, counted from 0; the cache holds all before it.
        blocks: of the sequence's cache, for all its tokens up to the last of these; an array of ints ("i") is read where it lies.
        expanded: read keys and values in the expanded reading; else in the absorbed one.
        wanted: rows, counted from the first, whose logits are wanted.
    """

    tokens: Sequence[int]
    position: int
    blocks: Sequence[int]
    expanded: bool
    wanted: Sequence[int]


@dataclass(frozen=True, slots=True)
class Answered:
    """What a step returns; arrays are valid until the next step.

    Args:
        logits: of the wanted rows, in order.
        best: the first of the largest logits of each row, among the ids in use.
        best_logit: its logit; NaN where a logit of the row is not finite.
        experts: [MoE layers, rows, chosen], where asked for.
    """

    logits: Float32[np.ndarray, "wanted vocab"]
    best: Int32[np.ndarray, " wanted"]
    best_logit: Float32[np.ndarray, " wanted"]
    experts: Int32[np.ndarray, "layers rows chosen"] | None


class NativeStack:
    """A model and its cache behind one native call.

    Args:
        weights: of the model.
        store: the latent cache.
        live: the model that they describe, where it is one in memory whose weights change.
        threads: that work on a step, the caller's among them.
        num_tokens: ids in use; the padding of the vocabulary is never the best.
        variant: of the kernels; None: the best that the processor has.

    Raises:
        Unavailable: there are no native kernels here.
        ConfigError: the model's heads or latents are larger than the kernels allow.
    """

    def __init__(
        self,
        weights: StackWeights,
        store: LatentStore,
        *,
        threads: int,
        num_tokens: int,
        live: Transformer | None = None,
        variant: str | None = None,
    ) -> None:
        config = weights.config
        if max(config.qk_nope_head_dim, config.qk_rope_head_dim) > _LARGEST_HEAD or config.kv_lora_rank > _LARGEST_LATENT:
            raise ConfigError(
                f"native kernels serve heads up to {_LARGEST_HEAD} and latents up to {_LARGEST_LATENT}; this model's are larger"
            )
        self._lib = native.library(variant)
        self.weights, self.store, self._live, self._threads = weights, store, live, threads
        self._frequencies = rope_frequencies(config).contiguous()
        self._cache = native.Cache(store.format, store.entry_bytes, store.num_blocks, 0, store.memory.address)
        self._open(weights)
        self._num_tokens, self._vocab = num_tokens, config.vocab_size
        self._moe_layers, self._chosen = config.num_moe_layers, config.num_experts_per_tok or 0
        self._logits = np.empty((0, config.vocab_size), np.float32)
        self._best, self._best_logit = np.empty(0, np.int32), np.empty(0, np.float32)

    def _open(self, weights: StackWeights) -> None:
        self.weights = weights
        self._layers = (native.Layer * len(weights.layers))(*weights.layers)
        self._model = _model_of(weights, self._layers, self._frequencies)
        self._process = os.getpid()
        self._handle = self._lib.dsv2_open(ctypes.byref(self._model), self._threads)
        if not self._handle:
            raise MemoryError("the native step could not be set up")

    def weights_changed(self) -> None:
        """Find a live model's weights anew where they lie elsewhere now, as after ``load_state_dict(assign=True)``."""
        if self._live is None:
            return
        found = weights_of(self._live)
        if _places(found) != _places(self.weights):
            self.close()
            self._open(found)

    def close(self) -> None:
        """Stop the threads and give back the working memory."""
        handle, self._handle = self._handle, None
        if handle and os.getpid() == self._process:  # a fork has the memory but not the threads, and would wait for them for ever
            self._lib.dsv2_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    @property
    def kernels(self) -> str:
        """Which code computes here: variant, compiler, flags and sources by their hash."""
        return Path(self._lib._name).stem

    def views(self, block: int) -> list[memoryview]:
        """Return a block's latents, layer by layer, writable."""
        return self.store.views(block)

    def step(self, pieces: Sequence[Piece], *, want_experts: bool = False) -> Answered:
        """Run all pieces through the stack; their latents are in the cache afterwards.

        Raises:
            CheckpointError: working memory ran out.
            RequestError: it is closed, or was opened by another process.
        """
        if not self._handle:
            raise RequestError("the engine is closed", hint="open the model again")
        if os.getpid() != self._process:
            raise RequestError(
                f"the engine was opened in process {self._process}, this is its fork {os.getpid()}", hint="open the model after the fork"
            )
        tokens, positions, wanted = array("i"), array("i"), array("i")
        segments, tables = (native.Segment * len(pieces))(), []
        for segment, (ids, position, blocks, expanded, rows_wanted) in zip(segments, pieces, strict=True):
            first, count = len(tokens), len(ids)
            table = blocks if isinstance(blocks, array) and blocks.typecode == "i" else array("i", blocks)
            tables.append(table)
            segment.first_row, segment.rows, segment.position, segment.expanded = first, count, position, expanded
            segment.table = table.buffer_info()[0]
            tokens.extend(ids)
            positions.extend(range(position, position + count))
            wanted.extend([first + row for row in rows_wanted])
            if len(table) * native.BLOCK_LEN < position + count:
                raise ValueError(f"{len(table)} blocks do not hold {position + count} tokens")
        rows = len(wanted)
        if rows > len(self._best):
            self._logits = np.empty((rows, self._vocab), np.float32)
            self._best, self._best_logit = np.empty(rows, np.int32), np.empty(rows, np.float32)
        experts = np.empty((self._moe_layers, len(tokens), self._chosen), np.int32) if want_experts else None
        step = native.Step(
            len(tokens), len(pieces), rows, want_experts, tokens.buffer_info()[0], positions.buffer_info()[0], ctypes.addressof(segments),
            wanted.buffer_info()[0], self._logits.ctypes.data, self._best.ctypes.data, self._best_logit.ctypes.data, self._num_tokens, 0,
            None if experts is None else experts.ctypes.data,
        )  # fmt: skip
        code = self._lib.dsv2_step(self._handle, ctypes.byref(self._model), ctypes.byref(step), ctypes.byref(self._cache))
        if code == 1:
            raise CheckpointError("working memory of a step ran out", hint="lower max_step_tokens")
        if code != 0:
            raise ValueError("a step names a token, row or block that does not exist")
        return Answered(self._logits[:rows], self._best[:rows], self._best_logit[:rows], experts)


def _places(weights: StackWeights) -> list[bytes]:
    """Return the descriptions of all weights, addresses included, as bytes that can be compared."""
    return [bytes(described) for described in (*weights.layers, weights.final_norm, weights.embedding, weights.head)]


def _model_of(weights: StackWeights, layers: "ctypes.Array[native.Layer]", frequencies: Tensor) -> native.Model:
    config = weights.config
    limited = config.topk_method == "group_limited_greedy"
    return native.Model(
        hidden=config.hidden_size, layers=config.num_hidden_layers, heads=config.num_attention_heads, nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim, value=config.v_head_dim, latent=config.kv_lora_rank, query_latent=config.q_lora_rank or 0,
        vocab=config.vocab_size, experts=config.n_routed_experts or 0, chosen=config.num_experts_per_tok or 0,
        groups=config.n_group if limited else 1, reachable=config.topk_group if limited else 1, renormalise=config.norm_topk_prob,
        norm_eps=config.rms_norm_eps, latent_norm_eps=LATENT_NORM_EPS, softmax_scale=config.softmax_scale,
        rotation_scale=config.rotation_scale, gate_scale=config.routed_scaling_factor, frequencies=frequencies.data_ptr(), layer=layers,
        final_norm=weights.final_norm, embedding=weights.embedding, head=weights.head,
    )  # fmt: skip
