"""Reads the metadata entries of a ``.tflite``, which its interpreter does not report."""

import mmap
from pathlib import Path
from typing import Any


def read_metadata(path: Path) -> dict[str, bytes]:
    """The metadata entries of a readable ``.tflite``, by name; its weights are not read."""
    import tflite  # noqa: PLC0415  # nearly 200 modules that only these files need

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        model = tflite.Model.GetRootAs(content)
        entries = (model.Metadata(i) for i in range(model.MetadataLength()))
        return {entry.Name().decode(): _bytes(model.Buffers(entry.Buffer())) for entry in entries}


def _bytes(buffer: Any) -> bytes:
    return b"" if buffer.DataIsNone() else bytes(buffer.DataAsNumpy())
