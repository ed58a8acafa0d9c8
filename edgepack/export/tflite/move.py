"""Operators that move data; most only change the order of axes, and no operator is written."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import tflite

from edgepack.export.tflite.flatbuffer import Quant
from edgepack.export.tflite.layout import (
    Order,
    Shape,
    arranged,
    channels_last,
    joined_order,
    native,
    reshaped_order,
)
from edgepack.export.tflite.lowering import Lowering
from edgepack.export.tflite.schema import TENSOR_TYPES
from edgepack.export.tflite.tasks import Task, View, dtype_of
from edgepack.export.tflite.window import repeat_border
from edgepack.ir.model import constant, name_of

MOST_AXES = 5
"""Most axes of a tensor that runtimes slice."""


def _augmented(low: Lowering, value: ir.Value | None) -> list[View]:
    assert value is not None
    name = name_of(value)
    return [v for integer in (True, False) for v in low.views.get((name, integer), [])]


def reshape(low: Lowering, task: Task) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the same bytes, where merged axes are adjacent."""
    source = task.node.inputs[0]
    before, after = low.shape(source), low.shape(task.output)
    found = False
    for view in _augmented(low, source):
        order = reshaped_order(before, view.order, after)
        if order is not None:
            low.put(task.output, view.tensor, order)
            found = True
    if not found:
        view = _augmented(low, source)[0]
        order = joined_order(before, view.order, after)
        tensor = low.read(source, order, integer=low.is_integer(source))
        target = reshaped_order(before, order, after)
        low.put(task.output, tensor, native(len(after)) if target is None else target)


def transpose(low: Lowering, task: Task) -> None:
    """Transpose: the same bytes in another order of axes."""
    source = task.node.inputs[0]
    rank = len(low.shape(source))
    perm = list(task.node.attributes.get_ints("perm", range(rank - 1, -1, -1)))
    for view in _augmented(low, source):
        low.put(task.output, view.tensor, tuple(perm.index(axis) for axis in view.order))


def identity(low: Lowering, task: Task) -> None:
    """Identity and Dropout."""
    for view in _augmented(low, task.node.inputs[0]):
        low.put(task.output, view.tensor, view.order)


def _moving(low: Lowering, task: Task) -> bool:
    """Whether to move the int8 tensor: always where there is one, since moving is exact."""
    return task.integer or low.is_integer(task.node.inputs[0])


def _moved(
    low: Lowering,
    task: Task,
    op: str,
    inputs: Sequence[int],
    order: Order,
    shape: Shape,
    **options: float,
) -> None:
    """Write an operator whose output has the parameters of its first input."""
    kind = low.graph.tensors[inputs[0]].quant or dtype_of(task.output)
    tensor = low.emit(op, inputs, shape, kind, name_of(task.output), **options)
    low.put(task.output, tensor, order)


def split(low: Lowering, task: Task) -> None:
    """Split: SPLIT for equal parts, else a SLICE for each."""
    node = task.node
    source = node.inputs[0]
    shape = low.shape(source)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    order = low.common_order([source], len(shape))
    tensor = low.read(source, order, integer=_moving(low, task))
    place = order.index(axis)
    sizes = [low.shape(v)[axis] for v in node.outputs]
    kind = low.graph.tensors[tensor].quant or dtype_of(node.outputs[0])
    shapes = [arranged(low.shape(v), order) for v in node.outputs]
    names = [name_of(v) for v in node.outputs]
    if len(set(sizes)) == 1:
        at = low.constant(np.asarray(place, np.int32), "axis")
        parts = low.emit_many("SPLIT", [at, tensor], shapes, kind, names, num_splits=len(sizes))
    else:
        parts, start = [], 0
        for size, part, name in zip(sizes, shapes, names, strict=True):
            begin = [start if i == place else 0 for i in range(len(part))]
            parts.append(low.emit("SLICE", [tensor, low.numbers(begin), low.numbers(part)], part, kind, name))
            start += size
    for value, part_tensor in zip(node.outputs, parts, strict=True):
        low.put(value, part_tensor, order)


