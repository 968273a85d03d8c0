"""Exact arithmetic about a config: parameters, tensors, what a token activates, what it leaves in the cache. Without torch (spec 1.2, 2.3).

Everything about weights follows from one table, ``parts``: which tensors the model has, of which shape, how often. Symbols are those of
the paper: d hidden_size, l layers, n_h heads, d_h = qk_nope_head_dim, d_h^R = qk_rope_head_dim, d_v = v_head_dim, d_c = kv_lora_rank,
d_c' = q_lora_rank, N_r routed and N_s shared experts, K_r routed experts a token uses, m width of one expert, V vocabulary.
"""

import math
from dataclasses import dataclass

from dsv2.model.config import ModelConfig

Shape = tuple[int, ...]


# Weights ----------------------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of block of a model.

    Args:
        name: what it is.
        shapes: of the tensors of one, [out, in] as in a published checkpoint.
        number: how many the model has.
        used: how many of them one token uses.
        formula: parameters of one, in the symbols of the paper.
    """

    name: str
    shapes: tuple[Shape, ...]
    number: int
    used: int
    formula: str

    @property
    def each(self) -> int:
        """Parameters of one."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def total(self) -> int:
        """Parameters of all."""
        return self.number * self.each

    @property
    def activated(self) -> int:
        """Parameters of those that one token uses."""
        return self.used * self.each


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """Return what the model is made of, in the order data flows; what a config does not have is left out (spec 1.2, 1.3).

    Router and shared experts come once in every MoE layer; N_s shared experts are one block of width N_s m.
    """
    c, d = config, config.hidden_size
    layers, moe = c.num_hidden_layers, c.num_moe_layers
    m, routed, chosen = c.moe_intermediate_size or 0, c.n_routed_experts or 0, c.num_experts_per_tok or 0
    heads = 0 if c.tie_word_embeddings else 1
    found = (
        Part("embedding", ((c.vocab_size, d),), 1, 1, "V d"),
        Part("attention", _attention_shapes(c), layers, layers, _attention_formula(c)),
        Part("layer norms", ((d,), (d,)), layers, layers, "2 d"),
        Part("dense FFN", _swiglu(d, c.intermediate_size), layers - moe, layers - moe, "3 d intermediate_size"),
        Part("router", ((routed, d),), moe, moe, "N_r d"),
        Part("shared experts", _swiglu(d, c.shared_intermediate_size), moe if c.shared_intermediate_size else 0, moe, "3 d N_s m"),
        Part("routed expert", _swiglu(d, m), moe * routed, moe * chosen, "3 d m"),
        Part("final norm", ((d,),), 1, 1, "d"),
        Part("head", ((c.vocab_size, d),), heads, heads, "V d"),
    )
    return tuple(part for part in found if part.number)


def _attention_shapes(c: ModelConfig) -> tuple[Shape, ...]:
    heads, d, query_width = c.num_attention_heads, c.hidden_size, c.num_attention_heads * c.qk_head_dim
    if c.q_lora_rank is None:
        queries: tuple[Shape, ...] = ((query_width, d),)
    else:
        queries = ((c.q_lora_rank, d), (c.q_lora_rank,), (query_width, c.q_lora_rank))
    keys_values = ((c.latent_dim, d), (c.kv_lora_rank,), (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank))
    return (*queries, *keys_values, (d, heads * c.v_head_dim))


def _attention_formula(c: ModelConfig) -> str:
    queries = "d n_h (d_h + d_h^R)" if c.q_lora_rank is None else "d d_c' + d_c' + d_c' n_h (d_h + d_h^R)"
    return f"{queries} + d (d_c + d_h^R) + d_c + d_c n_h (d_h + d_v) + n_h d_v d"


def _swiglu(d: int, width: int) -> tuple[Shape, ...]:
    """Gate, up and down projection."""
    return ((width, d), (width, d), (d, width))


