"""GGUF export: a model as one file that llama.cpp and the tools built on it run with MLA, under their name for it, ``deepseek2``.

Memory holds one published tensor at a time. Layout: the head that the package ``gguf`` writes (keys, then name, shape, type and place of
every tensor), then the tensors' bytes, each from a multiple of 32 on.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import torch
from torch import Tensor

from dsv2.checkpoint.gguf_metadata import ARCHITECTURE, Kind, model_metadata, notices, require_exportable, tokenizer_metadata
from dsv2.checkpoint.names import Shape, published_shapes
from dsv2.checkpoint.source import Converted, Source, is_int8
from dsv2.errors import CheckpointError, ConfigError, DataError, MissingExtra
from dsv2.files import atomic_file
from dsv2.machine import require_disk
from dsv2.model.config import ModelConfig
from dsv2.progress import console, transfer_bar
from dsv2.tokenizer.tokenizer import Tokenizer

_ALIGNMENT = 32  # of every tensor's place in the file, bytes
_PIECE_VALUES = 1 << 22  # converted at once
_LARGEST_F16 = 65504.0  # also of the scales of the quantised types

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file.

    Args:
        name: as llama.cpp looks for it.
        shape: outermost axis first, as numpy has it; the file lists the axes the other way round.
        dtype: ggml's type: "F32", "F16", "BF16", "Q8_0" or "Q4_0".
        parts: published tensors whose values, one after the other, are its values.
        cut: what is taken of each part; None: all of it.
    """

    name: str
    shape: Shape
    dtype: str
    parts: tuple[str, ...]
    cut: Callable[[Tensor], Tensor] | None = None


