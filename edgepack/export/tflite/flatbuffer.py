"""A TFLite graph as plain data, and its bytes.

The bytes of a weight are copied once, into a buffer that was made large enough at the start.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt

from edgepack.export.tflite.schema import (
    FILE_IDENTIFIER,
    OPS,
    PLACEHOLDER_CODE,
    SCHEMA_VERSION,
    TENSOR_TYPES,
    OpSpec,
)

Array = npt.NDArray[Any]
Options = Mapping[str, float]

ALIGNMENT = 16
"""Bytes; runtimes map weights where they lie in the file."""
_ROOM_PER_ITEM = 400
"""More bytes than the tables of a tensor or an operator take."""


@dataclass(frozen=True, slots=True, eq=False)
class Quant:
    """``real = (stored - zero_point) * scale``; arrays of one entry, or of one per index of ``axis``."""

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    axis: int = 0

    def same(self, other: "Quant") -> bool:
        """Whether integers mean the same under both."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of the graph; ``data`` where it is constant."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    quant: Quant | None = None
    data: Array | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator; inputs and outputs are indices of tensors, -1 for an absent input."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    version: int
    options: Options


@dataclass(slots=True)
class Graph:
    """A graph that is being written."""

    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def add(self, tensor: Tensor) -> int:
        """Add a tensor; gives its index."""
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def serialize(graph: Graph, description: str, metadata: Mapping[str, bytes]) -> memoryview:
    """The file: one subgraph with a signature, and named byte strings as metadata.

    Tensors of equal bytes have one buffer, such as a table and the product with it.
    """
    datas, buffer_of = _contents(graph)
    texts = [np.frombuffer(text, np.uint8) for text in metadata.values()]
    size = sum(d.nbytes + ALIGNMENT for d in (*datas, *texts))
    size += _ROOM_PER_ITEM * (len(graph.tensors) + len(graph.operators) + 16)
    builder = flatbuffers.Builder(size + sum(q.scale.nbytes * 3 for q in _quants(graph)))
    # The runtime takes buffer 0 as "no data".
    buffers = [_buffer(builder, None), *(_buffer(builder, d) for d in (*datas, *texts))]
    buffer_vector = _vector(builder, buffers)
    codes = list(dict.fromkeys((op.name, op.version) for op in graph.operators))
    code_vector = _vector(builder, [_code(builder, OPS[name], version) for name, version in codes])
    subgraph = _vector(builder, [_subgraph(builder, graph, codes, buffer_of)])
    first_text = 1 + len(datas)
    entries = _vector(builder, [_metadata(builder, k, first_text + i) for i, k in enumerate(metadata)])
    signature = _vector(builder, [_signature(builder, graph)])
    text = builder.CreateString(description)
    builder.StartObject(8)
    builder.PrependUint32Slot(0, SCHEMA_VERSION, 0)
    for slot, offset in ((1, code_vector), (2, subgraph), (3, text), (4, buffer_vector), (6, entries)):
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    builder.PrependUOffsetTRelativeSlot(7, signature, 0)
    builder.Finish(builder.EndObject(), FILE_IDENTIFIER)
    return memoryview(builder.Bytes)[builder.Head() :]


def _quants(graph: Graph) -> list[Quant]:
    return [t.quant for t in graph.tensors if t.quant is not None]


