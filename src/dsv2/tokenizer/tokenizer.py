"""Encode and decode with a DeepSeek-V2 tokenizer, ours or a published one.

Text that a user wrote never becomes a marker here: ``encode`` hands it to the merges alone, also where it spells ``<|EOT|>`` or a FIM
marker, unless ``parse_special`` is set. The saved folder is an ordinary Hugging Face tokenizer, whose readers do parse markers.
"""

import codecs
import copy
import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from dsv2.errors import ConfigError, DataError
from dsv2.files import atomic_write, atomic_write_json
from dsv2.tokenizer.chat import Template, chat_template
from dsv2.tokenizer.pretokenize import byte_characters, require_unicode
from dsv2.tokenizer.recognise import recognise, template_text
from dsv2.tokenizer.specials import BOS, EOS

# Rows of the embedding: a multiple of this, so that every matrix splits evenly over devices and tiles.
VOCAB_MULTIPLE = 128
# Bounds what the library holds at once in a batch: its encodings take some 100 bytes a token until their ids are read.
_BATCH_CHARACTERS = 8_000_000


class Tokenizer:
    """A byte-level BPE tokenizer of the DeepSeek-V2 family.

    Args:
        tokenizer_json: content of a tokenizer.json.
        vocab_size: rows of the model's embedding and head, at least ``num_tokens``; the ids between have no token. None rounds
            ``num_tokens`` up to a multiple of 128.
        template: chat template that the model was trained with; None when it is none of ours.

    Raises:
        ConfigError: ``vocab_size`` is smaller than the tokenizer.
        DataError: the content is not a tokenizer of this family.
    """

    def __init__(self, tokenizer_json: bytes, *, vocab_size: int | None = None, template: Template | None = "v2.5") -> None:
        self._source = tokenizer_json
        document = _parse_family(tokenizer_json)
        self.special_ids: dict[str, int] = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
        self._token_bytes = _bytes_of_tokens(document["model"]["vocab"], self.special_ids)
        self._marker_ids = frozenset(self.special_ids.values())
        self._marker_pattern = re.compile("(" + "|".join(re.escape(m) for m in sorted(self.special_ids, key=len, reverse=True)) + ")")
        # Without its added tokens the library can only reach the merges, whatever the text says.
        plain = document | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._merges = LibraryTokenizer.from_str(json.dumps(plain))
        self.num_tokens = len(self._token_bytes)
        self.vocab_size = -(-self.num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if vocab_size is None else vocab_size
        if self.vocab_size < self.num_tokens:
            raise ConfigError(f"vocab_size = {vocab_size} is smaller than the tokenizer, which has {self.num_tokens} tokens")
        self.template = template
        self.published_template: str | None = None  # Jinja text of the folder it was loaded from: handed on, never run
        self.bos_id = self.special_ids[BOS]
        self.eos_id = self.special_ids[EOS]
        self.pad_id = self.eos_id

    @classmethod
    def load(cls, path: str | Path, *, vocab_size: int | None = None) -> "Tokenizer":
        """Load a tokenizer folder, ours or a published one, or a single tokenizer.json.

        The padded vocabulary comes from ``vocab_size``, else from the model's config.json beside it, else from what ``save`` left in
        tokenizer_config.json, else ``num_tokens`` is rounded up. The template is recognised by its text, without one by the markers.

        Raises:
            ConfigError: ``vocab_size`` is smaller than the tokenizer.
            DataError: nothing is there, or it is damaged or of another family.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"no tokenizer at {path}: {file} does not exist", hint="train one: dsv2 tokenizer SOURCE --out DIR")
        settings = _read_object(file.with_name("tokenizer_config.json"))
        model = _read_object(file.with_name("config.json"))
        if vocab_size is None:
            vocab_size = model.get("vocab_size") or settings.get("padded_vocab_size")
        if vocab_size is not None and (not isinstance(vocab_size, int) or isinstance(vocab_size, bool)):
            raise DataError(f"{file.with_name('config.json')}: vocab_size = {reprlib.repr(vocab_size)} must be a whole number")
        try:
            tokenizer = cls(file.read_bytes(), vocab_size=vocab_size)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{file}: {error.message}", hint=error.hint) from error
        except Exception as error:  # anything may stand in a file of somebody else, and the library raises plain Exceptions
            reason = reprlib.repr(str(error))
            raise DataError(f"{file} is not a tokenizer of the DeepSeek-V2 family: {type(error).__name__} {reason}") from error
        tokenizer.published_template = template_text(file.parent, settings)[0]
        tokenizer.template = recognise(tokenizer.published_template, tokenizer.special_ids)
        return tokenizer

    def with_template(self, template: Template | None) -> "Tokenizer":
        """Return this tokenizer for a model that is trained with another chat template, which ``save`` then writes; None: as it is."""
        if template is None or template == self.template:
            return self
        changed = copy.copy(self)
        changed.template, changed.published_template = template, None
        return changed

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads with identical ids.

        Raises:
            DataError: the disk is full or may not be written.
        """
        folder = Path(folder)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": None,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padded_vocab_size": self.vocab_size,
        }
        if self.template is not None:
            settings["chat_template"] = chat_template(self.template)
        atomic_write(folder / "tokenizer.json", self._saved_json)
        atomic_write_json(folder / "tokenizer_config.json", settings)

    @cached_property
    def _saved_json(self) -> bytes:
        # Published files leave BOS to tokenizer_config.json, which not every reader honours: ours carry it in a post-processor.
        document = json.loads(self._source)
        wanted = {"truncation": None, "padding": None, "post_processor": _bos_processor(self.bos_id)}
        if all(document.get(key) == value for key, value in wanted.items()):
            return self._source
        return (json.dumps(document | wanted, ensure_ascii=False, indent=2) + "\n").encode()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json as ``save`` writes it, 64 hex digits; the same after any number of saves and loads."""
        return hashlib.sha256(self._saved_json).hexdigest()

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any Unicode string.
            add_bos: put BOS in front; not a second one where a parsed text begins with it.
            parse_special: turn the markers in ``text`` into their ids. Only for text that the program itself wrote.

        Raises:
            DataError: ``text`` holds a lone surrogate; the message gives its offset.
        """
        require_unicode(text, "the text")
        pieces = self._marker_pattern.split(text) if parse_special else [text]
        ids = [self.bos_id] if add_bos and not (parse_special and text.startswith(BOS)) else []
        for index, piece in enumerate(pieces):
            if index % 2:  # re.split puts what the group matched at odd places
                ids.append(self.special_ids[piece])
            else:
                ids.extend(self._merges.encode(piece, add_special_tokens=False).ids)
        return ids

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool = True) -> list[list[int]]:
        """Return the ids of many texts, encoded in parallel threads inside the library; markers are never parsed.

        Raises:
            DataError: a text holds a lone surrogate; the message gives the index of the text and the offset.
        """
        prefix = [self.bos_id] if add_bos else []
        ids: list[list[int]] = []
        for start, stop in _spans(texts):
            for index in range(start, stop):
                require_unicode(texts[index], f"text {index} of the batch")
            encodings = self._merges.encode_batch_fast(list(texts[start:stop]), add_special_tokens=False)
            ids.extend(prefix + encoding.ids for encoding in encodings)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for (a marker: its name in UTF-8); they need not be whole characters.

        Raises:
            DataError: no token has this id, which includes the padding between ``num_tokens`` and ``vocab_size``.
        """
        if not 0 <= token_id < self.num_tokens:
            raise DataError(f"no token has id {token_id}: this tokenizer's ids are 0 to {self.num_tokens - 1}")
        return self._token_bytes[token_id]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD as in ``bytes.decode(errors="replace")``.

        Args:
            ids: token ids.
            skip_special: leave every marker out, also those that the files do not flag as special.

        Raises:
            DataError: an id has no token.
        """
        return b"".join(self._visible_bytes(token_id, skip_special) for token_id in ids).decode(errors="replace")

    def stream(self, *, skip_special: bool = True) -> "StreamDecoder":
        """Return a decoder that is fed one id at a time."""
        return StreamDecoder(self, skip_special=skip_special)

    def _visible_bytes(self, token_id: int, skip_special: bool) -> bytes:
        return b"" if skip_special and token_id in self._marker_ids else self.token_bytes(token_id)


