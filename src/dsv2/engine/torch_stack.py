"""The layer stack in torch behind the same call as the native one: for GPUs, and where there is no C++ compiler.

The same blocks of 64 tokens hold the latents, in one tensor. 8 and 6 bits are rounded as the native cache rounds them, but kept in the
model's dtype, so they save nothing here.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.engine.native import Answered, Piece
from dsv2.errors import ConfigError
from dsv2.kernels.cpu.library import BLOCK_LEN, CacheFormat
from dsv2.kernels.formats import round_latent_6, round_latent_8
from dsv2.model.transformer import ModelOutput, Transformer

_ROUNDING: dict[CacheFormat, Callable[[Tensor], Tensor]] = {CacheFormat.EIGHT: round_latent_8, CacheFormat.SIX: round_latent_6}


class TorchStack:
    """A model and its cache.

    Args:
        model: its weights are read at each step.
        kind: of the cache's entries.
        num_blocks: of 64 tokens.
        num_tokens: ids in use; the padding of the vocabulary is never the best.
    """

    def __init__(self, model: Transformer, kind: CacheFormat, num_blocks: int, *, num_tokens: int) -> None:
        weight, config = next(model.parameters()), model.config
        dtype = {CacheFormat.F32: torch.float32, CacheFormat.BF16: torch.bfloat16}.get(kind, weight.dtype)
        self._model, self._kind, self._num_tokens, self._device = model, kind, num_tokens, weight.device
        self._entries = torch.zeros(config.num_hidden_layers, num_blocks * BLOCK_LEN, config.latent_dim, dtype=dtype, device=weight.device)

    def close(self) -> None:
        """Give the cache back."""
        self._entries = self._entries[:0]

    def weights_changed(self) -> None:
        """Nothing to do: every step asks the model."""

    @property
    def kernels(self) -> str:
        """Which code computes here."""
        return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def views(self, block: int) -> list[memoryview]:
        """Return a block's latents, layer by layer, writable.

        Raises:
            ConfigError: they are not in the CPU's memory.
        """
        if self._device.type != "cpu":
            raise ConfigError(f"latents on {self._device} cannot be kept on disk", hint="leave disk_cache out")
        layers = self._entries[:, block * BLOCK_LEN : (block + 1) * BLOCK_LEN].view(torch.uint8).numpy()
        return [layer.reshape(-1).data for layer in layers]

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece], *, want_experts: bool = False) -> Answered:
        """Run all pieces through the model; see ``NativeStack.step``."""
        logits: dict[int, Tensor] = {}
        experts: dict[int, np.ndarray] = {}
        single = [index for index, piece in enumerate(pieces) if len(piece.tokens) == 1]
        for group in ([single] if single else []) + [[index] for index in range(len(pieces)) if index not in single]:
            chosen = [pieces[index] for index in group]
            output = self._forward(chosen)
            for row, (index, piece) in enumerate(zip(group, chosen, strict=True)):
                logits[index] = self._model.logits(output.hidden[row, list(piece.wanted)]).float()
                if want_experts:
                    experts[index] = np.stack([stats.experts[row].int().cpu().numpy() for stats in output.router_stats])
        rows = torch.cat([logits[index] for index in range(len(pieces))])
        best_logit, best = rows[:, : self._num_tokens].max(dim=-1)
        finite = torch.isfinite(rows[:, : self._num_tokens]).all(dim=-1)
        return Answered(
            rows.cpu().numpy(),
            best.int().cpu().numpy(),
            torch.where(finite, best_logit, torch.nan).cpu().numpy(),
            np.concatenate([experts[index] for index in range(len(pieces))], axis=1) if want_experts else None,
        )

    def _forward(self, pieces: Sequence[Piece]) -> ModelOutput:
        """Run pieces of equal length as one batch."""
        new, longest = len(pieces[0].tokens), max(piece.position + len(piece.tokens) for piece in pieces)
        positions = torch.tensor([range(piece.position, piece.position + new) for piece in pieces], device=self._device)
        tokens = torch.tensor([list(piece.tokens) for piece in pieces], device=self._device)
        blocks = [list(piece.blocks[: -(-longest // BLOCK_LEN)]) for piece in pieces]
        width = max(map(len, blocks))
        table = torch.tensor([row + [0] * (width - len(row)) for row in blocks], device=self._device)
        places = (table[:, :, None] * BLOCK_LEN + torch.arange(BLOCK_LEN, device=self._device)).flatten(1)[:, :longest]
        output: ModelOutput = self._model(tokens, positions=positions, cache=_PagedView(self, places, positions))
        return output

    def write(self, layer: int, places: Int[Tensor, "batch new"], kv_latent: Float[Tensor, "batch new latent"], k_rope: Tensor) -> None:
        """Store new entries of a layer, rounded as its format asks."""
        if self._kind in _ROUNDING:
            kv_latent = _ROUNDING[self._kind](kv_latent).to(kv_latent.dtype)
            k_rope = k_rope.to(torch.bfloat16).to(k_rope.dtype)
        self._entries[layer][places.flatten()] = torch.cat((kv_latent, k_rope), dim=-1).flatten(0, 1).to(self._entries.dtype)

    def read(self, layer: int, places: Int[Tensor, "batch all"]) -> Float[Tensor, "batch all latent_and_rope"]:
        """Return entries of a layer."""
        found: Tensor = self._entries[layer][places]
        return found


class _PagedView:
    """The blocks of some sequences during one forward call: ``model.cache.LatentCache``."""

    visible: Bool[Tensor, "batch new all"] | None

    def __init__(self, stack: TorchStack, places: Int[Tensor, "batch all"], positions: Int[Tensor, "batch new"]) -> None:
        self._stack, self._places = stack, places
        self._new_places = places.gather(1, positions)
        seen = torch.arange(places.shape[1], device=places.device) <= positions[:, :, None]
        self._present = seen[:, -1, :, None]
        self.visible = None if places.shape[1] == positions.shape[1] else seen

    def append(
        self, layer: int, kv_latent: Float[Tensor, "batch new latent"], k_rope: Float[Tensor, "batch new rope"]
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new entries; return all entries up to the longest row's last, zeros where a row has none."""
        self._stack.write(layer, self._new_places, kv_latent, k_rope)
        found = self._stack.read(layer, self._places).to(kv_latent.dtype)
        # zeros, never what lies there: a NaN of another request would spoil a sum that gives it no weight
        kept = torch.where(self._present, found, 0)
        latent, rope = kept.split((kv_latent.shape[-1], k_rope.shape[-1]), dim=-1)
        return latent, rope
