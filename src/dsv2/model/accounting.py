"""Exact arithmetic about a config: parameters, what a token activates, what it leaves in the cache. Without torch (spec 1.2, 2.3)."""

from dataclasses import dataclass

from dsv2.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameter counts of a config.

    Args:
        total: all of them; tied embeddings count once.
        embedding: of the input embedding.
        head: of the output head; 0 where it is the embedding itself.
        activated: used for one token, everything counted.
    """

    total: int
    embedding: int
    head: int
    activated: int

    @property
    def activated_without_embedding(self) -> int:
        """Activated, the input embedding not counted: the convention behind "21B" and "2.4B" (spec 10.22)."""
        return self.activated - self.embedding

    @property
    def activated_without_embedding_and_head(self) -> int:
        """Activated, neither embedding nor head counted."""
        return self.activated - self.embedding - self.head


def attention_parameters(config: ModelConfig) -> int:
    """Return the parameters of one attention layer, latent norms included."""
    c, heads = config, config.num_attention_heads
    latent = c.hidden_size * c.latent_dim + c.kv_lora_rank + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    output = heads * c.v_head_dim * c.hidden_size
    query_width = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        return latent + output + c.hidden_size * query_width
    return latent + output + c.hidden_size * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * query_width


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters from the shapes alone."""
    c = config
    embedding = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else embedding
    every_layer = attention_parameters(c) + 2 * c.hidden_size
    dense = 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * (c.moe_intermediate_size or 0)
    moe_fixed = 3 * c.hidden_size * c.shared_intermediate_size + (c.n_routed_experts or 0) * c.hidden_size
    dense_layers = c.num_hidden_layers - c.num_moe_layers
    common = c.num_hidden_layers * every_layer + dense_layers * dense + c.num_moe_layers * moe_fixed + c.hidden_size
    total = common + c.num_moe_layers * (c.n_routed_experts or 0) * expert + embedding + head
    activated = common + c.num_moe_layers * (c.num_experts_per_tok or 0) * expert + embedding + head
    return Parameters(total, embedding, head, activated)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return FLOP for one token forward and backward: 6 per activated parameter, everything counted, plus causal attention.

    Attention: 3 (forward, two in backward) * layers * 2 * heads * (key + value width) * seq_len/2, as in spec 4.2 and 10.21.
    """
    c = config
    attention = 3 * c.num_hidden_layers * 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * seq_len / 2
    return 6 * count_parameters(c).activated + attention


def cache_elements_per_token(config: ModelConfig) -> int:
    """Return the numbers cached per token: (d_c + d_h^R) * layers (section 2.1.4)."""
    return config.latent_dim * config.num_hidden_layers