class StreamDecoder:
    """Decode ids as they arrive, holding back the bytes of a character until it is whole.

    The pieces, ``finish`` included, join to ``Tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the characters that it completes, often none.

        Raises:
            DataError: the id has no token.
        """
        return self._decoder.decode(self._tokenizer._visible_bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """Return what was held back (U+FFFD for a cut character) and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _bos_processor(bos_id: int) -> dict[str, Any]:
    """Return the library's description of "put BOS in front of a text, and of the second of a pair"."""

    def bos(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": BOS, "type_id": type_id}}

    first = [bos(0), {"Sequence": {"id": "A", "type_id": 0}}]
    second = [bos(1), {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": tokens}


def _parse_family(tokenizer_json: bytes) -> dict[str, Any]:
    """Parse a tokenizer.json and refuse what is not byte-level BPE with DeepSeek's BOS and EOS."""
    try:
        document = json.loads(tokenizer_json)
        kinds = (document["model"]["type"], document["decoder"]["type"])
        markers = {entry["content"] for entry in document["added_tokens"]}
        normalizer = document["normalizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"not a readable tokenizer.json ({type(error).__name__}: {error})") from error
    if kinds != ("BPE", "ByteLevel"):
        raise DataError(f"model {kinds[0]} with decoder {kinds[1]}: expected byte-level BPE (BPE with ByteLevel)")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise DataError(f"normalizer {normalizer.get('type')}: expected none, since text must round-trip")
    if not {BOS, EOS} <= markers:
        raise DataError(f"the added tokens lack {BOS} or {EOS}", hint="this tokenizer is not of the DeepSeek-V2 family")
    return dict(document)


def _bytes_of_tokens(vocab: dict[str, int], special_ids: dict[str, int]) -> list[bytes]:
    """Return the bytes of every id in order."""
    byte_of = {character: byte for byte, character in byte_characters().items()}
    try:
        table = {token_id: bytes(byte_of[c] for c in token) for token, token_id in vocab.items()}
    except KeyError as error:
        raise DataError(f"the vocabulary holds {error}, which stands for no byte: not byte-level BPE") from error
    table |= {token_id: marker.encode() for marker, token_id in special_ids.items()}
    if sorted(table) != list(range(len(vocab) + len(special_ids))):
        raise DataError(f"the ids of {len(vocab)} tokens and {len(special_ids)} markers are not 0 to {len(vocab) + len(special_ids) - 1}")
    return [table[token_id] for token_id in range(len(table))]


def _read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object from disk, empty when the file is absent."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds a {type(value).__name__}, expected an object")
    return value


def _spans(texts: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Cut a batch into runs of texts of about ``_BATCH_CHARACTERS``."""
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield start, index + 1
            start, size = index + 1, 0
    if start < len(texts):
        yield start, len(texts)