def _vector(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _numbers(builder: flatbuffers.Builder, numbers: Sequence[int]) -> int:
    return int(builder.CreateNumpyVector(np.asarray(numbers, np.int32)))


def _buffer(builder: flatbuffers.Builder, data: Array | None) -> int:
    content = None
    if data is not None and data.nbytes:
        raw = np.atleast_1d(data).reshape(-1).view(np.uint8).data
        builder.StartVector(1, raw.nbytes, ALIGNMENT)
        head = builder.head - raw.nbytes
        builder.head = head
        builder.Bytes[head : head + raw.nbytes] = raw
        content = builder.EndVector()
    builder.StartObject(3)
    if content is not None:
        builder.PrependUOffsetTRelativeSlot(0, content, 0)
    return int(builder.EndObject())


def _code(builder: flatbuffers.Builder, spec: OpSpec, version: int) -> int:
    builder.StartObject(4)
    builder.PrependInt8Slot(0, min(spec.code, PLACEHOLDER_CODE), 0)
    builder.PrependInt32Slot(2, version, 1)
    builder.PrependInt32Slot(3, spec.code, 0)
    return int(builder.EndObject())


def _contents(graph: Graph) -> tuple[list[Array], list[int]]:
    """Different contents, and for each tensor the number of its buffer: 0 for none, else from 1."""
    datas: list[Array] = []
    known: dict[bytes, int] = {}
    buffer_of = []
    for tensor in graph.tensors:
        if tensor.data is None:
            buffer_of.append(0)
            continue
        data = np.ascontiguousarray(tensor.data)
        digest = hashlib.sha256(np.atleast_1d(data).reshape(-1).view(np.uint8).data).digest()
        if digest not in known:
            datas.append(data)
            known[digest] = len(datas)
        buffer_of.append(known[digest])
    return datas, buffer_of


def _subgraph(
    builder: flatbuffers.Builder, graph: Graph, codes: Sequence[tuple[str, int]], buffer_of: Sequence[int]
) -> int:
    places = {code: place for place, code in enumerate(codes)}
    tensors = [_tensor(builder, t, buffer) for t, buffer in zip(graph.tensors, buffer_of, strict=True)]
    tensor_vector = _vector(builder, tensors)
    operators = [_operator(builder, op, places[op.name, op.version]) for op in graph.operators]
    operator_vector = _vector(builder, operators)
    inputs, outputs = _numbers(builder, graph.inputs), _numbers(builder, graph.outputs)
    name = builder.CreateString("main")
    builder.StartObject(5)
    for slot, offset in enumerate((tensor_vector, inputs, outputs, operator_vector, name)):
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return int(builder.EndObject())


def _tensor(builder: flatbuffers.Builder, tensor: Tensor, buffer: int) -> int:
    name, shape = builder.CreateString(tensor.name), _numbers(builder, tensor.shape)
    quant = None if tensor.quant is None else _quant(builder, tensor.quant)
    builder.StartObject(9)
    builder.PrependUOffsetTRelativeSlot(0, shape, 0)
    builder.PrependInt8Slot(1, TENSOR_TYPES[tensor.dtype], 0)
    builder.PrependUint32Slot(2, buffer, 0)
    builder.PrependUOffsetTRelativeSlot(3, name, 0)
    if quant is not None:
        builder.PrependUOffsetTRelativeSlot(4, quant, 0)
    builder.PrependBoolSlot(8, True, False)
    return int(builder.EndObject())


def _quant(builder: flatbuffers.Builder, quant: Quant) -> int:
    scale = builder.CreateNumpyVector(quant.scale)
    zero_point = builder.CreateNumpyVector(quant.zero_point)
    builder.StartObject(7)
    builder.PrependUOffsetTRelativeSlot(2, scale, 0)
    builder.PrependUOffsetTRelativeSlot(3, zero_point, 0)
    builder.PrependInt32Slot(6, quant.axis, 0)
    return int(builder.EndObject())


def _operator(builder: flatbuffers.Builder, operator: Operator, code: int) -> int:
    spec = OPS[operator.name]
    inputs, outputs = _numbers(builder, operator.inputs), _numbers(builder, operator.outputs)
    options = _options(builder, spec, operator.options) if spec.options else None
    builder.StartObject(5)
    builder.PrependUint32Slot(0, code, 0)
    builder.PrependUOffsetTRelativeSlot(1, inputs, 0)
    builder.PrependUOffsetTRelativeSlot(2, outputs, 0)
    if options is not None:
        builder.PrependUint8Slot(3, spec.options, 0)
        builder.PrependUOffsetTRelativeSlot(4, options, 0)
    return int(builder.EndObject())


def _options(builder: flatbuffers.Builder, spec: OpSpec, options: Options) -> int:
    fields = spec.fields or {}
    builder.StartObject(max((f.slot + 1 for f in fields.values()), default=0))
    for name, value in options.items():
        place = fields[name]
        match place.kind:
            case "b":
                builder.PrependInt8Slot(place.slot, int(value), int(place.default))
            case "i":
                builder.PrependInt32Slot(place.slot, int(value), int(place.default))
            case "f":
                builder.PrependFloat32Slot(place.slot, float(value), place.default)
            case _:
                builder.PrependBoolSlot(place.slot, bool(value), bool(place.default))
    return int(builder.EndObject())


def _metadata(builder: flatbuffers.Builder, name: str, buffer: int) -> int:
    text = builder.CreateString(name)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, text, 0)
    builder.PrependUint32Slot(1, buffer, 0)
    return int(builder.EndObject())


def _signature(builder: flatbuffers.Builder, graph: Graph) -> int:
    def named(indices: Sequence[int]) -> int:
        maps = []
        for index in indices:
            name = builder.CreateString(graph.tensors[index].name)
            builder.StartObject(2)
            builder.PrependUOffsetTRelativeSlot(0, name, 0)
            builder.PrependUint32Slot(1, index, 0)
            maps.append(int(builder.EndObject()))
        return _vector(builder, maps)

    inputs, outputs = named(graph.inputs), named(graph.outputs)
    key = builder.CreateString("serving_default")
    builder.StartObject(5)
    builder.PrependUOffsetTRelativeSlot(0, inputs, 0)
    builder.PrependUOffsetTRelativeSlot(1, outputs, 0)
    builder.PrependUOffsetTRelativeSlot(2, key, 0)
    builder.PrependUint32Slot(4, 0, 0)
    return int(builder.EndObject())
