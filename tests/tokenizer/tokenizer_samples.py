"""Texts that tempt a tokenizer, the released files, and how hypothesis runs in this folder."""

import gzip
import inspect
import json
from dataclasses import dataclass
from json import decoder, encoder
from pathlib import Path
from typing import Any, Self

from hypothesis import settings

# The machine may be busy, and a run must repeat.
steady = settings(deadline=None, derandomize=True)

CHINESE = "\u5929\u4e0b\u5927\u52e2\uff0c\u5206\u4e45\u5fc5\u5408\uff0c\u5408\u4e45\u5fc5\u5206\u3002\n\n"
# Tempts the merges: repeated digits, newlines, blanks before Han, and markers as plain text.
TEMPTING = "2024 2024 12345 12345 a1b2a1b2\n\n\n\n\r\n\r\n \u5929\u4e0b \u5929\u4e0b 12 \u5929\u4e0b <|EOT|> <|EOT|> <\uff5cUser\uff5c>\n\n"
CORPUS = [inspect.getsource(decoder), inspect.getsource(encoder), CHINESE * 3, TEMPTING * 20]


@dataclass(frozen=True)
class Published:
    """The released V2 and V2.5 tokenizers as folders, and what came with them."""

    v2: Path
    v25: Path
    configs: dict[str, Any]
    document: dict[str, Any]
    vectors: list[dict[str, Any]]

    @classmethod
    def lay_out(cls, source: Path, target: Path) -> Self:
        """Build folders as they are downloaded: tokenizer.json, tokenizer_config.json and the model's config.json."""
        configs = json.loads((source / "deepseek_configs.json").read_text(encoding="utf-8"))
        document = json.loads(gzip.decompress((source / "deepseek_v2_tokenizer.json.gz").read_bytes()))
        vectors = [json.loads(line) for line in gzip.decompress((source / "test_vectors.jsonl.gz").read_bytes()).splitlines()]
        for name in ("deepseek-v2", "deepseek-v2.5"):
            folder = target / name
            folder.mkdir()
            added = document | {"added_tokens": configs[name]["added_tokens"]}
            (folder / "tokenizer.json").write_text(json.dumps(added))
            (folder / "tokenizer_config.json").write_text(json.dumps(configs[name]["tokenizer_config"]))
            (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", "vocab_size": 102400}))
        return cls(target / "deepseek-v2", target / "deepseek-v2.5", configs, document, vectors)
