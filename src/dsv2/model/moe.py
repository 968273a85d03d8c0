"""DeepSeekMoE: shared experts plus routed experts make one feed-forward layer (eq 20)."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.kernels.autocast import compute_dtype
from dsv2.model.config import ModelConfig
from dsv2.model.dropping import Dropping, drop_assignments
from dsv2.model.experts import RoutedExperts
from dsv2.model.layers import SwiGLU
from dsv2.model.router import Router, RouterStats


class MoE(nn.Module):
    """Shared and routed experts of one layer; ``gate.weight`` holds the centroids, as in published checkpoints."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.config = config
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.shared_intermediate_size) if config.shared_intermediate_size else None

    def forward(
        self,
        x: Float[Tensor, "batch tokens hidden"],
        dropping: Dropping | None = None,
        chosen: Int[Tensor, "batch tokens chosen"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], RouterStats]:
        """Return the layer's output without residual, and what the router did.

        Args:
            x: normalised hidden states.
            dropping: device-level token dropping (section 2.2.4); None: nothing is dropped. A dropped assignment's gate is 0.
            chosen: experts to send each token to, instead of the router's choice.
        """
        batch_shape = x.shape[:2]
        flat = x.flatten(0, 1)
        routing = self.gate(flat, None if chosen is None else chosen.flatten(0, 1))
        kept, gates = None, routing.gates
        if dropping is not None:
            kept = drop_assignments(routing, dropping, self.config)
            gates = gates * kept
        flat = flat.to(compute_dtype(flat))  # once for all products but the router's
        out = self.experts(flat, routing.experts, gates)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        stats = RouterStats(
            self.layer,
            routing.affinity.unflatten(0, batch_shape),
            routing.experts.unflatten(0, batch_shape),
            None if kept is None else kept.unflatten(0, batch_shape),
        )
        return out.unflatten(0, batch_shape), stats
