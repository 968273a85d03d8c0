"""Running requests to tensors, tensors to logits: prefill in the expanded reading, decode in the absorbed one (section 2.1)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2.engine.single import SingleDecoder, serves
from dsv2.engine.slab import LatentSlab
from dsv2.model.transformer import Transformer


class Runner:
    """A model and the slab that holds its cache.

    Rows are the caller's to number; positions are absolute, counted from the first token of a request.
    """

    def __init__(self, model: Transformer, slab: LatentSlab) -> None:
        self.model = model
        self.slab = slab
        self._device = slab.entries.device
        self._single = SingleDecoder(model, slab) if serves(model, slab) else None

    @torch.inference_mode()
    def prefill(self, row: int, tokens: Sequence[int]) -> Float[Tensor, "1 vocab"]:
        """Write a whole prompt into an empty row; return the logits after its last token, float32."""
        self.slab.reserve(row + 1, len(tokens))
        ids = torch.tensor([tokens], device=self._device)
        positions = torch.arange(len(tokens), device=self._device)[None]
        hidden = self.model(ids, positions=positions, cache=self.slab.view(range(row, row + 1), [0], len(tokens))).hidden
        return self.model.logits(hidden[:, -1]).float()

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Float[Tensor, "batch vocab"]:
        """Append one token to each of the rows from 0 on; return the logits after it, float32.

        Args:
            tokens: one id per row.
            lengths: tokens that each row holds already, which is the new token's position.
        """
        self.slab.reserve(len(tokens), max(lengths) + 1)
        if len(tokens) == 1 and self._single is not None:
            return self._single.decode(tokens[0], 0, lengths[0])
        ids = torch.tensor(tokens, device=self._device)[:, None]
        positions = torch.tensor(lengths, device=self._device)[:, None]
        hidden = self.model(ids, positions=positions, cache=self.slab.view(range(len(tokens)), lengths, 1)).hidden
        return self.model.logits(hidden[:, -1]).float()
