"""A TFLite graph as plain data, and its serialization.

The bytes of a weight are copied once, into a buffer of sufficient size.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
import tflite

from edgepack.export.tflite.schema import FILE_IDENTIFIER, OPS, SCHEMA_VERSION, TENSOR_TYPES

Array = npt.NDArray[Any]
Options = Mapping[str, float]

ALIGNMENT = 16
"""Alignment in bytes; runtimes memory-map the weights."""
_ROOM_PER_ITEM = 400
"""Upper bound of the bytes of the tables of a tensor or an operator."""


@dataclass(frozen=True, slots=True, eq=False)
class Quant:
    """``real = (stored - zero_point) * scale``; arrays of one entry, or of one per channel of ``axis``."""

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    axis: int = 0

    def same(self, other: "Quant") -> bool:
        """Whether both have equal scales and zero points."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of the graph; a constant has ``data``."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    quant: Quant | None = None
    data: Array | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator; inputs and outputs are indices of tensors, -1 for an omitted input."""

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

    Tensors of equal bytes share one buffer, such as tied embeddings.
    """
    datas, buffer_of = _contents(graph)
    texts = [np.frombuffer(text, np.uint8) for text in metadata.values()]
    size = sum(d.nbytes + ALIGNMENT for d in (*datas, *texts))
    size += _ROOM_PER_ITEM * (len(graph.tensors) + len(graph.operators) + 16)
    builder = flatbuffers.Builder(size + sum(q.scale.nbytes * 3 for q in _quants(graph)))
    # Buffer 0 means "no data".
    buffers = [_buffer(builder, None), *(_buffer(builder, d) for d in (*datas, *texts))]
    buffer_vector = _vector(builder, buffers)
    codes = list(dict.fromkeys((op.name, op.version) for op in graph.operators))
    code_vector = _vector(builder, [_code(builder, name, version) for name, version in codes])
    subgraph = _vector(builder, [_subgraph(builder, graph, codes, buffer_of)])
    first_text = 1 + len(datas)
    entries = _vector(builder, [_metadata(builder, k, first_text + i) for i, k in enumerate(metadata)])
    signature = _vector(builder, [_signature(builder, graph)])
    text = builder.CreateString(description)
    model = _table(
        builder,
        "Model",
        version=SCHEMA_VERSION,
        operator_codes=code_vector,
        subgraphs=subgraph,
        description=text,
        buffers=buffer_vector,
        metadata=entries,
        signature_defs=signature,
    )
    builder.Finish(model, FILE_IDENTIFIER)
    return memoryview(builder.Bytes)[builder.Head() :]


def _quants(graph: Graph) -> list[Quant]:
    return [t.quant for t in graph.tensors if t.quant is not None]


def _table(builder: flatbuffers.Builder, table: str, /, **fields: float | None) -> int:
    """A table of the schema, with fields by name; those that are ``None`` are left out.

    A field is a number, or the offset of another object.
    """
    getattr(tflite, f"{table}Start")(builder)
    for field_name, content in fields.items():
        if content is not None:
            spelled = "".join(word.capitalize() for word in field_name.split("_"))
            getattr(tflite, f"{table}Add{spelled}")(builder, content)
    return int(getattr(tflite, f"{table}End")(builder))


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
        # By hand: flatc's code for Python ignores the alignment in the schema.
        raw = np.atleast_1d(data).reshape(-1).view(np.uint8).data
        builder.StartVector(1, raw.nbytes, ALIGNMENT)
        head = builder.head - raw.nbytes
        builder.head = head
        builder.Bytes[head : head + raw.nbytes] = raw
        content = builder.EndVector()
    return _table(builder, "Buffer", data=content)


def _code(builder: flatbuffers.Builder, name: str, version: int) -> int:
    code = getattr(tflite.BuiltinOperator, name)
    eight_bits = min(code, tflite.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    return _table(
        builder, "OperatorCode", deprecated_builtin_code=eight_bits, version=version, builtin_code=code
    )


def _contents(graph: Graph) -> tuple[list[Array], list[int]]:
    """Distinct contents, and for each tensor the index of its buffer: 0 for no data, else from 1."""
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
    return _table(
        builder,
        "SubGraph",
        tensors=tensor_vector,
        inputs=inputs,
        outputs=outputs,
        operators=operator_vector,
        name=builder.CreateString("main"),
    )


def _tensor(builder: flatbuffers.Builder, tensor: Tensor, buffer: int) -> int:
    name, shape = builder.CreateString(tensor.name), _numbers(builder, tensor.shape)
    quant = None if tensor.quant is None else _quant(builder, tensor.quant)
    return _table(
        builder,
        "Tensor",
        shape=shape,
        type=TENSOR_TYPES[tensor.dtype],
        buffer=buffer,
        name=name,
        quantization=quant,
        has_rank=True,
    )


def _quant(builder: flatbuffers.Builder, quant: Quant) -> int:
    scale = builder.CreateNumpyVector(quant.scale)
    zero_point = builder.CreateNumpyVector(quant.zero_point)
    return _table(
        builder, "QuantizationParameters", scale=scale, zero_point=zero_point, quantized_dimension=quant.axis
    )


def _operator(builder: flatbuffers.Builder, operator: Operator, code: int) -> int:
    inputs, outputs = _numbers(builder, operator.inputs), _numbers(builder, operator.outputs)
    table = OPS[operator.name].options
    options = _table(builder, table, **operator.options) if table else None
    return _table(
        builder,
        "Operator",
        opcode_index=code,
        inputs=inputs,
        outputs=outputs,
        builtin_options_type=getattr(tflite.BuiltinOptions, table or "NONE"),
        builtin_options=options,
    )


def _metadata(builder: flatbuffers.Builder, name: str, buffer: int) -> int:
    return _table(builder, "Metadata", name=builder.CreateString(name), buffer=buffer)


def _signature(builder: flatbuffers.Builder, graph: Graph) -> int:
    def named(indices: Sequence[int]) -> int:
        names = ((builder.CreateString(graph.tensors[index].name), index) for index in indices)
        return _vector(builder, [_table(builder, "TensorMap", name=n, tensor_index=i) for n, i in names])

    inputs, outputs = named(graph.inputs), named(graph.outputs)
    key = builder.CreateString("serving_default")
    return _table(
        builder, "SignatureDef", inputs=inputs, outputs=outputs, signature_key=key, subgraph_index=0
    )
