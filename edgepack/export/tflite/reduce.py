"""Operators along an axis: reductions, Softmax, Concat, ArgMax, LayerNormalization."""

import numpy as np

from edgepack.export.tflite.elementwise import FIXED, compose, number
from edgepack.export.tflite.layout import Order, arranged, axis_last
from edgepack.export.tflite.lowering import Lowering
from edgepack.export.tflite.move import identity
from edgepack.export.tflite.schema import TENSOR_TYPES
from edgepack.export.tflite.tasks import Output, Task, dtype_of
from edgepack.ir.model import constant, name_of

REDUCTIONS = {"ReduceMean": "MEAN", "ReduceSum": "SUM", "ReduceMax": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN"}


def reduce(low: Lowering, task: Task) -> None:
    """ReduceMean, ReduceSum, ReduceMax, ReduceMin over constant axes."""
    node, source = task.node, task.node.inputs[0]
    shape = low.shape(source)
    axes = _axes(task, len(shape))
    if not axes:
        identity(low, task)
        return
    op = REDUCTIONS[node.op_type]
    keeps_scale = op in ("REDUCE_MAX", "REDUCE_MIN")
    order = low.common_order([source], len(shape))
    tensor = low.read(source, order, integer=task.integer)
    places = low.numbers(sorted(order.index(axis) for axis in axes))
    stored = tuple(1 if axis in axes else shape[axis] for axis in order)
    kind = low.quant(tensor) if task.integer and keeps_scale else None
    kept = bool(node.attributes.get_int("keepdims", 1))
    target = order if kept else _without(order, axes)
    low.write(task, op, [tensor, places], Output(target, stored, kind), options={"keep_dims": True})


def _axes(task: Task, rank: int) -> list[int]:
    node = task.node
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = constant(node.inputs[1])
        if given is None:
            raise task.refuse("its axes are computed at run time")
        listed = [int(a) for a in given.reshape(-1)]
    else:
        listed = list(node.attributes.get_ints("axes", []))
    if not listed and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        return []
    return sorted(axis % rank for axis in listed or range(rank))


def _without(order: Order, axes: list[int]) -> Order:
    """The order of a tensor without ``axes``."""
    return tuple(axis - sum(gone < axis for gone in axes) for axis in order if axis not in axes)


def softmax(low: Lowering, task: Task) -> None:
    """Softmax and LogSoftmax over one axis, which is stored last."""
    node, source = task.node, task.node.inputs[0]
    rank = len(low.shape(source))
    axis = node.attributes.get_int("axis", -1) % rank
    known = low.orders(source)
    order = next((o for o in known if o[-1] == axis), axis_last(known[0], axis))
    tensor = low.read(source, order, integer=task.integer)
    shape = low.graph.tensors[tensor].shape
    if rank > 4:
        tensor = low.reshape(tensor, (int(np.prod(shape[:-1])), shape[-1]))
    op, options = ("SOFTMAX", {"beta": 1.0}) if node.op_type == "Softmax" else ("LOG_SOFTMAX", {})
    kind = FIXED[node.op_type] if task.integer else None
    low.write(task, op, [tensor], Output(order, low.graph.tensors[tensor].shape, kind), options=options)


def arg_extreme(low: Lowering, task: Task) -> None:
    """ArgMax and ArgMin, first index; on int8 where there is an int8 tensor, which has the same order."""
    node, source = task.node, task.node.inputs[0]
    if node.attributes.get_int("select_last_index", 0):
        raise task.refuse("select_last_index is set, the kernel gives the first index")
    shape = low.shape(source)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    order = low.common_order([source], len(shape))
    tensor = low.read(source, order, integer=low.is_integer(source))
    at = low.constant(np.asarray(order.index(axis), np.int32), "axis")
    dtype = dtype_of(task.output)
    rest = tuple(a for a in order if a != axis)
    kept = bool(node.attributes.get_int("keepdims", 1))
    op = "ARG_MAX" if node.op_type == "ArgMax" else "ARG_MIN"
    result = low.emit(
        op, [tensor, at], arranged(shape, rest), dtype, name_of(task.output), output_type=TENSOR_TYPES[dtype]
    )
    low.put(task.output, result, order if kept else _without(order, [axis]))


def layer_normalization(low: Lowering, task: Task) -> None:
    """LayerNormalization over the last axes, in float."""
    node, source = task.node, task.node.inputs[0]
    shape = low.shape(source)
    rank = len(shape)
    first = node.attributes.get_int("axis", -1) % rank
    order = tuple(range(rank))
    x = low.read(source, order, integer=False)
    name = name_of(task.output)
    places = low.numbers(range(first, rank))
    narrow = (*shape[:first], *(1,) * (rank - first))
    mean = compose(low, "MEAN", [x, places], narrow, name, keep_dims=True)
    centred = compose(low, "SUB", [x, mean], shape, name)
    square = compose(low, "MUL", [centred, centred], shape, name)
    variance = compose(low, "MEAN", [square, places], narrow, name, keep_dims=True)
    epsilon = number(low, node.attributes.get_float("epsilon", 1e-5), rank)
    spread = compose(low, "SQRT", [compose(low, "ADD", [variance, epsilon], narrow, name)], narrow, name)
    tensor = compose(low, "DIV", [centred, spread], shape, name)
    for op, value in zip(("MUL", "ADD"), node.inputs[1:3], strict=False):
        if value is not None:
            tensor = compose(low, op, [tensor, low.read(value, order, integer=False)], shape, name)
    low.put(task.output, tensor, order)
