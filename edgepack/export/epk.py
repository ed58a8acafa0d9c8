"""The ``.epk`` artifact: the packed ``.onnx``, and the packed size of each artifact."""

from collections.abc import Mapping
from pathlib import Path

from edgepack.pack.epk import SUFFIX, Packed, pack


def export_epk(
    files: Mapping[str, Path], package: Path, scratch: Path, *, ship: bool, large: bool
) -> dict[str, Packed]:
    """Pack each artifact: with ``ship`` the ``.onnx`` into ``package``, all others into ``scratch``.

    Packing takes about 0.2 s per MB. A ``large`` model is packed only to ship.

    Raises:
        ExportError: a file cannot be written, or the shipped file does not unpack to the same bytes.
    """
    packed = {}
    for name, path in files.items():
        ships = ship and name == "onnx"
        if ships or not large:
            place = package / f"{path.stem}{SUFFIX}" if ships else scratch / f"{name}{SUFFIX}"
            packed[name] = pack(path, place, check=ships)
    return packed
