"""The seam between attention and whoever stores its latents: a protocol, no storage.

The engine hands one of these to each forward call. What is cached per token and layer is the latent after its norm (d_c numbers) and the
shared rotary key after its rotation, in interleaved order (d_h^R numbers): nothing else (section 2.1.2).
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class LatentCache(Protocol):
    """Latents of the rows of one forward call."""

    @property
    def visible(self) -> Bool[Tensor, "batch new all"] | None:
        """Which of the entries returned by ``append`` each new token may see: those up to its own position.

        None when nothing needs hiding: one new token per row and all rows equally long, or rows that start empty (plain causal).
        """
        ...

    def append(
        self, layer: int, kv_latent: Float[Tensor, "batch new latent"], k_rope: Float[Tensor, "batch new rope"]
    ) -> tuple[Float[Tensor, "batch all latent"], Float[Tensor, "batch all rope"]]:
        """Write each row's new entries behind its old ones; return every row's entries from token 0, up to the longest row."""
        ...
