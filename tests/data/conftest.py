import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsv2.data.shards import ShardWriter, TokenShards


class ByteTokenizer:
    """Ids are bytes; BOS 256, EOS 257."""

    vocab_size = 384
    eos_id = 257
    fingerprint = "f" * 64

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool = True) -> list[list[int]]:
        return [[256] * add_bos + list(text.encode()) for text in texts]


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., TokenShards]:
    """Write {domain: [ids of a document, ...]} as shards and open them."""

    def write(folder: Path, documents: Mapping[str, Sequence[Sequence[int]]], *, vocab_size: int = 384, **options: Any) -> TokenShards:
        with ShardWriter(folder, "f" * 64, vocab_size, eos_id=1, **options) as writer:
            for domain, texts in documents.items():
                for ids in texts:
                    writer.add(domain, ids, num_bytes=len(ids))
        return TokenShards.open(folder)

    return write


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """Write objects as .jsonl or .jsonl.gz, going by the name."""

    def write(path: Path, rows: Sequence[object]) -> Path:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    return write
