"""DeepSeek 67B, the dense model that the paper measures V2 against (table 2, figure 1, section 3.2.3): its shape, for arithmetic only.

Layers, width and heads are recalled from the DeepSeek LLM paper; the cache bar of figure 1(b), 389 KB per token, confirms
2 * key/value heads * head width * layers (spec 2.3). Without torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DenseShape:
    """A dense decoder with grouped-query attention and SwiGLU, head and embedding apart."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        """All parameters: attention, feed-forward, norms, embedding, head; each is used for every token."""
        d = self.hidden_size
        attention = 2 * d * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * d * self.intermediate_size + 2 * d) + d + 2 * self.vocab_size * d

    @property
    def cache_elements_per_token(self) -> int:
        """2 n_g d_h l: keys and values of every group in every layer (section 2.1.4)."""
        return 2 * self.num_key_value_heads * self.head_dim * self.num_hidden_layers

    def training_flops_per_token(self, seq_len: int) -> float:
        """6 per parameter, plus causal attention as in ``accounting.training_flops_per_token``."""
        attention = 3 * self.num_hidden_layers * 2 * self.num_attention_heads * 2 * self.head_dim * seq_len / 2
        return 6 * self.parameters + attention


DEEPSEEK_67B = DenseShape(
    num_hidden_layers=95, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, head_dim=128, intermediate_size=22016,
    vocab_size=102400,
)  # fmt: skip
