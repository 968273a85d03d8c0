"""The latent cache as one slab: a row per running request, a place per token.

It holds exactly kv_lora_rank + qk_rope_head_dim numbers per token and layer: the latent after its norm, then the rotated key shared by
all heads (section 2.1.3). Its views are what ``model/cache.py`` asks for.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Rows grow in steps of doubling from here, so that a model with a long context costs only what its requests use.
FIRST_LEN = 256


class LatentSlab:
    """One tensor [layers, rows, tokens, kv_lora_rank + qk_rope_head_dim], grown on demand.

    Args:
        num_layers: layers of the model.
        max_batch: most requests at once.
        max_len: most tokens of a request, prompt and answer together.
        kv_lora_rank: d_c, numbers of a latent.
        qk_rope_head_dim: d_h^R, numbers of a rotated key.
        dtype: of the entries.
        device: where the entries live.
    """

    def __init__(
        self,
        num_layers: int,
        max_batch: int,
        max_len: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_batch = max_batch
        self.max_len = max_len
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.entries = torch.zeros(num_layers, 0, 0, kv_lora_rank + qk_rope_head_dim, dtype=dtype, device=device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one cached token takes over all layers."""
        num_layers, _, _, width = self.entries.shape
        return num_layers * width * self.entries.element_size()

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for ``num_rows`` rows of ``length`` tokens, keeping what is there; at most ``max_batch`` and ``max_len``.

        New places hold zeros, never what memory held before: a masked NaN would still spoil the attention's weighted sum.
        """
        num_layers, old_rows, old_len, width = self.entries.shape
        if num_rows <= old_rows and length <= old_len:
            return
        new_rows = max(old_rows, min(self.max_batch, _power_of_two(num_rows)))
        new_len = max(old_len, min(self.max_len, _power_of_two(max(length, FIRST_LEN))))
        with torch.inference_mode(False):  # a slab made inside it could not be written outside, where rows move
            grown = self.entries.new_zeros(num_layers, new_rows, new_len, width)
            grown[:, :old_rows, :old_len] = self.entries
        self.entries = grown

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over those of row ``target``."""
        self.entries[:, target, :length] = self.entries[:, source, :length]

    def clear(self, row: int) -> None:
        """Set a row to zeros, after a request that may have left NaN in it."""
        if row < self.entries.shape[1]:
            self.entries[:, row] = 0

    def view(self, rows: range, start_lens: Sequence[int], new_len: int) -> "SlabView":
        """Return the cache for one forward call.

        Args:
            rows: neighbouring rows, so that nothing is copied; the i-th belongs to the i-th row of the batch.
            start_lens: tokens that each row holds already.
            new_len: tokens that the call adds to every row.
        """
        return SlabView(self, rows, start_lens, new_len)


class SlabView:
    """Some rows of a slab during one forward call: ``model.cache.LatentCache``.

    Attributes:
        visible: which entries each query sees. None where the shapes say it: plain causal for a prompt that starts from empty rows,
            everything for one new token in rows of equal length.
    """

    visible: Bool[Tensor, "batch tokens entries"] | None

    def __init__(self, slab: LatentSlab, rows: range, start_lens: Sequence[int], new_len: int) -> None:
        start, longest = start_lens[0], max(start_lens) + new_len
        window = slab.entries.narrow(1, rows.start, len(rows)).narrow(2, 0, longest)
        # Cut for all layers at once: slicing layer by layer takes longer than a small model's attention.
        self._latents = window.narrow(3, 0, slab.kv_lora_rank).unbind(0)
        self._ropes = window.narrow(3, slab.kv_lora_rank, slab.qk_rope_head_dim).unbind(0)
        if all(other == start for other in start_lens):
            self._places = None
            added = window.narrow(2, start, new_len)
            self._new_latents = added.narrow(3, 0, slab.kv_lora_rank).unbind(0)
            self._new_ropes = added.narrow(3, slab.kv_lora_rank, slab.qk_rope_head_dim).unbind(0)
        else:
            device = window.device
            row_ids = torch.arange(len(rows), device=device)[:, None]
            self._places = (row_ids, torch.tensor(start_lens, device=device)[:, None] + torch.arange(new_len, device=device))
        if self._places is None and (start == 0 or new_len == 1):
            self.visible = None
        else:
            last_seen = torch.tensor(start_lens, device=window.device)[:, None] + torch.arange(new_len, device=window.device)
            self.visible = torch.arange(longest, device=window.device) <= last_seen[:, :, None]

    def append(
        self, layer: int, kv_latent: Float[Tensor, "batch tokens latent"], k_rope: Float[Tensor, "batch tokens rope"]
    ) -> tuple[Float[Tensor, "batch entries latent"], Float[Tensor, "batch entries rope"]]:
        """Write one layer's new entries; return all its entries up to the longest row's last, in the dtype of the new ones.

        What is returned looks into the slab (unless the dtypes differ) and ends with zeros or stale entries in shorter rows.
        """
        if self._places is None:
            self._new_latents[layer].copy_(kv_latent)
            self._new_ropes[layer].copy_(k_rope)
        else:
            self._latents[layer].index_put_(self._places, kv_latent.to(self._latents[layer].dtype))
            self._ropes[layer].index_put_(self._places, k_rope.to(self._ropes[layer].dtype))
        return self._latents[layer].to(kv_latent.dtype), self._ropes[layer].to(k_rope.dtype)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
