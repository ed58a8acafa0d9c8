"""What a ``.tflite`` says of itself and its interpreter does not tell: the metadata entries."""

import mmap
from collections.abc import Iterator
from pathlib import Path

_METADATA, _BUFFERS = 6, 4
"""Fields of the table Model in the public schema of TensorFlow Lite."""
_NAME, _BUFFER = 0, 1
"""Fields of a Metadata table."""
_DATA = 0
"""Field of a Buffer table."""


def read_metadata(path: Path) -> dict[str, bytes]:
    """The metadata entries of a readable ``.tflite``, by name; its weights are not read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return dict(_entries(content))


def _entries(content: mmap.mmap) -> Iterator[tuple[str, bytes]]:
    from flatbuffers import encode, number_types, table  # noqa: PLC0415  # comes with what runs the file

    def field(at: "table.Table", index: int) -> int:
        """Where the field of a table is; 0 if it is not there."""
        offset = at.Offset(4 + 2 * index)
        return at.Pos + offset if offset else 0

    def items(at: "table.Table", index: int) -> list["table.Table"]:
        """The tables in a vector."""
        if not field(at, index):
            return []
        offset = at.Offset(4 + 2 * index)
        start = at.Vector(offset)
        return [table.Table(content, at.Indirect(start + 4 * i)) for i in range(at.VectorLen(offset))]

    model = table.Table(content, encode.Get(number_types.UOffsetTFlags.packer_type, content, 0))
    buffers = items(model, _BUFFERS)
    for entry in items(model, _METADATA):
        name = entry.String(field(entry, _NAME)).decode()
        at = field(entry, _BUFFER)
        buffer = buffers[entry.Get(number_types.Uint32Flags, at) if at else 0]
        offset = buffer.Offset(4 + 2 * _DATA)
        start = buffer.Vector(offset) if offset else 0
        yield name, bytes(content[start : start + buffer.VectorLen(offset)]) if offset else b""
