"""Learn the merges of a new tokenizer from text."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.pretokenize import base_alphabet, deepseek_pre_tokenizer, require_unicode
from dsv2.tokenizer.specials import FLAGGED_SPECIAL, MARKERS
from dsv2.tokenizer.tokenizer import VOCAB_MULTIPLE, Tokenizer


@dataclass(frozen=True, slots=True)
class Compression:
    """How much text a token carries.

    Args:
        num_texts: texts measured.
        num_bytes: their length in UTF-8.
        num_tokens: their length in tokens, without BOS.
    """

    num_texts: int
    num_bytes: int
    num_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; 0.0 when there are no tokens."""
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with DeepSeek's pre-tokeniser and all V2.5 markers.

    Ids follow 243 base symbols, then the merges in the order they were learnt, then the markers. The same texts give the same file:
    ties go to the lower pair of ids, whatever the number of threads. A corpus too small for all merges (a pair must occur twice) leaves
    the last ids unused, which ``vocab_size`` of the result still counts.

    Args:
        texts: documents; read once.
        vocab_size: the model's padded vocabulary, a multiple of 128; merges take what base symbols and markers leave.

    Raises:
        ConfigError: ``vocab_size`` is no multiple of 128 or too small for base symbols and markers.
        DataError: there is no text, or a lone surrogate in it.
    """
    alphabet = base_alphabet()
    smallest = -(-(len(alphabet) + len(MARKERS)) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab_size % VOCAB_MULTIPLE or vocab_size < smallest:
        raise ConfigError(f"vocab_size = {vocab_size} is not a multiple of {VOCAB_MULTIPLE} from {smallest} up", hint="use 4096")
    library = LibraryTokenizer(BPE())
    library.pre_tokenizer = deepseek_pre_tokenizer()
    library.decoder = ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(MARKERS), min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    library.train_from_iterator(_checked(texts), trainer)
    # The trainer would put markers in front of the base symbols; the released order has them at the end.
    document = json.loads(library.to_str())
    first = len(document["model"]["vocab"])
    document["added_tokens"] = [_added_token(first + rank, marker) for rank, marker in enumerate(MARKERS)]
    return Tokenizer(json.dumps(document, ensure_ascii=False, indent=1).encode(), vocab_size=vocab_size, template="v2.5")


def report(tokenizer: Tokenizer, sample_texts: Iterable[str]) -> Compression:
    """Measure a tokenizer on texts, best on texts that it was not trained on."""
    texts = list(sample_texts)
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts, add_bos=False))
    return Compression(num_texts=len(texts), num_bytes=sum(len(text.encode()) for text in texts), num_tokens=num_tokens)


def _added_token(token_id: int, marker: str) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return {"id": token_id, "content": marker} | flags | {"special": marker in FLAGGED_SPECIAL}


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """Pass texts on; refuse lone surrogates and a corpus without a single character."""
    empty = True
    for index, text in enumerate(texts):
        require_unicode(text, f"document {index}")
        empty = empty and not text
        yield text
    if empty:
        raise DataError("there is no text to train a tokenizer on", hint="name files or folders that hold text")