def slice_(low: Lowering, task: Task) -> None:
    """Slice with constant bounds as SLICE; steps that divide their axis through a RESHAPE."""
    node = task.node
    source = node.inputs[0]
    shape = low.shape(source)
    ranges = _ranges(task, shape)
    order = low.common_order([source], len(shape))
    tensor = low.read(source, order, integer=_moving(low, task))
    wide: list[int] = []  # the stored shape with stepped axes split
    begin, size = [], []
    for axis in order:
        start, count, step = ranges[axis]
        if step < 0:
            index = np.arange(count, dtype=np.int32) * step + start
            target = (
                *low.graph.tensors[tensor].shape[: order.index(axis)],
                count,
                *low.graph.tensors[tensor].shape[order.index(axis) + 1 :],
            )
            kind = low.graph.tensors[tensor].quant or dtype_of(task.output)
            tensor = low.emit(
                "GATHER",
                [tensor, low.numbers(index)],
                target,
                kind,
                name_of(task.output),
                axis=order.index(axis),
            )
            start, step = 0, 1
        length = low.graph.tensors[tensor].shape[order.index(axis)]
        if step > 1 and length % step == 0:
            wide += [length // step, step]
            begin += [start // step, start % step]
            size += [count, 1]
        else:
            wide.append(length)
            begin.append(start)
            size.append(count)
    stored = arranged(low.shape(task.output), order)
    divided = all(step <= 1 or shape[axis] % step == 0 for axis, (_, _, step) in enumerate(ranges))
    if divided and len(wide) <= MOST_AXES:
        if tuple(size) == tuple(wide):
            low.put(task.output, tensor, order)
            return
        tensor = low.reshape(tensor, tuple(wide))
        inputs = [tensor, low.numbers(begin), low.numbers(size)]
        _moved(low, task, "SLICE", inputs, order, tuple(size))
        return
    starts = [max(ranges[axis][0], 0) if ranges[axis][2] > 0 else 0 for axis in order]
    steps = [max(ranges[axis][2], 1) for axis in order]
    ends = [s + (n - 1) * step + 1 for s, n, step in zip(starts, stored, steps, strict=True)]
    inputs = [tensor, low.numbers(starts), low.numbers(ends), low.numbers(steps)]
    _moved(low, task, "STRIDED_SLICE", inputs, order, stored)


def _ranges(task: Task, shape: Shape) -> list[tuple[int, int, int]]:
    """Start, length and step of each axis."""
    given = [constant(v) if v is not None else None for v in task.node.inputs[1:]]
    given += [None] * (4 - len(given))
    starts, ends = given[0], given[1]
    if starts is None or ends is None:
        raise task.refuse("its bounds are computed at run time")
    axes = range(len(starts)) if given[2] is None else given[2].tolist()
    steps = [1] * len(starts) if given[3] is None else given[3].tolist()
    ranges = [(0, size, 1) for size in shape]
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes, steps, strict=True):
        place = axis % len(shape)
        span = range(shape[place])[slice(int(start), int(end), int(step))]
        # Python has no number for "to before the first"; ONNX has -2**63.
        if step < 0 and end < -shape[place]:
            span = range(shape[place])[int(start) :: int(step)]
        ranges[place] = (span.start if len(span) else 0, len(span), int(step))
    return ranges


def gather(low: Lowering, task: Task) -> None:
    """Gather: SLICE for consecutive constant indices, else GATHER; embeddings are stored as int8."""
    node = task.node
    data, index = node.inputs[0], node.inputs[1]
    shape = low.shape(data)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    places = constant(index)
    order = low.common_order([data], len(shape))
    if task.rounded is not None and not task.integer:
        _table(low, task, axis)
        return
    tensor = low.read(data, order, integer=_moving(low, task))
    place = order.index(axis)
    target = _gathered_order(order, axis, len(low.shape(index)))
    stored = arranged(low.shape(task.output), target)
    if places is None:
        _moved(low, task, "GATHER", [tensor, _indices(low, index)], target, stored, axis=place)
        return
    flat = np.asarray(places).reshape(-1) % shape[axis]
    if np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):
        source = low.graph.tensors[tensor].shape
        begin = [int(flat[0]) if i == place else 0 for i in range(len(source))]
        size = tuple(flat.size if i == place else s for i, s in enumerate(source))
        inputs = [tensor, low.numbers(begin), low.numbers(size)]
        _moved(low, task, "SLICE", inputs, target, size)
        return
    where = low.numbers(flat.reshape(low.shape(index)))
    _moved(low, task, "GATHER", [tensor, where], target, stored, axis=place)


def _gathered_order(order: Order, axis: int, rank: int) -> Order:
    """The order of the output: the axes of the indices replace the gathered axis."""
    result: list[int] = []
    for old in order:
        if old == axis:
            result += range(axis, axis + rank)
        else:
            result.append(old if old < axis else old - 1 + rank)
    return tuple(result)


def _indices(low: Lowering, value: ir.Value | None) -> int:
    return low.read(value, native(len(low.shape(value))), integer=False)


def _table(low: Lowering, task: Task, axis: int) -> None:
    """An embedding with int8 rows, which are dequantized after the GATHER.

    Given: ``Gather(table, ids) -> y``. Result: ``GATHER(table int8) -> DEQUANTIZE(1) -> MUL(scales)``; where
    each row has a scale (tied embeddings), the scales are gathered too.
    """
    node, params = task.node, task.plan.weight
    assert task.rounded is not None
    assert params is not None
    shape = low.shape(task.output)
    one = Quant(np.ones(1, np.float32), np.zeros(1, np.int64))
    name = name_of(task.output)
    table = low.constant(task.rounded.integers, task.plan.group.constants[0], one)
    rows = low.emit("GATHER", [table, _indices(low, node.inputs[1])], shape, one, name, axis=axis)
    real = low.emit("DEQUANTIZE", [rows], shape, dtype_of(task.output), name)
    scale = low.constant(np.asarray(params.scale, np.float32), f"{name}_scale")
    if params.axis == 0:
        column = low.constant(np.asarray(params.scale, np.float32)[:, None], f"{name}_scale")
        indices, sizes = _indices(low, node.inputs[1]), (*shape[:-1], 1)
        scale = low.emit("GATHER", [column, indices], sizes, dtype_of(task.output), f"{name}_scale", axis=0)
    tensor = low.emit("MUL", [real, scale], shape, dtype_of(task.output), name)
    low.put(task.output, tensor, native(len(shape)))


