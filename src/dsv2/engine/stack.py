"""Choosing what runs the layer stack, how large its cache is and in how many bits: decided here, shown as a plan."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dsv2.engine.blocks import BLOCK_LEN, blocks_for
from dsv2.engine.cache import NAMES, LatentStore, entry_bytes
from dsv2.engine.native import Answered, NativeStack, Piece, StackWeights, serves, weights_of
from dsv2.engine.settings import Backend, CacheKind
from dsv2.engine.tier import DiskTier, fingerprint
from dsv2.engine.torch_stack import TorchStack
from dsv2.errors import ConfigError
from dsv2.kernels.cpu.build import Unavailable
from dsv2.kernels.cpu.library import CacheFormat, Type, library
from dsv2.machine import available_memory
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.progress import say

_SHARE = 0.5  # of the available memory that a cache may take when nobody says how much
_LEAST_TOKENS = 4096  # a cache that nobody sized holds at least one request of this length, or of the context if that is shorter


class Stack(Protocol):
    """A model and its cache: tokens in, logits out."""

    def step(self, pieces: "list[Piece]", *, want_experts: bool = False) -> Answered:
        """Run some tokens of some sequences."""
        ...

    def weights_changed(self) -> None:
        """Read the weights from where they lie now."""
        ...

    @property
    def kernels(self) -> str:
        """Which code computes, told apart wherever its results could differ."""
        ...

    def views(self, block: int) -> list[memoryview]:
        """Return a block's latents, layer by layer, writable."""
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The size of the latent cache.

    Args:
        kind: format of an entry.
        num_blocks: of 64 tokens.
        bytes_per_token: over all layers.
    """

    kind: CacheFormat
    num_blocks: int
    bytes_per_token: int

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * BLOCK_LEN

    @property
    def num_bytes(self) -> int:
        """Memory when it is full."""
        return self.num_tokens * self.bytes_per_token

    def __str__(self) -> str:
        bits = {CacheFormat.F32: "fp32", CacheFormat.BF16: "bf16", CacheFormat.EIGHT: "8 bits", CacheFormat.SIX: "6 bits"}[self.kind]
        return f"{self.num_tokens:,} tokens in {bits}, {self.num_bytes / 1e9:.3g} GB when full ({self.bytes_per_token:,} bytes a token)"


def plan_cache(config: ModelConfig, kind: CacheKind, *, max_batch: int, max_len: int, cache_gb: float | None, fp32: bool) -> CachePlan:
    """Size the cache: what was asked for, else all requests at full length, else half of the available memory.

    Args:
        config: of the model.
        kind: "auto": as the weights.
        max_batch: most requests at once.
        max_len: most tokens of a request.
        cache_gb: 1e9 bytes; None: by the rule above.
        fp32: the weights are.

    Raises:
        ConfigError: the kind is not possible, not even one block fits, or more is asked for than memory has.
    """
    chosen = NAMES[("fp32" if fp32 else "bf16") if kind == "auto" else str(kind)]
    per_token = config.num_hidden_layers * entry_bytes(config, chosen)
    wanted, free = max_batch * blocks_for(max_len), available_memory()
    if cache_gb is not None:
        blocks = int(cache_gb * 1e9) // (BLOCK_LEN * per_token)
        if blocks < 1:
            raise ConfigError(
                f"cache_gb = {cache_gb:g} holds not even one block of {BLOCK_LEN} tokens, {BLOCK_LEN * per_token / 1e9:.4f} GB"
            )
        if free is not None and cache_gb * 1e9 > free:
            raise ConfigError(f"cache_gb = {cache_gb:g} is more than the {free / 1e9:.1f} GB of memory that are available", hint="lower it")
        return CachePlan(chosen, blocks, per_token)
    room = wanted if free is None else int(free * _SHARE) // (BLOCK_LEN * per_token)
    return CachePlan(chosen, min(wanted, max(room, blocks_for(min(max_len, _LEAST_TOKENS)))), per_token)


def open_stack(model: Transformer | StackWeights, plan: CachePlan, *, backend: Backend, threads: int | None, num_tokens: int) -> Stack:
    """Return what runs the stack: native code where it can, else torch.

    Raises:
        Unavailable: native code was asked for, or is needed, and cannot run here; the message says why.
        ConfigError: it does not serve this model, or DSV2_CPU names no kernels.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if not 1 <= threads <= (os.cpu_count() or 1) * 4:
        raise ConfigError(f"threads = {threads} is not from 1 to {(os.cpu_count() or 1) * 4}")
    if isinstance(model, StackWeights):
        hint = "or serve the folder that was packed, which torch can run"
        if backend == "torch":
            raise ConfigError("a packed model needs the native kernels: backend = torch cannot run it", hint=f"leave backend out, {hint}")
        try:
            return NativeStack(model, LatentStore(model.config, plan.kind, plan.num_blocks), threads=threads, num_tokens=num_tokens)
        except Unavailable as why:
            advice = why.hint or "leave DSV2_CPU unset"
            raise Unavailable(f"a packed model needs the native kernels: {why.message}", hint=f"{advice}, {hint}") from why
    native = serves(model)
    if backend == "native" and not native:
        raise ConfigError(
            "the native step serves DeepSeek-V2 models in fp32 or bf16 in the CPU's memory; this one is not", hint="use backend = torch"
        )
    if backend != "torch" and native:
        try:
            library()
            store = LatentStore(model.config, plan.kind, plan.num_blocks)
            return NativeStack(weights_of(model), store, threads=threads, num_tokens=num_tokens, live=model)
        except Unavailable as why:
            if backend == "native":
                raise
            if os.environ.get("DSV2_CPU") != "torch":  # which asks for it
                say(f"torch computes in place of the native kernels: {why.message}" + (f" ({why.hint})" if why.hint else ""))
    return TorchStack(model, plan.kind, plan.num_blocks, num_tokens=num_tokens)


def open_tier(
    folder: Path | None, gb: float, model: Transformer | StackWeights, plan: CachePlan, stack: Stack, *, weights_id: str | None, reuse: bool
) -> DiskTier | None:
    """Return a disk tier for a stack's cache, None where no folder is given.

    Args:
        folder: of its files.
        gb: most that lies there, 1e9 bytes.
        model: that the stack runs.
        plan: of its cache.
        stack: what computes the latents, and holds them.
        weights_id: of the model's weights; None: a packed model's own, else none.
        reuse: as the engine's.

    Raises:
        ConfigError: the tier would never be read, the folder cannot be made, too few bytes, or the latents are not in the CPU's memory.
    """
    if folder is None:
        return None
    if not reuse:
        raise ConfigError(f"disk_cache = {folder} would never be read with reuse = False", hint="leave one of them out")
    if not 0 < gb < math.inf:
        raise ConfigError(f"disk_cache_gb = {gb} is not a finite number > 0")
    dtypes = []
    if isinstance(model, StackWeights):
        weights_id = weights_id or model.weights_id
    else:
        dtypes = [f"{name} {value.dtype}" for name, value in model.state_dict().items()]
    made_by = weights_id and fingerprint(model.config, weights_id, dtypes, stack.kernels, plan.kind.name, plan.bytes_per_token)
    return DiskTier(Path(folder), int(gb * 1e9), stack.views, made_by)


def is_fp32(model: Transformer | StackWeights) -> bool:
    """Tell whether a model's embedding is fp32."""
    if isinstance(model, StackWeights):
        return bool(model.embedding.type == Type.F32)
    return next(model.parameters()).dtype == torch.float32
