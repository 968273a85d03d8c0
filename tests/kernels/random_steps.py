"""Random models, their packed forms, and random steps of random texts: what the tests of the whole native step are made of."""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2.checkpoint.shard import TensorEntry, read_header
from dsv2.checkpoint.source import ModelSource
from dsv2.engine.layout import FILE, Scheme, slots
from dsv2.engine.native import Answered, NativeStack, Piece, StackWeights, weights_of
from dsv2.engine.quantize import pack_folder
from dsv2.engine.weights import _described
from dsv2.kernels.cpu.library import CacheFormat
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.presets import preset

BLOCK_LEN = 64
YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}


def random_config(chance: random.Random, kind: CacheFormat) -> ModelConfig:
    """A model of odd sizes, small enough for a thousand of them; ``kind`` may ask for latents in whole groups."""
    groups = chance.choice([1, 2, 4])
    shape: dict[str, Any] = {
        "vocab_size": chance.randint(20, 400), "hidden_size": chance.choice([24, 40, 48, 70, 96]),
        "intermediate_size": chance.randint(8, 90),
        "num_hidden_layers": chance.randint(1, 3), "num_attention_heads": chance.randint(1, 5),
        "q_lora_rank": chance.choice([None, 20, 33]),
        "kv_lora_rank": chance.choice([32, 64] if kind == CacheFormat.SIX else [24, 33, 64, 80]),
        "qk_nope_head_dim": chance.choice([4, 12, 16, 21, 32]), "qk_rope_head_dim": chance.choice([2, 8, 10, 16, 32]),
        "v_head_dim": chance.choice([3, 10, 16, 64, 70]), "n_routed_experts": chance.choice([8, 12, 16]) if groups < 4 else 16,
        "n_shared_experts": chance.choice([None, 1, 2]), "num_experts_per_tok": chance.randint(1, 4),
        "moe_intermediate_size": chance.choice([5, 16, 40]), "first_k_dense_replace": chance.randint(0, 2),
        "moe_layer_freq": chance.choice([1, 1, 2]), "routed_scaling_factor": chance.choice([1.0, 2.5]),
        "rope_scaling": chance.choice([None, YARN]), "max_position_embeddings": 1024, "tie_word_embeddings": chance.random() < 0.3,
        "norm_topk_prob": chance.random() < 0.5,
    }  # fmt: skip
    if groups > 1:
        shape |= {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": max(1, groups // 2)}
    return preset("nano", **shape)


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """A model whose every part matters: activations of about 1, gains other than 1."""
    generator, model = torch.Generator().manual_seed(seed), Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


class Separate:
    """A packed file's tensors, each in memory of its own that ends where it ends."""

    def __init__(self, file: Path) -> None:
        self.tensors = {
            entry.name: torch.from_numpy(np.fromfile(file, np.uint8, entry.end - entry.begin, offset=entry.begin)).clone()
            for entry in read_header(file).values()
        }

    def address(self, entry: TensorEntry) -> int:
        return self.tensors[entry.name].data_ptr()


def packed(model: Transformer, scheme: Scheme) -> StackWeights:
    """A model as ``dsv2 quantize`` packs it."""
    with tempfile.TemporaryDirectory() as name:
        pack_folder(ModelSource(model), Path(name), scheme)
        file = Path(name) / FILE
        return _described(model.config, list(slots(model.config, scheme)), read_header(file), Separate(file))  # type: ignore[arg-type]


def described(chance: random.Random, model: Transformer, scheme: Scheme) -> StackWeights:
    """A model in the form of a scheme: fp32 and bf16, which must be its dtype, sometimes packed and sometimes where they lie."""
    in_place = scheme in ("fp32", "bf16") and chance.random() < 0.7
    return weights_of(model) if in_place else packed(model, scheme)


@dataclass(slots=True, eq=False)
class Text:
    """A text on its way through a stack.

    Args:
        tokens: its ids.
        blocks: of the cache, where its latents lie.
        expanded: tokens from the first on that are read in the expanded way; the others in the absorbed one.
        done: tokens that have been run.
    """

    tokens: list[int]
    blocks: list[int]
    expanded: int
    done: int = 0

    def next_piece(self, length: int) -> Piece:
        """The next tokens, fewer where the reading changes or the text ends; all logits are wanted."""
        start = self.done
        border = self.expanded if start < self.expanded else len(self.tokens)
        self.done = min(start + length, border)
        blocks = self.blocks[: -(-self.done // BLOCK_LEN)]
        return Piece(self.tokens[start : self.done], start, blocks, start < self.expanded, range(self.done - start))


def random_texts(chance: random.Random, vocab: int, longest: int) -> list[Text]:
    """One to four texts of 1 to ``longest`` tokens, whose blocks lie in any order; they fill a cache."""
    lengths = [chance.randint(1, longest) for _ in range(chance.randint(1, 4))]
    needed = [-(-length // BLOCK_LEN) for length in lengths]
    order = chance.sample(range(sum(needed)), sum(needed))
    ids = np.random.default_rng(chance.randrange(2**32))
    return [
        Text(ids.integers(0, vocab, length).tolist(), [order.pop() for _ in range(count)], chance.randint(0, length))
        for length, count in zip(lengths, needed, strict=True)
    ]


def random_pieces(chance: random.Random, texts: list[Text]) -> list[tuple[Text, Piece]]:
    """Some tokens of some unfinished texts, each in one or two pieces of 1 to 90. Logits are wanted of a few rows."""
    unfinished = [text for text in texts if text.done < len(text.tokens)]
    pieces = []
    for text in chance.sample(unfinished, chance.randint(1, len(unfinished))):
        for _ in range(chance.randint(1, 2)):
            if text.done < len(text.tokens):
                piece = text.next_piece(chance.choice([1, 1, 2, 5, 17, 64, 90]))
                count = len(piece.tokens)
                pieces.append((text, piece._replace(wanted=sorted(chance.sample(range(count), chance.randint(0, min(3, count)))))))
    return pieces


def poisoned_step(stack: NativeStack, pieces: list[Piece], *, want_experts: bool) -> Answered:
    """A step whose outputs are full of NaN before."""
    rows, vocab = sum(len(piece.wanted) for piece in pieces), stack.weights.config.vocab_size
    stack._logits = np.full((rows, vocab), np.nan, np.float32)
    stack._best, stack._best_logit = np.full(rows, -1, np.int32), np.full(rows, np.nan, np.float32)
    return stack.step(pieces, want_experts=want_experts)