def export_gguf(source: Source, file: Path, *, kind: Kind, tokenizer: Tokenizer | None, name: str) -> None:
    """Write a model as one GGUF file, whole or not at all; what its readers should know goes to stderr.

    Args:
        source: the weights; int8 rows are expanded first.
        file: to write; an existing one is replaced.
        kind: of the matrices. Norms and routers are f32 in any kind; rows that 32 does not divide are bf16 in the quantised ones; the head
            is q8_0 in q4_0.
        tokenizer: the model's; None writes a vocabulary of single bytes, for measuring: every tool loads such a file.
        name: of the model, shown by llama.cpp.

    Raises:
        CheckpointError: a weight is not finite or too large for f16, q8_0 or q4_0; f32 and bf16 hold whatever there is.
        ConfigError: llama.cpp's deepseek2 computes another function than this config, or the vocabulary does not fit it.
        DataError: the disk is full, too small for the file, or may not be written.
        MissingExtra: the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf", "GGUF export") from None
    if kind not in get_args(Kind):
        raise ConfigError(f"GGUF type {kind!r} is not written; allowed: {', '.join(get_args(Kind))}")
    config = source.config
    require_exportable(config)
    metadata = model_metadata(config, kind, name) | tokenizer_metadata(config, tokenizer)
    tensors = {tensor: _size(gguf, tensor) for tensor in stored_tensors(config, kind)}
    for line in notices(config, with_text=tokenizer is not None):
        console().print(line, markup=False, soft_wrap=True)
    if is_int8(source):
        source = Converted(source, torch.float32)
    if file.is_dir():
        raise DataError(f"{file} is a folder, and a file is to be written there", hint="choose another path with --out")
    require_disk(sum(tensors.values()), file)
    with atomic_file(file) as temporary:
        _write_head(gguf, temporary, metadata, tensors)
        _write_values(gguf, temporary, source, tensors)


# Tensors ----------------------------------------------------------------------------------------------------------------------------


def stored_tensors(config: ModelConfig, kind: Kind) -> Iterator[Stored]:
    """Yield the tensors of the file in their order: kv_b_proj in two, the experts of a layer in one."""
    for name, shape in published_shapes(config):
        match = _LAYER.fullmatch(name)
        if match is None:
            yield _stored(config, kind, _OUTSIDE[name], shape, (name,))
            continue
        block, part = f"blk.{match[1]}", match[2]
        expert = _EXPERT.fullmatch(part)
        if part == "self_attn.kv_b_proj":
            yield from _key_and_value(config, kind, block, name)
        elif expert is None:
            yield _stored(config, kind, f"{block}.{_INSIDE[part]}.weight", shape, (name,))
        elif expert[1] == "0":
            count = config.n_routed_experts or 0
            parts = tuple(f"model.layers.{match[1]}.mlp.experts.{index}.{expert[2]}_proj.weight" for index in range(count))
            yield _stored(config, kind, f"{block}.ffn_{expert[2]}_exps.weight", (count, *shape), parts)


def _key_and_value(config: ModelConfig, kind: Kind, block: str, name: str) -> Iterator[Stored]:
    """W^UK transposed, which maps a query to the latent, and W^UV, which maps what attention read to the values (appendix C)."""
    heads, latent, nope, value = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim

    def per_head(weight: Tensor) -> Tensor:
        return weight.view(heads, nope + value, latent)

    key_shape, value_shape = (heads, latent, nope), (heads, value, latent)
    yield _stored(config, kind, f"{block}.attn_k_b.weight", key_shape, (name,), lambda weight: per_head(weight)[:, :nope].transpose(1, 2))
    yield _stored(config, kind, f"{block}.attn_v_b.weight", value_shape, (name,), lambda weight: per_head(weight)[:, nope:])


def _stored(
    config: ModelConfig, kind: Kind, name: str, shape: Shape, parts: tuple[str, ...], cut: Callable[[Tensor], Tensor] | None = None
) -> Stored:
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    dtype = kind.upper()
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        dtype = "F32"
    elif dtype.startswith("Q") and shape[-1] % 32:
        dtype = "BF16"
    elif kind == "q4_0" and name == head:
        dtype = "Q8_0"  # llama.cpp's own Q4_0 files have Q6_K here, which gguf does not write
    return Stored(name, shape, dtype, parts, cut)


def _values(gguf: Any, source: Source, tensor: Stored) -> Iterator[Any]:
    """Yield a tensor's bytes as numpy arrays, some rows at a time."""
    for part in tensor.parts:
        values = source.read(part)
        rows = (values if tensor.cut is None else tensor.cut(values)).reshape(-1, tensor.shape[-1])
        for piece in rows.split(max(1, _PIECE_VALUES // tensor.shape[-1])):
            if tensor.dtype in ("F16", "Q8_0", "Q4_0") and not piece.abs().amax() <= _LARGEST_F16:  # a NaN, too, is not
                raise CheckpointError(
                    f"tensor {part!r} holds values that are not finite or beyond {_LARGEST_F16:,.0f}, which {tensor.dtype} cannot hold",
                    hint="choose bf16 or f32",
                )
            yield _encoded(gguf, piece, tensor.dtype)


def _encoded(gguf: Any, rows: Tensor, dtype: str) -> Any:
    if dtype == "F32":
        return rows.float().contiguous().numpy()
    if dtype in ("F16", "BF16"):
        half = rows.to(torch.float16 if dtype == "F16" else torch.bfloat16)
        return half.contiguous().view(torch.int16).numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # a block of subnormal values: its scale is stored as 0, whatever stands beside it
        return gguf.quants.quantize(rows.float().contiguous().numpy(), gguf.GGMLQuantizationType[dtype])


# The file ---------------------------------------------------------------------------------------------------------------------------


def _size(gguf: Any, tensor: Stored) -> int:
    """Return the bytes of a tensor in the file, without padding."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.dtype]]
    return int(math.prod(tensor.shape) // per_block * block_bytes)


def _write_head(gguf: Any, file: Path, metadata: Mapping[str, Any], tensors: Mapping[Stored, int]) -> None:
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    try:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        for key, value in metadata.items():
            add[type(value)](key, value)
        for tensor, size in tensors.items():
            dtype = gguf.GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_values(gguf: Any, file: Path, source: Source, tensors: Mapping[Stored, int]) -> None:
    total = sum(tensors.values())
    with file.open("ab") as out, transfer_bar(total, "writing GGUF") as advance:
        for tensor, size in tensors.items():
            _pad(out)
            begin = out.tell()
            for values in _values(gguf, source, tensor):
                out.write(values.data)
                advance(values.nbytes)
            assert out.tell() - begin == size, (tensor, size)
        _pad(out)


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % _ALIGNMENT))
