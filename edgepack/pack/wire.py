"""Locations of the tensors of an ONNX file: its protobuf parsed as bytes, without decoding or copying.

Field numbers are those of ``onnx.proto``. Everything but tensor contents is opaque, so a file that is
reassembled from its pieces is identical, whichever program wrote it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgepack.errors import ModelError

_LENGTH_DELIMITED = 2
_FIXED = {1: 8, 5: 4}
# message: {field: message of its content}; other fields are skipped.
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DIMS, _TYPE, _RAW, _EXTERNAL = 1, 2, 9, 13
ITEM_BYTES = {1: 4, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 4, 15: 8, 16: 2}
"""Bytes of an element by ONNX data type, for complex numbers of each part; one for all others."""
FLOAT = 1
INT8 = 3
INT32 = 6
INT64 = 7
_ELEMENTS_ARE_ITEMS = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16, 17, 18, 19, 20})


@dataclass(slots=True)
class RawTensor:
    """A tensor's location: in the file itself, or in an external one."""

    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    offset: int = 0
    length: int = 0
    location: str | None = None
    """The file with its content, relative to the model's folder; ``None``: the model file."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an element; one if elements share bytes."""
        return ITEM_BYTES.get(self.data_type, 1)

    @property
    def rows(self) -> int:
        """Size of the first axis, or one if the content does not match type and shape."""
        exact = self.data_type in _ELEMENTS_ARE_ITEMS
        fits = exact and math.prod(self.dims) * self.item_bytes == self.length
        return self.dims[0] if fits and self.dims and self.length else 1


def raw_tensors(model: memoryview) -> Iterator[RawTensor]:
    """The tensors with raw content, in file order, external ones included.

    Raises:
        ModelError: these bytes are no protobuf message.
    """
    return _walk(model, 0, len(model), "model")


def _walk(data: memoryview, start: int, end: int, message: str) -> Iterator[RawTensor]:
    if message == "tensor":
        yield from _tensor(data, start, end)
        return
    inside = _INSIDE[message]
    for number, kind, at, stop in _fields(data, start, end):
        if kind == _LENGTH_DELIMITED and number in inside:
            yield from _walk(data, at, stop, inside[number])


def _tensor(data: memoryview, start: int, end: int) -> Iterator[RawTensor]:
    tensor = RawTensor()
    entries: dict[str, str] = {}
    for number, kind, at, stop in _fields(data, start, end):
        if number == _DIMS and kind == 0:
            tensor.dims.append(_varint(data, at, stop)[0])
        elif number == _DIMS and kind == _LENGTH_DELIMITED:
            while at < stop:
                size, at = _varint(data, at, stop)  # noqa: PLW2901
                tensor.dims.append(size)
        elif number == _TYPE and kind == 0:
            tensor.data_type = _varint(data, at, stop)[0]
        elif number == _RAW and kind == _LENGTH_DELIMITED:
            tensor.offset, tensor.length = at, stop - at
        elif number == _EXTERNAL and kind == _LENGTH_DELIMITED:
            pair = {n: bytes(data[a:b]) for n, k, a, b in _fields(data, at, stop) if k == _LENGTH_DELIMITED}
            entries[pair.get(1, b"").decode(errors="replace")] = pair.get(2, b"").decode(errors="replace")
    if "location" in entries:
        tensor.location = entries["location"]
        tensor.offset, tensor.length = _number(entries, "offset"), _number(entries, "length")
    if tensor.length or tensor.location:
        yield tensor


def _number(entries: dict[str, str], key: str) -> int:
    text = entries.get(key, "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, and begin and end of the content of each field."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            stop = _varint(data, at, end)[1]
        elif kind in _FIXED:
            stop = at + _FIXED[kind]
        elif kind == _LENGTH_DELIMITED:
            length, at = _varint(data, at, end)
            stop = at + length
        else:
            raise ModelError(f"no ONNX model: a field of kind {kind} at byte {at}")
        if stop > end or number == 0:
            raise ModelError(f"no ONNX model, or cut short: the field at byte {at} ends after what holds it")
        yield number, kind, at, stop
        at = stop


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """A varint (groups of seven bits), and the position after it."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ModelError(f"no ONNX model, or cut short: a number has no end at byte {at}")
