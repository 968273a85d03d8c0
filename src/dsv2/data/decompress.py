"""The bytes of a file, whatever it is compressed with, as a stream in constant memory; a file that is cut off is noticed.

Damage is raised as EOFError (cut off), or as the library's own error.
"""

import gzip
import importlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from dsv2.errors import MissingExtra

CHUNK_BYTES = 1 << 16


def read_plain(raw: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a file as they are."""
    while chunk := raw.read(CHUNK_BYTES):
        yield chunk


def read_gzip(raw: BinaryIO) -> Iterator[bytes]:
    """Yield what a gzip file holds, checked by its CRC at the end."""
    with gzip.GzipFile(fileobj=raw) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
    if raw.tell() == 0:  # GzipFile takes a file of no bytes for a well-formed empty one
        raise EOFError("there is no byte in it")


def read_zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Yield what the frames of a zstd file hold.

    Raises:
        MissingExtra: zstandard is not installed.
        EOFError: the file is cut off, or damaged.
    """
    zstandard = import_extra("zstandard", "reading .zst files")
    # By hand: the library's own stream reader takes a truncated frame for the end of the file. A file may hold several frames.
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while data := raw.read(CHUNK_BYTES):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if not frame.eof:
        raise EOFError("the last zstd frame is incomplete")


DECOMPRESS = {"": read_plain, ".gz": read_gzip, ".zst": read_zstd}


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream of bytes without their line feeds."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    if rest := b"".join(parts):
        yield rest


def import_extra(module: str, purpose: str) -> Any:
    """Import a module of the extra ``data``.

    Raises:
        MissingExtra: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(module.split(".")[0], "data", purpose) from None
