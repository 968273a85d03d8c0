"""What a model costs to serve, from its shape: weights that every token reads, experts, cache, FLOP per cached token. Without torch."""

from dataclasses import dataclass

from dsv2.model.accounting import cache_elements_per_token, count_parameters
from dsv2.model.config import ModelConfig
from dsv2.model.yardstick import DenseShape


@dataclass(frozen=True, slots=True)
class Served:
    """What a model costs to serve, from its shape.

    Args:
        name: what tables call it.
        config: the config; None for the dense yardstick.
        hidden_size: d.
        layers: l.
        moe_layers: of them with routed experts.
        embedding: parameters that are only looked up.
        head: parameters of the output head, which prompts need for one token only.
        routed: parameters of all routed experts.
        fixed: all others, head counted and input embedding not.
        replicated: of the fixed ones, those that tensor parallelism holds on every GPU: q_a_proj, kv_a_proj_with_mqa and both latent
            norms (spec 2.4). Router and layer norms, which are small, count as cut.
        activated: used for a generated token, input embedding not counted.
        cache_elements: cached numbers per token, all layers.
        cache_heads: parts into which tensor parallelism can cut the cache: key/value heads; 1 for MLA.
        heads: query heads.
        decode_flops_per_key: attention of one generated token over one cached one; V2 in the absorbed reading, 2 n_h (2 d_c + d_h^R) l.
        prefill_flops_per_key: attention of one prompt token over another, 2 n_h (key + value width) l.
    """

    name: str
    config: ModelConfig | None
    hidden_size: int
    layers: int
    moe_layers: int
    embedding: int
    head: int
    routed: int
    fixed: int
    replicated: int
    activated: int
    cache_elements: int
    cache_heads: int
    heads: int
    decode_flops_per_key: int
    prefill_flops_per_key: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.fixed + self.routed + self.embedding


def served_model(config: ModelConfig, name: str) -> Served:
    """Describe a DeepSeek-V2 model.

    Args:
        config: its config.
        name: what tables call it.

    Returns:
        Its costs.
    """
    c, counts = config, count_parameters(config)
    routed = c.num_moe_layers * (c.n_routed_experts or 0) * 3 * c.hidden_size * (c.moe_intermediate_size or 0)
    latents = c.hidden_size * c.latent_dim + c.kv_lora_rank + (c.q_lora_rank or 0) * (c.hidden_size + 1)
    looked_up = 0 if c.tie_word_embeddings else counts.embedding
    heads = c.num_hidden_layers * 2 * c.num_attention_heads
    return Served(
        name, c, c.hidden_size, c.num_hidden_layers, c.num_moe_layers, looked_up, c.vocab_size * c.hidden_size, routed,
        counts.total - routed - looked_up, c.num_hidden_layers * latents, counts.activated - looked_up, cache_elements_per_token(c), 1,
        c.num_attention_heads, heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim), heads * (c.qk_head_dim + c.v_head_dim),
    )  # fmt: skip


def served_dense(shape: DenseShape, name: str) -> Served:
    """Describe a dense model with grouped-query attention.

    Args:
        shape: its shape.
        name: what tables call it.

    Returns:
        Its costs.
    """
    vocabulary = shape.vocab_size * shape.hidden_size
    per_key = shape.num_hidden_layers * 2 * shape.num_attention_heads * 2 * shape.head_dim
    return Served(
        name, None, shape.hidden_size, shape.num_hidden_layers, 0, vocabulary, vocabulary, 0, shape.parameters - vocabulary,
        0, shape.parameters - vocabulary, shape.cache_elements_per_token, shape.num_key_value_heads, shape.num_attention_heads,
        per_key, per_key,
    )  # fmt: skip
