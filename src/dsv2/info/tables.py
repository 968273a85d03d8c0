"""A description on stdout: tables to read, one JSON object, or a line for every tensor."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dsv2.checkpoint.names import published_shapes
from dsv2.info.description import BITS, Description, describe, to_json
from dsv2.info.target import Target, Tensor, find_target
from dsv2.presets import PUBLISHED
from dsv2.progress import table


def run(target: str, tensors: bool = False, as_json: bool = False) -> None:
    """Print what there is to say of a preset, a config.json, a model folder, a run or a tour.

    Args:
        target: which one.
        tensors: list the tensors, one a line; in JSON beside all else.
        as_json: print one JSON object.

    Raises:
        ConfigError: ``target`` is none of these.
        CheckpointError: its weights are damaged or do not fit its config.
    """
    found = find_target(target)
    if as_json:
        listed = {"tensors": to_json(_tensors(found))} if tensors else {}
        print(json.dumps(to_json(describe(found)) | listed, indent=None if tensors else 1, ensure_ascii=False))
    elif tensors:
        print("\n".join(_lines(_tensors(found))))
    else:
        for index, section in enumerate(_sections(describe(found))):
            if index:
                print()
            table(section.title, section.columns, section.rows, right=section.right, stdout=True)


def _tensors(target: Target) -> list[Tensor]:
    """List the tensors in the files, or without files those that a published checkpoint of this config has."""
    found = target.tensors()
    return [Tensor(name, shape) for name, shape in published_shapes(target.config)] if found is None else found


def _lines(tensors: list[Tensor]) -> Iterator[str]:
    width = max(len(tensor.name) for tensor in tensors)
    for tensor in tensors:
        yield "  ".join(filter(None, (tensor.name.ljust(width), tensor.dtype, str(list(tensor.shape)))))


# Tables -----------------------------------------------------------------------------------------------------------------------------


class _Section(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str] = ()


def _sections(d: Description) -> Iterator[_Section]:
    yield _config(d)
    yield _parameters(d)
    yield _parts(d)
    yield _tensor_counts(d)
    yield from _cache(d)
    yield from _sizes(d)
    yield _Section("Capabilities", ("what", "answer", "evidence"), [(c.name, c.answer, c.evidence) for c in d.capabilities])


def _config(d: Description) -> _Section:
    c, yarn = d.config, d.config.rope_scaling
    dense = c.num_hidden_layers - c.num_moe_layers
    rows = [
        ("d", "hidden_size", f"{c.hidden_size:,}"),
        ("l", "num_hidden_layers", f"{c.num_hidden_layers}: {dense} dense, {c.num_moe_layers} with experts"),
        ("n_h", "num_attention_heads", f"{c.num_attention_heads}"),
        ("d_h, d_h^R", "qk_nope_head_dim, qk_rope_head_dim", f"{c.qk_nope_head_dim} + {c.qk_rope_head_dim} of a query or key"),
        ("d_v", "v_head_dim", f"{c.v_head_dim}"),
        ("d_c", "kv_lora_rank", f"{c.kv_lora_rank}"),
        ("d_c'", "q_lora_rank", "none: queries are not compressed" if c.q_lora_rank is None else f"{c.q_lora_rank:,}"),
        ("", "intermediate_size", f"{c.intermediate_size:,}"),
    ]
    if c.n_routed_experts:
        groups = f", from {c.topk_group} of {c.n_group} groups" if c.topk_method == "group_limited_greedy" else ""
        rows += [
            ("N_r, K_r", "n_routed_experts, num_experts_per_tok", f"{c.n_routed_experts}, {c.num_experts_per_tok} for a token{groups}"),
            ("N_s", "n_shared_experts", f"{c.n_shared_experts or 0}"),
            ("m", "moe_intermediate_size", f"{c.moe_intermediate_size:,}"),
            ("", "routed_scaling_factor", f"{c.routed_scaling_factor:g}"),
        ]
    rows += [
        ("V", "vocab_size", f"{c.vocab_size:,}" + (", head and embedding are one" if c.tie_word_embeddings else "")),
        ("", "rope_scaling", "none" if yarn is None else f"YaRN x{yarn.factor:g} from {yarn.original_max_position_embeddings:,} tokens"),
    ]
    if yarn is not None:
        assumed = " assumed; not published here, the checkpoint's config decides" if d.assumed else ""
        rows.append(("", "mscale, mscale_all_dim", f"{yarn.mscale:g}, {yarn.mscale_all_dim:g}{assumed}"))
    return _Section(_title(d), ("symbol", "field", "value"), rows)


def _title(d: Description) -> str:
    """Name the model, and the presets with its config: those whose config.json was seen, then those whose mscale is assumed."""
    lines = [d.source if d.hub_id is None else f"{d.source}: {d.hub_id}"]
    assumed = [name for name in d.same_config if name in PUBLISHED and PUBLISHED[name].unseen]
    seen = [name for name in d.same_config if name not in assumed]
    if seen:
        lines.append(f"the same config: {', '.join(seen)}")
    if assumed:
        lines.append(f"the same, if their mscale is as assumed: {', '.join(assumed)}")
    return "\n".join(lines)


def _parameters(d: Description) -> _Section:
    p = d.parameters
    rows = [
        ("total", f"{p.total:,}", "sum over the parts: number x each"),
        ("activated, all counted", f"{p.activated:,}", "sum over the parts: used x each"),
        ("  without embedding", f"{p.activated_without_embedding:,}", "minus V d: the convention of the paper's 21B and 2.4B"),
        ("  without embedding, head", f"{p.activated_without_embedding_and_head:,}", "minus V d once more"),
        (
            "training FLOP per token",
            f"{d.training_flops_per_token:,.0f}",
            f"6 x activated + 3 l n_h (d_h + d_h^R + d_v) {d.training_len:,}",
        ),
    ]
    if d.config.tie_word_embeddings:
        rows[3] = (*rows[3][:2], "the head is the embedding")
    return _Section("Parameters", ("what", "count", "how"), rows, ("count",))


def _parts(d: Description) -> _Section:
    rows = [(p.name, f"{p.each:,}", f"{p.number:,}", f"{p.used:,}", f"{p.total:,}", p.formula) for p in d.parts]
    columns = ("part", "each", "number", "used", "all", "each is")
    return _Section("Parts: how many there are, how many a token uses", columns, rows, columns[1:5])


def _tensor_counts(d: Description) -> _Section:
    rows = [("published layout", f"{d.num_tensors:,}", "sum over the parts: number x tensors; every expert has three")]
    if d.weights is None:
        rows.append(("in files", "-", "no safetensors here"))
        return _Section("Tensors", ("where", "count", "how"), rows, ("count",))
    w = d.weights
    kinds = ", ".join(f"{kind.num_tensors:,} {kind.name}" for kind in w.dtypes)
    fit = "int8 with their scales; they fit the config" if w.quantised else "names and shapes fit the config"
    rows += [
        ("in files", f"{w.num_tensors:,}", f"{kinds}; {fit}"),
        ("bytes on disk", f"{w.num_bytes:,}", f"{_gib(w.num_bytes)} in {_count(w.num_files, 'file')}"),
    ]
    return _Section("Tensors", ("where", "count", "how"), rows, ("count",))


def _cache(d: Description) -> Iterator[_Section]:
    bits = _bit_columns()
    rows = [
        (cache.kind.name, f"{cache.kind.groups:g}", f"{cache.kind.elements:,}", *_each(cache.num_bytes.values()), cache.kind.formula)
        for cache in d.caches
    ]
    columns = ("attention", "groups", "numbers", *bits, "how")
    yield _Section("Cache per token: numbers, and bytes by the bits of a number (section 2.1.4, table 1)", columns, rows, columns[1:6])
    rows = [(saving.against, *(f"{100 * saving.share[b]:.3f} %" for b in BITS), saving.formula) for saving in d.savings]
    yield _Section("What MLA's cache saves, by the bits of its numbers", ("against", *bits, "how"), rows, bits)


def _sizes(d: Description) -> Iterator[_Section]:
    memory = [(memory.name, f"{memory.num_bytes:,}", _gib(memory.num_bytes), memory.formula) for memory in d.memory]
    yield _Section("Memory of the weights", ("format", "bytes", "size", "how"), memory, ("bytes", "size"))
    bits = _bit_columns()
    lengths = [(f"{context.tokens:,}", *map(_gib, context.cache_bytes.values()), context.meaning) for context in d.contexts]
    yield _Section("Context: cache of one sequence", ("tokens", *bits, "what is known of this length"), lengths, ("tokens", *bits))


def _bit_columns() -> tuple[str, ...]:
    return tuple(f"{bits} bit" for bits in BITS)


def _each(numbers: Iterable[int | float]) -> Iterator[str]:
    return (f"{number:,}" for number in numbers)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _gib(num_bytes: int | float) -> str:
    """Write bytes for reading, in the largest binary unit that leaves 1 or more."""
    unit = 0
    while num_bytes >= 1024 and unit < 4:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:,.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}" if unit else f"{num_bytes:g} B"
