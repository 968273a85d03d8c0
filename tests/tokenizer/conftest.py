"""A small tokenizer trained here, and the published ones where DSV2_DATA names the large data folder."""

import os
from pathlib import Path

import pytest
from tokenizer_samples import CORPUS, Published

from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, vocab_size=1024)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    if "DSV2_DATA" not in os.environ:
        pytest.skip("DSV2_DATA is not set")
    return Published.lay_out(Path(os.environ["DSV2_DATA"]) / "tokenizers", tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def published_v25(published: Published) -> Tokenizer:
    return Tokenizer.load(published.v25)
