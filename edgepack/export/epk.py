"""The ``.epk`` artifact: the ``.onnx`` packed to ship, and what each artifact takes when packed."""

from collections.abc import Mapping
from pathlib import Path

from edgepack.pack.epk import SUFFIX, Packed, pack


def export_epk(
    files: Mapping[str, Path], package: Path, scratch: Path, *, ship: bool, large: bool
) -> dict[str, Packed]:
    """Each artifact in packed form, in the ``scratch`` folder but for an ``.onnx`` that is to ``ship``.

    Packing takes about 0.2 s for each MB. A ``large`` model is packed only to ship.

    Raises:
        ExportError: the disk refuses, or what is to ship does not come out as it went in.
    """
    packed = {}
    for name, path in files.items():
        ships = ship and name == "onnx"
        if ships or not large:
            place = package / f"{path.stem}{SUFFIX}" if ships else scratch / f"{name}{SUFFIX}"
            packed[name] = pack(path, place, check=ships)
    return packed
