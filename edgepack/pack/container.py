"""The container: a signature, a version, then chunks, each with its kind, length and checksum.

::

    89 45 50 4B 0D 0A 1A 0A   as in PNG: reveals text-mode transfers and truncated files at once
    version                   u16, little-endian as all numbers
    chunk ...                 kind u8 | length u32 | CRC-32 of kind, length and content u32 | content
    chunk END                 empty; nothing follows it
"""

import lzma
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from edgepack.errors import ModelError

SIGNATURE = b"\x89EPK\r\n\x1a\n"
VERSION = 1
_CHUNK = struct.Struct("<BII")
_MOST_CHUNK_BYTES = 1 << 28


WINDOW_BYTES = 1 << 24
"""Window of LZMA; the coder allocates this much, which takes most of the time for small chunks."""


class Kind(IntEnum):
    """What a chunk holds, in the order of the file."""

    HEADER = 1
    SPANS = 2
    NOTES = 3
    TABLES = 4
    TEXT = 5
    WORDS = 6
    SYMBOLS = 7
    END = 8


def write_start(file: BinaryIO) -> None:
    """Signature and version."""
    file.write(SIGNATURE + struct.pack("<H", VERSION))


def write_chunk(file: BinaryIO, kind: Kind, content: bytes) -> None:
    """One chunk."""
    file.write(_CHUNK.pack(kind, len(content), _checksum(kind, content)) + content)


def read_chunks(file: BinaryIO, path: Path) -> Iterator[tuple[Kind, bytes]]:
    """The chunks of a container, each checked before it is yielded; END is the last.

    Raises:
        ModelError: the file is no container, has a newer version, is truncated, or damaged.
    """
    start = file.read(len(SIGNATURE) + 2)
    if not start.startswith(SIGNATURE):
        if start and SIGNATURE.startswith(start):
            raise ModelError(f"{path}: is cut short after {len(start)} bytes; copy it again")
        if start.startswith(b"\x89EPK"):
            raise ModelError(f"{path}: line ends were changed in transfer; copy it again as a binary file")
        raise ModelError(f"{path}: is no .epk file; make one with `edgepack pack MODEL -o FILE.epk`")
    if len(start) < len(SIGNATURE) + 2:
        raise ModelError(f"{path}: is cut short after {len(start)} bytes; copy it again")
    (version,) = struct.unpack_from("<H", start, len(SIGNATURE))
    if version != VERSION:
        raise ModelError(
            f"{path}: is of format version {version}, this edgepack reads {VERSION}; "
            + ("update edgepack" if version > VERSION else "the file is damaged, copy it again")
        )
    kind = None
    while kind is not Kind.END:
        kind, content = _read_chunk(file, path)
        yield kind, content
    if file.read(1):
        raise ModelError(f"{path}: has bytes after its end; copy it again")


def _read_chunk(file: BinaryIO, path: Path) -> tuple[Kind, bytes]:
    at = file.tell()
    head = file.read(_CHUNK.size)
    if len(head) < _CHUNK.size:
        raise ModelError(f"{path}: is cut short at byte {at + len(head)}; copy it again")
    number, length, checksum = _CHUNK.unpack(head)
    if length > _MOST_CHUNK_BYTES:
        raise ModelError(f"{path}: is damaged at byte {at}; copy it again")
    content = file.read(length)
    if len(content) < length:
        raise ModelError(f"{path}: is cut short at byte {at + _CHUNK.size + len(content)}; copy it again")
    if _checksum(number, content) != checksum or number not in list(Kind):
        raise ModelError(f"{path}: is damaged between bytes {at} and {file.tell()}; copy it again")
    return Kind(number), content


def _checksum(kind: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<BI", kind, len(content))))


def squeeze(raw: bytes, *, is_text: bool = False) -> bytes:
    """``raw`` coded by LZMA without a header; unstructured bytes, such as planes, unless ``is_text``."""
    return lzma.compress(
        raw, lzma.FORMAT_RAW, filters=_filters(is_text, min(max(len(raw), 1 << 12), WINDOW_BYTES))
    )


def expand(code: bytes, size: int, *, is_text: bool = False) -> bytes:
    """The ``size`` bytes that :func:`squeeze` coded.

    Raises:
        ModelError: other bytes result.
    """
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(is_text, WINDOW_BYTES))
        raw = decoder.decompress(code, max_length=size + 1)
    except lzma.LZMAError as error:
        raise ModelError(
            f"a chunk cannot be decoded ({error}): the file is damaged; copy it again"
        ) from error
    if len(raw) != size:
        raise ModelError("a chunk does not have the size that it states: the file is damaged; copy it again")
    return raw


def _filters(is_text: bool, window: int) -> list[dict[str, int]]:
    shape = {"lc": 3, "lp": 0, "pb": 0} if is_text else {"lc": 0, "lp": 0, "pb": 0}
    preset = 9 | lzma.PRESET_EXTREME if is_text else 6
    return [{"id": lzma.FILTER_LZMA1, "preset": preset, "dict_size": window, **shape}]
