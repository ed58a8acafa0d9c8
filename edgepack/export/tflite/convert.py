"""Conversion of a float model and its plan to a graph of TFLite operators, group by group."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import onnx_ir as ir

from edgepack.errors import ExportError
from edgepack.export.tflite import concat, elementwise, linear, move, pool, reduce
from edgepack.export.tflite.flatbuffer import Tensor
from edgepack.export.tflite.layout import Order, arranged, channels_last, native, same_data
from edgepack.export.tflite.lowering import INT8, Lowering
from edgepack.export.tflite.schema import TENSOR_TYPES
from edgepack.export.tflite.tasks import UNBOUNDED, Task, dtype_of, quant_of
from edgepack.ir.model import name_of
from edgepack.quantization.groups import activation_bounds
from edgepack.quantization.plan.types import Precision, QuantPlan
from edgepack.quantization.weights.rounding import Rounded

Io = Literal["float", "int8"]
Write = Callable[[Lowering, Task], None]

# fmt: off
WRITERS: Mapping[str, Write] = {
    **dict.fromkeys(elementwise.ARITHMETIC, elementwise.arithmetic),
    **dict.fromkeys(elementwise.EXTREMES, elementwise.extreme),
    **dict.fromkeys(elementwise.COMPARISONS, elementwise.comparison),
    **dict.fromkeys(elementwise.UNARY, elementwise.unary),
    **dict.fromkeys(reduce.REDUCTIONS, reduce.reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), move.reshape),
    **dict.fromkeys(("Identity", "Dropout"), move.identity),
    **dict.fromkeys(("Expand", "Tile"), move.expand),
    **dict.fromkeys(("ArgMax", "ArgMin"), reduce.arg_extreme),
    **dict.fromkeys(("Softmax", "LogSoftmax"), reduce.softmax),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), pool.global_pool),
    "AveragePool": pool.average_pool, "MaxPool": pool.max_pool, "Resize": pool.resize,
    "BatchNormalization": elementwise.batch_normalization, "Clip": elementwise.clip,
    "Elu": elementwise.elu, "Erf": elementwise.erf, "Gelu": elementwise.gelu,
    "HardSigmoid": elementwise.hard_sigmoid, "HardSwish": elementwise.hard_swish,
    "LeakyRelu": elementwise.leaky_relu,
    "PRelu": elementwise.prelu, "Pow": elementwise.power, "Reciprocal": elementwise.reciprocal,
    "Softplus": elementwise.softplus, "Where": elementwise.where,
    "Concat": concat.concat, "LayerNormalization": reduce.layer_normalization,
    "Cast": move.cast, "DepthToSpace": move.depth_to_space, "Gather": move.gather, "Pad": move.pad,
    "Slice": move.slice_, "SpaceToDepth": move.space_to_depth, "Split": move.split,
    "Transpose": move.transpose,
    "Conv": linear.conv, "ConvTranspose": linear.conv_transpose, "Gemm": linear.gemm,
    "MatMul": linear.matmul,
}
"""The function that lowers each ONNX operator."""
# fmt: on

SPATIAL = frozenset(
    {
        "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize",
        "DepthToSpace", "SpaceToDepth", "BatchNormalization",
    }
)  # fmt: skip
"""Operators that read images as NHWC."""
_ENTRY_BY_ENTRY = frozenset({"Cast", "Mul", "Add", "Sub", "Div", "Pad", "Identity", "Relu", "Clip", "Slice"})


def convert(
    model: ir.Model, plan: QuantPlan, weights: Mapping[str, Rounded], io: Io
) -> tuple[Lowering, dict[str, dict[str, Order]]]:
    """The graph of a model of fixed shapes, and the order of axes of each of its inputs and outputs.

    Raises:
        ExportError: an operator cannot be written; it has the node and the reason.
    """
    low = Lowering({name: quant_of(params) for name, params in plan.activations.items()})
    low.tasks = _tasks(model, plan, weights)
    orders: dict[str, dict[str, Order]] = {"inputs": {}, "outputs": {}}
    for value in model.graph.inputs:
        orders["inputs"][name_of(value)] = _input(low, value, io)
    for name, task in low.tasks.items():
        if name in low.skipped:
            continue
        write = WRITERS.get(task.node.op_type)
        if write is None or task.node.domain not in ("", "ai.onnx"):
            raise task.refuse("this operator is not supported")
        write(low, task)
        _refuse_oversight(low, task)
    for value in model.graph.outputs:
        orders["outputs"][name_of(value)] = _output(low, value, io)
    _prune(low)
    return low, orders


def _tasks(model: ir.Model, plan: QuantPlan, weights: Mapping[str, Rounded]) -> dict[str, Task]:
    """Groups in topological order, without those that were folded with the fixed shapes."""
    nodes = {node.name: node for node in model.graph}
    tasks = {}
    for group_plan in plan.groups:
        group = group_plan.group
        node = nodes.get(group.name)
        if node is None:
            continue
        activation = nodes.get(group.activation) if group.activation else None
        output = (activation or node).outputs[0]
        bounds = activation_bounds(activation) if activation is not None else UNBOUNDED
        if group_plan.drop_activation:
            bounds = UNBOUNDED
        integer = group_plan.precision is Precision.STATIC
        tasks[group.name] = Task(node, group_plan, weights.get(group.name), output, bounds, integer)
    return tasks


def _refuse_oversight(low: Lowering, task: Task) -> None:
    """Refuse a group with a used output that got no tensor."""
    outputs = [task.output] if task.plan.group.activation else task.node.outputs
    for value in outputs:
        used = value.uses() or value.is_graph_output()
        views = [k for k in ((value.name, True), (value.name, False)) if k in low.views]
        if used and not views and task.plan.group.name not in low.joined:
            raise task.refuse(f"its output {value.name!r} is not supported")


def _input(low: Lowering, value: ir.Value, io: Io) -> Order:
    """Add a graph input; an image is NHWC where its first consumer reads NHWC."""
    name, shape = name_of(value), low.shape(value)
    order = channels_last(len(shape)) if len(shape) in (3, 4) and _is_image(value) else native(len(shape))
    dtype = dtype_of(value)
    if dtype not in TENSOR_TYPES:
        raise ExportError(f"input {name!r} is {dtype}, which .tflite does not support")
    kind = low.params.get(name) if io == "int8" else None
    tensor = low.graph.add(Tensor(name, arranged(shape, order), dtype if kind is None else INT8, kind))
    low.graph.inputs.append(tensor)
    low.put(value, tensor, order)
    return order


def _is_image(value: ir.Value) -> bool:
    """Whether the first operator that is not elementwise reads NHWC."""
    while True:
        consumers = [use.node for use in value.uses()]
        if not consumers:
            return False
        if consumers[0].op_type in SPATIAL:
            return True
        if consumers[0].op_type not in _ENTRY_BY_ENTRY:
            return False
        value = consumers[0].outputs[0]


def _output(low: Lowering, value: ir.Value, io: Io) -> Order:
    """Add a graph output in the order of ONNX, or an image as NHWC where it is stored so."""
    name, shape = name_of(value), low.shape(value)
    rank = len(shape)
    order = native(rank)
    if rank == 4 and any(same_data(shape, o, channels_last(4)) for o in low.orders(value)):
        order = channels_last(4)
    integer = io == "int8" and low.is_integer(value)
    tensor = low.read(value, order, integer=integer)
    if (
        tensor in low.graph.inputs
        or tensor in low.graph.outputs
        or low.graph.tensors[tensor].data is not None
    ):
        source = low.graph.tensors[tensor]
        kind = source.quant or source.dtype
        tensor = low.emit("RESHAPE", [tensor, low.numbers(source.shape)], source.shape, kind, name)
    low.graph.outputs.append(tensor)
    for index, other in enumerate(low.graph.tensors):
        if other.name == name and index != tensor and index not in low.graph.inputs:
            low.graph.tensors[index] = replace(other, name=f"{name}_inner")
    low.graph.tensors[tensor] = replace(low.graph.tensors[tensor], name=name)
    return order


def _prune(low: Lowering) -> None:
    """Remove unused operators, then unused tensors."""
    graph = low.graph
    needed = set(graph.outputs)
    kept = []
    for operator in reversed(graph.operators):
        if needed.intersection(operator.outputs):
            needed.update(operator.inputs)
            kept.append(operator)
    needed.update(graph.inputs)
    for operator in kept:
        needed.update(operator.outputs)
    places = {old: new for new, old in enumerate(sorted(needed - {-1}))} | {-1: -1}
    graph.tensors = [graph.tensors[old] for old in sorted(needed - {-1})]
    graph.operators = [
        replace(op, inputs=tuple(places[i] for i in op.inputs), outputs=tuple(places[i] for i in op.outputs))
        for op in reversed(kept)
    ]
    graph.inputs = [places[i] for i in graph.inputs]
    graph.outputs = [places[i] for i in graph.outputs]
