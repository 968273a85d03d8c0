"""Models in and out of the Hugging Face layout, tensor by tensor: peak memory is the model and one tensor, whatever its size.

In: the model is laid out on the meta device, gets empty memory in its final dtype, and each published tensor is copied to its place out of
the mapped file. Out: shards of bounded size with an index, each written one tensor at a time, into a folder that appears whole.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from dsv2.checkpoint.folder import INDEX, INT8, SINGLE, expected_shapes, open_folder
from dsv2.checkpoint.manifest import MANIFEST, verify_manifest
from dsv2.checkpoint.names import SCORE
from dsv2.checkpoint.shard import ShardWriter, TensorSpec
from dsv2.checkpoint.source import DTYPES, Converted, FolderSource, Source, is_int8, locate, raw_bytes
from dsv2.errors import CheckpointError
from dsv2.files import atomic_write_json
from dsv2.machine import available_memory, require_memory
from dsv2.model.int8 import hold_int8
from dsv2.model.transformer import Transformer
from dsv2.progress import transfer_bar

MAX_SHARD_BYTES = 5_000_000_000
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # torch_dtype of config.json
_HEADROOM_BYTES = 500_000_000  # one tensor being converted, and the process itself


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """Load a model folder, weights streamed tensor by tensor.

    Args:
        folder: config.json and safetensors files; where a manifest lists hashes they are compared first.
        dtype: of the weights in memory; torch.int8: matrices as int8 rows, for inference. None: fp32, or int8 where the folder is.

    Raises:
        CheckpointError: a file or tensor is missing, unexpected or damaged, or the model does not fit in memory.
    """
    folder = Path(folder)
    opened = open_folder(folder)
    if (folder / MANIFEST).exists():
        verify_manifest(folder, ["config.json", *(file.name for file in opened.files)])
    source: Source = FolderSource(opened)
    if dtype is not None or not is_int8(source):
        source = Converted(source, dtype or torch.float32)
    return build_model(source)


def fitting_dtype(folder: str | Path) -> torch.dtype | None:
    """Return the dtype to run a model in: its own (fp16: fp32), or the first narrower one that leaves a tenth of the memory free.

    None where it is int8 on disk.

    Raises:
        CheckpointError: the folder is not a whole model.
    """
    source = FolderSource(open_folder(folder))
    if is_int8(source):
        return None
    available = available_memory()
    own = DTYPES[source.specs["model.embed_tokens.weight"].dtype]
    for dtype in (torch.bfloat16,) if own == torch.bfloat16 else (torch.float32, torch.bfloat16):
        if available is None or (_size(Converted(source, dtype)) + _HEADROOM_BYTES) * 1.1 <= available:
            return dtype
    return torch.int8


def _size(source: Source) -> int:
    return sum(spec.num_bytes for spec in source.specs.values())


def build_model(source: Source) -> Transformer:
    """Make a model in memory out of a source, in the source's dtype.

    Raises:
        CheckpointError: it does not fit in memory, or a tensor cannot be read.
    """
    total = _size(source)
    hint = None if is_int8(source) else "choose a smaller dtype; int8 takes about one byte per parameter"
    require_memory(total + _HEADROOM_BYTES, f"a model of {total / 1e9:.1f} GB", hint=hint)
    with torch.device("meta"):
        model = Transformer(source.config).to(DTYPES[source.specs["model.embed_tokens.weight"].dtype])
        if is_int8(source):
            hold_int8(model)
    model.to_empty(device="cpu")
    if source.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty made two of them
    fill_model(model, source)
    return model.eval()


def fill_model(model: Transformer, source: Source) -> None:
    """Copy all weights of a source into a model, which keeps its dtype.

    Raises:
        CheckpointError: the source's tensors are not the model's, or one cannot be read.
    """
    expected = {name for name, _ in expected_shapes(model.config, is_int8(source), model.head)}
    for name in expected ^ source.specs.keys():
        raise CheckpointError(f"tensor {name!r} is missing from the {'weights' if name in expected else 'model that they are for'}")
    state, total = model.state_dict(), _size(source)
    with torch.no_grad(), transfer_bar(total, "reading weights") as advance:
        for name, spec in source.specs.items():
            target = locate(state, name)
            if tuple(target.shape) != spec.shape:
                raise CheckpointError(f"tensor {name!r} has shape {list(spec.shape)}; this model's has {list(target.shape)}")
            target.copy_(source.read(name))
            advance(spec.num_bytes)


def write_model(folder: Path, source: Source, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and the weights of a source into a folder that exists, shards with an index where one file would be too large."""
    dtype = source.specs["model.embed_tokens.weight"].dtype
    config = source.config.to_dict(torch_dtype=_NAMES[dtype], head="score" if SCORE in source.specs else "lm_head")
    atomic_write_json(folder / "config.json", config | ({"quantization_config": INT8} if is_int8(source) else {}))
    shards = plan_shards(source.specs, max_shard_bytes)
    total = _size(source)
    with transfer_bar(total, "writing weights") as advance:
        for file, specs in shards.items():
            with ShardWriter(folder / file, specs) as writer:
                for name, spec in specs.items():
                    writer.write(name, raw_bytes(source.read(name)))
                    advance(spec.num_bytes)
    if len(shards) > 1:
        placed = {name: file for file, specs in shards.items() for name in specs}
        atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> dict[str, dict[str, TensorSpec]]:
    """Cut a model's tensors, in their order, into files of at most ``max_shard_bytes``; a larger tensor gets a file of its own."""
    cuts: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if cuts[-1] and size + spec.num_bytes > max_shard_bytes:
            cuts.append({})
            size = 0
        cuts[-1][name] = spec
        size += spec.num_bytes
    if len(cuts) == 1:
        return {SINGLE: cuts[0]}
    return {f"model-{number:05}-of-{len(cuts):05}.safetensors": cut for number, cut in enumerate(cuts, 1)}