def pad(low: Lowering, task: Task) -> None:
    """Pad with a constant (PAD for zero, else PADV2) or by reflection."""
    node = task.node
    source = node.inputs[0]
    shape = low.shape(source)
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None:
        raise task.refuse("its pads are computed at run time")
    axes_value = node.inputs[3] if len(node.inputs) > 3 else None
    listed = np.arange(len(shape)) if axes_value is None else constant(axes_value)
    if listed is None:
        raise task.refuse("its axes are computed at run time")
    axes = [int(a) % len(shape) for a in listed]
    amounts = np.zeros((len(shape), 2), np.int32)
    amounts[axes] = np.asarray(given).reshape(2, -1).T
    if amounts.min() < 0:
        raise task.refuse("its pads are negative; use a Slice")
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    filling = np.zeros(()) if filler is None else constant(filler)
    if filling is None:
        raise task.refuse("its constant value is computed at run time")
    fill = float(filling.reshape(()))
    mode = node.attributes.get_string("mode", "constant")
    integer = task.integer or (low.is_integer(source) and (mode != "constant" or fill == 0.0))
    order = low.common_order([source], len(shape))
    tensor = low.read(source, order, integer=integer)
    inputs = [tensor, low.numbers(amounts[list(order)])]
    stored = arranged(low.shape(task.output), order)
    if mode == "constant" and fill == 0.0:
        _moved(low, task, "PAD", inputs, order, stored)
    elif mode == "constant":
        value = low.constant(np.asarray(fill, dtype_of(task.output)), "fill")
        _moved(low, task, "PADV2", [*inputs, value], order, stored)
    elif mode == "reflect":
        _moved(low, task, "MIRROR_PAD", inputs, order, stored, mode=tflite.MirrorPadMode.REFLECT)
    elif mode == "edge":
        low.put(task.output, repeat_border(low, tensor, amounts[list(order)].tolist()), order)
    else:
        raise task.refuse(f"there is no kernel for padding of mode {mode!r}")


def expand(low: Lowering, task: Task) -> None:
    """Expand and Tile."""
    source = task.node.inputs[0]
    shape = low.shape(task.output)
    before = (1,) * (len(shape) - len(low.shape(source))) + low.shape(source)
    order = low.common_order([source], len(shape))
    tensor = low.read(source, order, integer=_moving(low, task))
    times = [shape[axis] // before[axis] for axis in order]
    inputs = [tensor, low.numbers(times)]
    _moved(low, task, "TILE", inputs, order, arranged(shape, order))


def depth_to_space(low: Lowering, task: Task) -> None:
    """DepthToSpace; mode CRD with reordered channels."""
    node = task.node
    block = node.attributes.get_int("blocksize", 1)
    tensor = low.read_image(node.inputs[0], integer=_moving(low, task))
    source = low.graph.tensors[tensor]
    if node.attributes.get_string("mode", "DCR") == "CRD":
        depth = source.shape[3] // block**2
        index = np.arange(source.shape[3]).reshape(depth, block**2).T.reshape(-1)
        kind = source.quant or source.dtype
        tensor = low.emit("GATHER", [tensor, low.numbers(index)], source.shape, kind, source.name, axis=3)
    _blocks(low, task, "DEPTH_TO_SPACE", tensor, block)


def space_to_depth(low: Lowering, task: Task) -> None:
    """SpaceToDepth."""
    tensor = low.read_image(task.node.inputs[0], integer=_moving(low, task))
    _blocks(low, task, "SPACE_TO_DEPTH", tensor, task.node.attributes.get_int("blocksize", 1))


def _blocks(low: Lowering, task: Task, op: str, tensor: int, block: int) -> None:
    _moved(low, task, op, [tensor], channels_last(4), low.image_shape(task.output), block_size=block)


def cast(low: Lowering, task: Task) -> None:
    """Cast between types of the TFLite schema."""
    source = task.node.inputs[0]
    assert source is not None
    before, after = dtype_of(source), dtype_of(task.output)
    if before == after:
        identity(low, task)
        return
    if before not in TENSOR_TYPES or after not in TENSOR_TYPES:
        raise task.refuse(f"there is no kernel from {before} to {after}")
    order = low.common_order([source], len(low.shape(source)))
    tensor = low.read(source, order, integer=False)
    shape = arranged(low.shape(source), order)
    types = {"in_data_type": TENSOR_TYPES[before], "out_data_type": TENSOR_TYPES[after]}
    low.put(task.output, low.emit("CAST", [tensor], shape, after, name_of(task.output), **types), order)
