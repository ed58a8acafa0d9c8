"""Fixed shapes: replaces symbolic dimensions by numbers, and folds arithmetic on shapes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.shape_inference
import onnx_ir as ir

from edgepack.errors import ExportError
from edgepack.graph.opset import opset_of
from edgepack.ir.model import clone, constant, name_of, new_initializer

SMALL_ELEMENTS = 4096
"""Constants up to this size may be shapes, sizes or indices; shape inference gets their values."""
_UNFOLDABLE = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"})

Array = npt.NDArray[Any]


def fix_shapes(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """A copy of ``model`` in which all input dimensions are numbers and all shapes are known.

    ``dims`` gives sizes by the name of a dimension, or by its place (``x[3]`` is the fourth of input ``x``);
    the default of the first dimension of an input is 1. Values that depend on shapes and constants only
    become constants.

    Raises:
        ExportError: a dimension has no size, or the shape of a value depends on data.
    """
    fixed = clone(model)
    graph = fixed.graph
    _fix_inputs(graph, dims)
    opset = opset_of(fixed)
    known: dict[str, Array] = {}
    for node in list(graph):
        _refuse_bodies(node)
        data = [None if v is None else known.get(name_of(v), constant(v)) for v in node.inputs]
        folded = _fold(node, data, opset)
        if folded is not None:
            known.update(folded)
        else:
            _infer(node, data, fixed)
    for node in list(graph):
        for value in node.outputs:
            if value.name in known:
                content = known[value.name]
                kept = new_initializer(graph, f"{value.name}_fixed", content)
                value.replace_all_uses_with(kept, replace_graph_outputs=True)
    _drop_unused(graph)
    return fixed


def _fix_inputs(graph: ir.Graph, dims: Mapping[str, int]) -> None:
    for value in graph.inputs:
        if value.shape is None:
            raise ExportError(f"input {value.name!r} has an unknown rank; a .tflite needs it")
        sizes = []
        for axis, dim in enumerate(value.shape):
            place = f"{value.name}[{axis}]"
            size = dim if isinstance(dim, int) else dims.get(place, dims.get(str(dim.value)))
            if size is None and axis == 0:
                size = 1
            if size is None:
                named = f", named {dim.value!r}," if not isinstance(dim, int) and dim.value else ""
                raise ExportError(
                    f"input {value.name!r}: axis {axis}{named} has no fixed size, which a .tflite needs; "
                    f"give one as `dims: {{{place}: SIZE}}`"
                )
            sizes.append(size)
        value.shape = ir.Shape(sizes)


def _refuse_bodies(node: ir.Node) -> None:
    """Refuse control flow: its bodies use outer values, which folding and inference of one node lack."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise ExportError(f"{node.op_type} {node.name!r}: control flow is not supported in a .tflite")


def _fold(node: ir.Node, data: list[Array | None], opset: int) -> dict[str, Array] | None:
    """The outputs, by name, of a node that does not depend on the inputs' data; else ``None``."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _UNFOLDABLE:
        return None
    if node.op_type in ("Shape", "Size") and node.inputs[0] is not None and node.inputs[0].shape is not None:
        sizes = np.asarray([int(d) for d in node.inputs[0].shape], np.int64)  # type: ignore[arg-type]
        if node.op_type == "Size":
            return {name_of(node.outputs[0]): np.asarray(sizes.prod(), np.int64)}
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sizes))
        return {name_of(node.outputs[0]): sizes[start:end]}
    if any(array is None for array, v in zip(data, node.inputs, strict=True) if v is not None):
        return None
    if not node.inputs and node.op_type != "Constant":
        return None
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415  # slow to import

    names = [name_of(v) for v in node.outputs]
    given = {name_of(v): a for v, a in zip(node.inputs, data, strict=True) if v is not None}
    proto = onnx.helper.make_graph(
        [ir.to_proto(node)],
        "node",
        [onnx.ValueInfoProto(name=name) for name in given],
        [onnx.ValueInfoProto(name=name) for name in names],
    )
    whole = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", opset)])
    results = ReferenceEvaluator(whole).run(names, given)
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


def _infer(node: ir.Node, data: list[Array | None], model: ir.Model) -> None:
    """Set the type and shape of each output of a node."""
    types, contents = {}, {}
    for value, array in zip(node.inputs, data, strict=True):
        if value is None:
            continue
        name = name_of(value)
        if array is not None:
            types[name] = onnx.helper.make_tensor_type_proto(
                onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            if array.size <= SMALL_ELEMENTS:
                contents[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        elif value.dtype is not None and value.shape is not None:
            types[name] = onnx.helper.make_tensor_type_proto(int(value.dtype), list(value.shape.numpy()))
    try:
        schema = onnx.defs.get_schema(node.op_type, opset_of(model), node.domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.to_proto(node),
            types,
            contents,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()],
            ir_version=model.ir_version,
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{node.op_type} {node.name!r}: its output shape is unknown: {error}") from error
    for value in node.outputs:
        proto = found.get(value.name or "")
        if proto is None and not value.name:
            continue
        sizes = None
        if proto is not None and proto.tensor_type.HasField("shape"):
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in proto.tensor_type.shape.dim]
        if proto is None or sizes is None or None in sizes:
            raise ExportError(
                f"{node.op_type} {node.name!r}: the shape of its output {value.name!r} depends on data, "
                "not only on the sizes of the inputs; a .tflite needs a fixed shape"
            )
        value.shape = ir.Shape(sizes)
        value.dtype = ir.DataType(proto.tensor_type.elem_type)


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
