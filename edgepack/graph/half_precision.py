"""Convert models in half precision (float16, bfloat16) to float32, which all later stages use.

Given (float16 as exporters for GPUs and phones write it, with Casts around the nodes left in float32)::

    x [float16] -> Conv(w [float16]) -> Cast(float32) -> Softmax -> Cast(float16) -> y [float16]

Result (the inner Casts do nothing any more; a rule of normalization removes them)::

    x [float16] -> Cast(float32) -> Conv(w [float32]) -> Softmax -> Cast(float16) -> y [float16]

Every float16 and bfloat16 value is exact in float32, so weights keep their values. Intermediate results are
rounded less often than in the original, and overflow later. Graph inputs and outputs keep their types.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepack.errors import ModelError
from edgepack.graph.rules.rule import is_op
from edgepack.ir.files import tensors
from edgepack.ir.model import LAZY_BYTES, dims, fresh_name, name_of, walk_nodes

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")
"""Attributes of standard operators that name the type to compute in or to return."""
_ANY_TYPE = ("Cast", "Shape", "Size")
"""Operators that accept any input type and whose output type does not depend on it."""
_FUSED = frozenset(
    ["Attention", "BiasGelu", "BiasSplitGelu", "EmbedLayerNormalization", "FastGelu", "FusedConv",
     "FusedGemm", "FusedMatMul", "Gelu", "LayerNormalization", "MultiHeadAttention", "QuickGelu",
     "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization",
     "SkipSimplifiedLayerNormalization"]
)  # fmt: skip
"""Fused operators of onnxruntime (domain com.microsoft); each computes in one floating type throughout."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A node that still computes in half precision, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class HalfPrecisionNotes:
    """What :func:`to_float32` did."""

    types: tuple[str, ...] = ()
    """``float16``, ``bfloat16``: those found in the model."""
    values: int = 0
    """Number of constants and activations that were in half precision."""
    kept: tuple[Kept, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """Lines for the report; empty where nothing was in half precision."""
        if not self.values:
            return ()
        given = " and ".join(self.types)
        what = (
            f"the original is {given}: {self.values} weights and activations became float32 before anything "
            f"else, its inputs and outputs keep their types; sizes and times compare with the {given} file"
        )
        return (what, *(f"node {k.node!r}: {k.reason}" for k in self.kept))


@dataclass(frozen=True, slots=True)
class _Plan:
    was: dict[ir.Value, ir.DataType]
    """All values in half precision."""
    foreign: dict[ir.Node, None]
    """Nodes that keep their types."""
    stays: set[ir.Value] = field(default_factory=set)
    """Values that keep their types: inputs, outputs of foreign nodes, Casts and constants only for those."""


def float32_bytes(model: ir.Model) -> int:
    """Bytes of all tensors of a model once they are float32; none is read."""
    return sum(tensor.nbytes * (2 if tensor.dtype in HALF else 1) for tensor in tensors(model))


def refuse_bfloat16(model: ir.Model, path: Path) -> None:
    """Refuse a bfloat16 model: no runtime here runs it, so there is no reference to compare with.

    Raises:
        ModelError: naming the first tensor in bfloat16.
    """
    bfloat16 = ir.DataType.BFLOAT16
    found = [f"tensor {value.name!r}" for value in _values(model) if value.dtype == bfloat16]
    made = [n.outputs[0].name for n in walk_nodes(model.graph) if _asked(n) == bfloat16]
    if found := found or [f"tensor {name!r}" for name in made]:
        raise ModelError(
            f"{path}: {found[0]} is bfloat16, for which onnxruntime has no CPU kernels: there is nothing to "
            "compare a built model with; export it in float16 or float32"
        )


def has_half_precision(model: ir.Model) -> bool:
    """Whether anything in the model is in half precision; Constant nodes are not looked at."""
    makes_half = any(_asked(node) is not None for node in walk_nodes(model.graph))
    return makes_half or any(value.dtype in HALF for value in _values(model))


def to_float32(model: ir.Model) -> HalfPrecisionNotes:
    """Convert ``model`` from half precision to float32, in place.

    Requires that all constants are initializers, all functions are inlined and types are inferred. Inputs and
    outputs keep their types. Nodes of operators not known to accept float32 keep theirs, between Casts.

    Raises:
        ModelError: an input or output is a sequence of tensors in half precision, or a node that must keep
            its types has an output without a type, or has a subgraph.
    """
    was = {value: value.dtype for value in _values(model) if value.dtype in HALF}
    half = {value: dtype for value, dtype in was.items() if dtype is not None}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value in half and not isinstance(value.type, ir.TensorType):
            raise ModelError(
                f"{value.name!r} is {value.type}: sequences in half precision are not supported; export the "
                "model with tensors or in float32"
            )
    plan = _Plan(half, _foreign(model, half))
    plan.stays.update(value for value in half if _stays(value, plan, model.graph))
    changed = [value for value in half if value not in plan.stays]
    for node in walk_nodes(model.graph):
        if node not in plan.foreign and not (node.outputs and node.outputs[0] in plan.stays):
            _retype_attributes(node)
    for value in changed:
        value.type = _single(value.type)
        if value.const_value is not None:
            value.const_value = _half_precision(value.const_value)
    for value in plan.stays:
        _cast_for_consumers(model.graph, value, plan)
    for node in plan.foreign:
        _cast_for_node(model.graph, node, plan)
    _cast_for_outputs(model.graph, plan)
    kept = (Kept(node.outputs[0].name or "", _reason(node, plan)) for node in plan.foreign)
    types = tuple(dtype.name.lower() for dtype in HALF if dtype in half.values())
    return HalfPrecisionNotes(types, len(changed), tuple(kept))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value once: inputs, constants and node outputs of all graphs."""
    seen: set[ir.Value] = set()
    for graph in model.graphs():
        results = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *results):
            if value not in seen:
                seen.add(value)
                yield value


def _asked(node: ir.Node) -> ir.DataType | None:
    """The half-precision type that an attribute of a standard operator names."""
    if node.domain not in ("", "ai.onnx"):
        return None
    for name in _TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.value in HALF:
            return ir.DataType(attribute.value)
    return None


def _foreign(model: ir.Model, half: dict[ir.Value, ir.DataType]) -> dict[ir.Node, None]:
    """Nodes that use half precision and whose operators are not known to accept another type."""
    foreign: dict[ir.Node, None] = {}
    for node in walk_nodes(model.graph):
        touched = any(value in half for value in (*node.inputs, *node.outputs) if value is not None)
        standard = node.domain in ("", "ai.onnx")
        if not touched or standard or (node.domain == "com.microsoft" and node.op_type in _FUSED):
            continue
        who = f"node {node.name or node.outputs[0].name!r} ({node.domain}::{node.op_type})"
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ModelError(f"{who} has a subgraph in half precision: export the model in float32")
        for value in node.outputs:
            if value.dtype is None and (value.uses() or value.is_graph_output()):
                raise ModelError(
                    f"{who} computes in half precision, and the type of its output {value.name!r} is not "
                    "stated: add it to the model's value_info, or export the model in float32"
                )
        foreign[node] = None
    return foreign


def _stays(value: ir.Value, plan: _Plan, main: ir.Graph) -> bool:
    producer = value.producer()
    if producer is None and not value.is_initializer():
        return value in main.inputs  # inputs of a subgraph follow the type of what is passed
    if producer is not None and producer in plan.foreign:
        return True
    read_only_there = all(use.node in plan.foreign for use in value.uses())
    given_by_a_body = value.is_graph_output() and value not in main.outputs
    return (value.is_initializer() or is_op(producer, "Cast")) and read_only_there and not given_by_a_body


def _retype_attributes(node: ir.Node) -> None:
    if _asked(node) is not None:
        for name in _TYPE_ATTRIBUTES:
            if name in node.attributes and node.attributes[name].value in HALF:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    value = node.attributes.get("value")
    if is_op(node, "ConstantOfShape") and value is not None and value.as_tensor().dtype in HALF:
        node.attributes["value"] = ir.AttrTensor("value", _half_precision(value.as_tensor()))


def _single(kind: ir.TypeProtocol | None) -> ir.TypeProtocol:
    """The same kind of type with float32 elements; a new object, since models share types."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_single(kind.elem_type), denotation=kind.denotation)
    return ir.TensorType(ir.DataType.FLOAT, denotation=None if kind is None else kind.denotation)


def _half_precision(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same values in float32: converted now, or for a large tensor whenever it is read."""

    def convert() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    if tensor.nbytes <= LAZY_BYTES:
        return convert()
    return ir.LazyTensor(convert, dtype=ir.DataType.FLOAT, shape=ir.Shape(dims(tensor)), name=tensor.name)


def _cast(main: ir.Graph, value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": to.value})
    out = node.outputs[0]
    out.name, out.type = fresh_name(main, name), ir.TensorType(to)
    out.shape = None if value.shape is None else value.shape.copy()
    return node


def _cast_for_consumers(main: ir.Graph, value: ir.Value, plan: _Plan) -> None:
    """Cast ``value`` to float32 for consumers that compute in float32, and where a subgraph returns it."""
    consumers = [u for u in value.uses() if u.node not in plan.foreign and not is_op(u.node, *_ANY_TYPE)]
    graph = value.graph
    given = graph is not None and graph is not main and value in graph.outputs
    if not consumers and not given:
        return
    cast = _cast(main, value, ir.DataType.FLOAT, f"{value.name}_float32")
    producer = value.producer()
    assert isinstance(graph, ir.Graph)
    if producer is not None:
        graph.insert_after(producer, cast)
    else:
        graph.insert_before(graph[0], cast)
    for node, index in consumers:
        node.replace_input_with(index, cast.outputs[0])
    for index, out in enumerate(graph.outputs if given else ()):
        if out is value:
            graph.outputs[index] = cast.outputs[0]


def _cast_for_node(main: ir.Graph, node: ir.Node, plan: _Plan) -> None:
    """Cast the inputs of a node that keeps its types back to half precision."""
    for index, value in enumerate(node.inputs):
        if value is not None and value in plan.was and value not in plan.stays:
            dtype = plan.was[value]
            cast = _cast(main, value, dtype, f"{value.name}_{dtype.name.lower()}")
            assert isinstance(node.graph, ir.Graph)
            node.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def _cast_for_outputs(main: ir.Graph, plan: _Plan) -> None:
    """Cast graph outputs back to their original type, under the same name."""
    for value in dict.fromkeys(main.outputs):
        if value not in plan.was or value in plan.stays:
            continue
        name = name_of(value)
        value.name = fresh_name(main, f"{name}_float32")
        cast = _cast(main, value, plan.was[value], name)
        main.append(cast)
        for index, out in enumerate(main.outputs):
            if out is value:
                main.outputs[index] = cast.outputs[0]


def _reason(node: ir.Node, plan: _Plan) -> str:
    names = [v.name for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in HALF]
    return (
        f"{node.domain}::{node.op_type} is not known to compute in float32, so it stays as it is, with "
        f"{', '.join(map(repr, names))} in half precision"
    )
