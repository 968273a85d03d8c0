"""One record of everything that ``dsv2 info`` says of a model, and that record as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

from dsv2.checkpoint.folder import expected_shapes
from dsv2.checkpoint.names import SCALE, is_quantised
from dsv2.info.target import Capability, Target, Weights
from dsv2.model.accounting import (
    Cache,
    Memory,
    Parameters,
    Part,
    cache_bytes,
    caches,
    count_parameters,
    count_tensors,
    parts,
    saving,
    training_flops_per_token,
    weight_memory,
)
from dsv2.model.config import ModelConfig
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.presets import PRESETS, Published, preset, same_shape

BITS = (16, 8, 6)  # of a cached number; 6 is what DeepSeek deploys (section 3.2.3)
_TRAINING_LEN = 4096


@dataclass(frozen=True, slots=True)
class TokenCache:
    """A kind of attention and the bytes that it caches per token, by bits of a number."""

    kind: Cache
    num_bytes: Mapping[int, int | float]


@dataclass(frozen=True, slots=True)
class Saving:
    """What MLA's cache saves against another, as a share, by the bits of MLA's numbers."""

    against: str
    share: Mapping[int, float]
    formula: str


@dataclass(frozen=True, slots=True)
class Context:
    """A length of context, what is known of it, and the cache of one sequence that long in bytes, by bits of a number."""

    tokens: int
    meaning: str
    cache_bytes: Mapping[int, int | float]


@dataclass(frozen=True, slots=True)
class Description:
    """All that ``dsv2 info`` says of a model.

    Args:
        target: as typed.
        source: what was read: "preset v2", or a path.
        hub_id: of a published preset on the Hugging Face hub.
        same_config: presets of this shape, leaving out the one that was asked for.
        assumed: fields that the preset states without anybody having seen the published config.json.
        config: of the model.
        parameters: in the three conventions.
        parts: what it is made of.
        num_tensors: of a published checkpoint.
        training_len: tokens of a sequence, for the next.
        training_flops_per_token: forward and backward.
        caches: of MLA, its twins and DeepSeek 67B.
        savings: of MLA.
        memory: of the weights by number format.
        contexts: ascending.
        capabilities: with their evidence.
        weights: what the headers say; None without weight files.
    """

    target: str
    source: str
    hub_id: str | None
    same_config: tuple[str, ...]
    assumed: tuple[str, ...]
    config: ModelConfig
    parameters: Parameters
    parts: tuple[Part, ...]
    num_tensors: int
    training_len: int
    training_flops_per_token: float
    caches: tuple[TokenCache, ...]
    savings: tuple[Saving, ...]
    memory: tuple[Memory, ...]
    contexts: tuple[Context, ...]
    capabilities: tuple[Capability, ...]
    weights: Weights | None


def describe(target: Target) -> Description:
    """Return everything that there is to say of a target."""
    config, published = target.config, target.published
    training_len = min(_TRAINING_LEN, config.max_position_embeddings)
    return Description(
        target=target.name,
        source=target.source,
        hub_id=published.hub_id if published else None,
        same_config=tuple(name for name in PRESETS if name != target.preset and same_shape(preset(name), config)),
        assumed=published.unseen if published else (),
        config=config,
        parameters=count_parameters(config),
        parts=parts(config),
        num_tensors=count_tensors(config),
        training_len=training_len,
        training_flops_per_token=training_flops_per_token(config, training_len),
        caches=tuple(TokenCache(kind, _by_bits(kind.elements)) for kind in (*caches(config), _yardstick())),
        savings=_savings(config),
        memory=tuple(sorted((*weight_memory(config), _int8(config)), key=lambda memory: -memory.num_bytes)),
        contexts=_contexts(config, published),
        capabilities=target.capabilities,
        weights=target.weights,
    )


def _by_bits(elements: int) -> dict[int, int | float]:
    return {bits: cache_bytes(elements, bits) for bits in BITS}


def _yardstick() -> Cache:
    shape = DEEPSEEK_67B
    return Cache("DeepSeek 67B", shape.num_key_value_heads, shape.cache_elements_per_token, "2 n_g d_h l = 2 x 8 x 128 x 95")


def _savings(config: ModelConfig) -> tuple[Saving, ...]:
    latent, mha, *_ = caches(config)
    yardstick = 2 * DEEPSEEK_67B.cache_elements_per_token
    against_67b = {bits: saving(cache_bytes(latent.elements, bits), yardstick) for bits in BITS}
    against_mha = dict.fromkeys(BITS, saving(latent.elements, mha.elements))
    return (
        Saving("DeepSeek 67B in 16 bit", against_67b, f"1 - bytes / {yardstick:,}; figure 1, section 3.2.3"),
        Saving("its own MHA, same bits", against_mha, f"1 - {latent.elements:,} / {mha.elements:,}; table 1"),
    )


def _int8(config: ModelConfig) -> Memory:
    """Count what a folder written by ``dsv2 convert --dtype int8`` holds, tensor by tensor."""
    total = 0
    for name, shape in expected_shapes(config, quantised=True):
        total += prod(shape) * (4 if name.endswith(SCALE) else 1 if is_quantised(name) else 2)
    return Memory("int8 of dsv2", total, "8 bit, but embedding, router and kv_b_proj 16 bit")


def _contexts(config: ModelConfig, published: Published | None) -> tuple[Context, ...]:
    """List the lengths that mean something, and round ones up to the longest."""
    limit, elements = config.max_position_embeddings, caches(config)[0].elements
    meanings: dict[int, list[str]] = {tokens: [] for tokens in (4096, 32768, 131072) if tokens <= limit}
    if config.rope_scaling is not None:
        meanings.setdefault(config.rope_scaling.original_max_position_embeddings, []).append("pre-training, before YaRN")
    if published is not None:
        meanings.setdefault(published.context, []).append("documented by the release")
    meanings.setdefault(limit, []).append("limit of the config")
    return tuple(Context(tokens, ", ".join(meaning), _by_bits(elements * tokens)) for tokens, meaning in sorted(meanings.items()))


def to_json(value: Any) -> Any:
    """Return a record as JSON's own kinds: fields and properties of dataclasses, a config as config.json holds it."""
    if isinstance(value, ModelConfig):
        return value.to_dict()
    if is_dataclass(value):
        derived = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: to_json(getattr(value, name)) for name in (*(field.name for field in fields(value)), *derived)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value