def attention_parameters(config: ModelConfig) -> int:
    """Return the parameters of one attention layer, latent norms included (equations 37-47)."""
    return sum(math.prod(shape) for shape in _attention_shapes(config))


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters from the shapes alone: sum over ``parts`` of number x each, for the activated ones used x each (spec 1.2)."""
    found = parts(config)
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    return Parameters(sum(part.total for part in found), embedding, head, sum(part.activated for part in found))


def count_tensors(config: ModelConfig) -> int:
    """Count the tensors of a published checkpoint, every expert's three apart: sum over ``parts`` of number x tensors (spec 1.2, 1.3)."""
    return sum(part.number * len(part.shapes) for part in parts(config))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that the weights take in one number format, exactly.

    Args:
        name: of the format.
        num_bytes: of all weights.
        formula: how they are counted.
    """

    name: str
    num_bytes: int
    formula: str


def weight_memory(config: ModelConfig) -> tuple[Memory, ...]:
    """Return the weights' bytes by number format.

    The 8- and 4.5-bit formats hold matrices; the gains of the norms, about one parameter in 200,000, stay in 16 bits. Activations, cache
    and buffers are not counted.
    """
    total = count_parameters(config).total
    tensors = [(part.number, shape) for part in parts(config) for shape in part.shapes]
    gains = sum(number * shape[0] for number, shape in tensors if len(shape) == 1)
    rows = [(number * shape[0], shape[1]) for number, shape in tensors if len(shape) == 2]
    eight = sum(number * (width + 4) for number, width in rows)
    four = sum(number * math.ceil(width / 32) * 18 for number, width in rows)
    return (
        Memory("fp32", 4 * total, "4 bytes each"),
        Memory("bf16, fp16", 2 * total, "2 bytes each"),
        Memory("8 bit: fp8, int8", eight + 2 * gains, "1 byte each + one fp32 scale a row of a matrix"),
        Memory("4.5 bit: int4", four + 2 * gains, "4 bits each + one 16-bit scale for 32 of a row"),
    )


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return FLOP for one token forward and backward: 6 per activated parameter, everything counted, plus causal attention.

    Attention: 3 (forward, two in backward) * layers * 2 * heads * (key + value width) * seq_len/2, as in spec 4.2 and 10.21.
    """
    c = config
    attention = 3 * c.num_hidden_layers * 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * seq_len / 2
    return 6 * count_parameters(c).activated + attention


# Cache ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cache:
    """What one kind of attention stores for every token of the context, in all layers.

    Args:
        name: "MLA", or a twin: the same layers and heads with another kind of attention.
        groups: heads that keys and values are stored for; MLA's are those of the GQA with an equal cache.
        elements: numbers per token.
        formula: of table 1 of the paper.
    """

    name: str
    groups: int | float
    elements: int
    formula: str


def cache_elements_per_token(config: ModelConfig) -> int:
    """Return the numbers cached per token: (d_c + d_h^R) * layers (section 2.1.4)."""
    return config.latent_dim * config.num_hidden_layers


def caches(config: ModelConfig, *, gqa_groups: int = 8) -> tuple[Cache, ...]:
    """Return the caches of MLA and of its twins with the same layers and heads (table 1, section 2.1.4).

    Args:
        config: its twins' heads are d_h wide in keys and d_v in values, without the rotary part that only MLA needs to keep apart.
        gqa_groups: of the GQA twin; 8 as in DeepSeek 67B. Where the heads do not split into so many, the greatest common divisor is
            taken; a twin that is then MHA or MQA is left out.
    """
    c, pair = config, config.qk_nope_head_dim + config.v_head_dim
    width = "2 n_g d_h l" if c.qk_nope_head_dim == c.v_head_dim else "n_g (d_h + d_v) l"
    groups = math.gcd(gqa_groups, c.num_attention_heads)
    twins = [("MHA", c.num_attention_heads), ("GQA", groups), ("MQA", 1)]
    kept = [twin for twin in twins if twin[0] != "GQA" or 1 < groups < c.num_attention_heads]
    equal = c.latent_dim / pair
    latent = Cache("MLA", equal, cache_elements_per_token(c), f"(d_c + d_h^R) l; GQA n_g = {equal:.4g}")
    formulas = {"MHA": width.replace("n_g", "n_h"), "GQA": width, "MQA": width.replace("n_g ", "")}
    return (latent, *(Cache(name, n, n * pair * c.num_hidden_layers, formulas[name]) for name, n in kept))


def cache_bytes(elements: int, bits: int) -> int | float:
    """Return elements x bits / 8, exactly: an int wherever it is whole. Scales of a quantised cache are not counted (section 3.2.3)."""
    total = elements * bits
    return total // 8 if total % 8 == 0 else total / 8


def saving(small: int | float, large: int | float) -> float:
    """Return what ``small`` saves against ``large``, as a share: 1 - small/large; less than 0 where it takes more."""
    return 1 - small / large
