"""A small corpus to train on, and two threads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv2.data.documents import Document
from dsv2.data.prepare import prepare
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.corpus import Corpus
from dsv2.train.precision import make_deterministic


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """tokenizer/, train/ and validation/."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["river", "stone", "model", "expert", "token", "latent", "gate", "rope"]
    texts = [" ".join(rng.choice(words, size=60)) + "." for _ in range(30)]
    tokenizer = train_tokenizer(texts, vocab_size=384)
    tokenizer.save(folder / "tokenizer")
    for split, part in (("train", texts[:24]), ("validation", texts[24:])):
        prepare([Document(text, ("a", "b")[n % 2], "test", str(n)) for n, text in enumerate(part)], tokenizer, folder / split)
    return folder


@pytest.fixture(scope="session")
def corpus(data_folder: Path) -> Corpus:
    return Corpus.open(data_folder)


def with_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    make_deterministic(number)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    yield from with_threads(2)


@pytest.fixture
def one_thread():
    """For runs that are compared with each other many times: threads that wait for each other are slow on a busy machine."""
    yield from with_threads(1)
