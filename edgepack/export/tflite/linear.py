"""Operators with weights: convolutions, Gemm and MatMul."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.export.tflite.flatbuffer import Quant
from edgepack.export.tflite.layout import Order, Shape, axis_last, channels_last, native
from edgepack.export.tflite.lowering import Lowering
from edgepack.export.tflite.schema import Padding
from edgepack.export.tflite.tasks import Output, Task, dtype_of, quant_of
from edgepack.export.tflite.window import Window, options, padded, window
from edgepack.ir.model import constant, name_of, only_consumer
from edgepack.ir.numerics import quantize
from edgepack.ir.scheme import QuantParams, QuantType

Array = npt.NDArray[Any]
Weights = tuple[Array, Array | None, Quant | None]


def stored_weights(low: Lowering, task: Task) -> Weights:
    """Weight, bias and parameters: the rounded ones of an int8 group, else the model's.

    The weight has the layout of ONNX; the bias is float32 ``[outputs]``.
    """
    node = task.node
    if task.integer:
        assert task.rounded is not None
        assert task.plan.weight is not None
        return task.rounded.integers, task.rounded.bias, quant_of(task.plan.weight)
    weight = constant(node.inputs[1])
    if weight is None:
        raise task.refuse("its weight is computed at run time")
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None:
            raise task.refuse("its bias is computed at run time")
    return weight, None if bias is None else bias.reshape(-1), None


def weight_tensor(low: Lowering, task: Task, array: Array, kind: Quant | None, axis: int) -> int:
    """The weight as a constant tensor; ``axis`` is its output channel axis."""
    name = name_of_weight(task)
    if kind is not None:
        kind = Quant(kind.scale, kind.zero_point, axis if kind.scale.size > 1 else 0)
    return low.constant(np.ascontiguousarray(array), name, kind)


def name_of_weight(task: Task) -> str:
    """The name of the weight in the ONNX graph."""
    return task.plan.group.weight or f"{task.node.name}_weight"


def bias_tensor(
    low: Lowering, task: Task, bias: Array | None, outputs: int, x: int, weight: Quant | None
) -> int:
    """The bias: float32, or int32 with the scale of input times weight, as the kernels require."""
    bias = np.zeros(outputs, np.float32) if bias is None else np.broadcast_to(bias, (outputs,))
    name = task.plan.group.bias or f"{name_of_weight(task)}_bias"
    if weight is None:
        return low.constant(np.ascontiguousarray(bias, np.float32), name)
    scale = np.asarray(low.quant(x).scale * weight.scale, np.float32)
    params = QuantParams(
        QuantType.INT32, scale, np.zeros(scale.shape, np.int32), 0 if scale.size > 1 else None
    )
    # Bit-exact as in the .onnx: a bias that is off by one changes values at rounding boundaries.
    stored = quantize(np.asarray(bias, np.float32), params)
    return low.constant(stored, name, Quant(scale, np.zeros(scale.shape, np.int64)))


def conv(low: Lowering, task: Task) -> None:
    """Conv with one or two spatial axes, also grouped, as CONV_2D or DEPTHWISE_CONV_2D."""
    node = task.node
    x = low.shape(node.inputs[0])
    if len(x) not in (3, 4):
        raise task.refuse(f"it has {len(x) - 2} spatial axes, there are kernels for one and two")
    weight, bias, kind = stored_weights(low, task)
    view = window(low, node, weight.shape[2:])
    image = weight if weight.ndim == 4 else weight[:, :, None]
    outputs, group = image.shape[0], node.attributes.get_int("group", 1)
    source = low.read_image(node.inputs[0], integer=task.integer)
    tensor, padding = padded(low, source, view)
    shape = low.image_shape(task.output)
    settings = options(view, padding) | {
        "dilation_h_factor": view.dilations[0],
        "dilation_w_factor": view.dilations[1],
    }
    if group == x[1] and group > 1:
        op, array, axis = "DEPTHWISE_CONV_2D", image.transpose(1, 2, 3, 0), 3
        settings["depth_multiplier"] = outputs // group
    else:
        op, array, axis = "CONV_2D", image.transpose(0, 2, 3, 1), 0
    inputs = [
        tensor,
        weight_tensor(low, task, array, kind, axis),
        bias_tensor(low, task, bias, outputs, tensor, kind),
    ]
    order = channels_last(len(x))
    low.write(task, op, inputs, Output(order, shape), fuses=True, options=settings)


def conv_transpose(low: Lowering, task: Task) -> None:
    """ConvTranspose as TRANSPOSE_CONV, one for each group; padding unlike SAME is sliced off."""
    node = task.node
    x = low.shape(node.inputs[0])
    if len(x) not in (3, 4):
        raise task.refuse(f"it has {len(x) - 2} spatial axes, there are kernels for one and two")
    weight, bias, kind = stored_weights(low, task)
    image = _spread(weight if weight.ndim == 4 else weight[:, :, None], node)
    group = node.attributes.get_int("group", 1)
    axes = len(x) - 2
    strides = _pair(node.attributes.get_ints("strides", [1] * axes), 1)
    source = low.read_image(node.inputs[0], integer=task.integer)
    shape = low.image_shape(task.output)
    cut = _cut_before(task, low, strides, image.shape[2:])
    padding, full = _transposed_padding(low.graph.tensors[source].shape, shape, strides, image.shape[2:], cut)
    outputs = image.shape[1] * group
    parts, per = [], image.shape[0] // group
    sources = [source] if group == 1 else _split_channels(low, source, group)
    result: Quant | np.dtype[np.generic] = low.planned(task.output) if task.integer else dtype_of(task.output)
    bias = None if bias is None else np.broadcast_to(bias, (outputs,))
    width = image.shape[1]
    for index, part in enumerate(sources):
        array = image[index * per : (index + 1) * per].transpose(1, 2, 3, 0)
        some = None if bias is None else bias[index * width : (index + 1) * width]
        inputs = [
            low.numbers([*full[:3], width]),
            weight_tensor(low, task, array, kind, 0),
            part,
            bias_tensor(low, task, some, width, part, kind),
        ]
        parts.append(
            low.emit(
                "TRANSPOSE_CONV", inputs, (*full[:3], width), result, name_of(task.output),
                padding=padding, stride_h=strides[0], stride_w=strides[1],
            )
        )  # fmt: skip
    tensor = parts[0]
    if group > 1:
        tensor = low.emit("CONCATENATION", parts, full, result, name_of(task.output), axis=3)
    if full != shape:
        begin = [0, cut[0], cut[1], 0]
        tensor = low.emit(
            "SLICE", [tensor, low.numbers(begin), low.numbers(shape)], shape, result, name_of(task.output)
        )
    low.put(task.output, low.clamp(tensor, task.bounds), channels_last(len(x)))


def _pair(numbers: Any, first: int) -> tuple[int, int]:
    pair = tuple(int(n) for n in numbers)
    return (pair[0], pair[1]) if len(pair) == 2 else (first, pair[0])


def _spread(image: Array, node: ir.Node) -> Array:
    """A dilated kernel as a dense one with zeros: TRANSPOSE_CONV has no dilation."""
    dilations = _pair(node.attributes.get_ints("dilations", [1] * (len(node.inputs[1].shape) - 2)), 1)  # type: ignore[arg-type, union-attr]
    if dilations == (1, 1):
        return image
    sizes = [(size - 1) * d + 1 for size, d in zip(image.shape[2:], dilations, strict=True)]
    dense = np.zeros((*image.shape[:2], *sizes), image.dtype)
    dense[:, :, :: dilations[0], :: dilations[1]] = image
    return dense


def _cut_before(
    task: Task, low: Lowering, strides: tuple[int, int], size: tuple[int, ...]
) -> tuple[int, int]:
    """Rows and columns that padding removes at the start of the full result."""
    node, lengths = task.node, low.image_shape(task.node.inputs[0])[1:3]  # type: ignore[arg-type]
    outputs = low.image_shape(task.output)[1:3]
    attributes = node.attributes
    auto = attributes.get_string("auto_pad", "NOTSET")
    sized = auto in ("SAME_UPPER", "SAME_LOWER") or "output_shape" in attributes
    axes = len(low.shape(node.inputs[0])) - 2
    extra = _pair(attributes.get_ints("output_padding", [0] * axes), 0)
    pads = attributes.get_ints("pads", [0] * (2 * axes))
    starts = _pair(pads[:axes], 0)
    cut = []
    for axis in (0, 1):
        total = (lengths[axis] - 1) * strides[axis] + size[axis] + extra[axis] - outputs[axis]
        start = starts[axis]
        if sized:
            start = total - total // 2 if auto == "SAME_LOWER" else total // 2
        if start < 0:
            raise task.refuse("its padding is negative")
        cut.append(start)
    return cut[0], cut[1]


def _transposed_padding(
    source: Shape, shape: Shape, strides: tuple[int, int], size: tuple[int, ...], before: tuple[int, int]
) -> tuple[Padding, Shape]:
    """The padding mode, and the shape to compute, whose end is the result."""
    same = True
    full = []
    for axis in (0, 1):
        outputs, stride, inputs = shape[axis + 1], strides[axis], source[axis + 1]
        total = max((inputs - 1) * stride + size[axis] - outputs, 0)
        same &= -(-outputs // stride) == inputs and total // 2 == before[axis]
        # The kernel requires a size from which a convolution with these strides gives the input's size.
        full.append(max((inputs - 1) * stride + size[axis], before[axis] + outputs))
    if same and before != (0, 0):
        return Padding.SAME, shape
    return Padding.VALID, (shape[0], full[0], full[1], shape[3])


def _split_channels(low: Lowering, tensor: int, parts: int) -> list[int]:
    source = low.graph.tensors[tensor]
    shape = (*source.shape[:3], source.shape[3] // parts)
    kind = source.quant or source.dtype
    axis = low.constant(np.asarray(3, np.int32), "axis")
    return low.emit_many(
        "SPLIT", [axis, tensor], [shape] * parts, kind, [source.name] * parts, num_splits=parts
    )


def gemm(low: Lowering, task: Task) -> None:
    """Gemm with a constant weight."""
    attributes = task.node.attributes
    weight, bias, kind = _gemm_operands(low, task)
    order: Order = (0, 1)
    source = task.node.inputs[0]
    if attributes.get_int("transA", 0):
        order = (1, 0)
    tensor = low.read(source, order, integer=task.integer)
    matrix = weight if attributes.get_int("transB", 0) else weight.T
    _product(low, task, tensor, matrix, bias, kind, (0, 1))


def _gemm_operands(low: Lowering, task: Task) -> Weights:
    """Weight and bias, with alpha and beta of a float Gemm multiplied in."""
    node = task.node
    if task.integer:
        return stored_weights(low, task)
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    weight, bias = constant(node.inputs[1]), constant(bias_value)
    if weight is None or (bias is None and bias_value is not None):
        raise task.refuse("its weight or bias is computed at run time")
    outputs = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    if bias is not None and bias.size not in (1, outputs):
        raise task.refuse("its bias differs by row")
    scaled = weight if alpha == 1.0 else weight * np.float32(alpha)
    return scaled, None if bias is None else bias.reshape(-1) * np.float32(beta), None


def matmul(low: Lowering, task: Task) -> None:
    """MatMul with a constant right operand, or of two activations."""
    node = task.node
    left, right = node.inputs[0], node.inputs[1]
    a, b = low.shape(left), low.shape(right)
    constant_right = constant(right) is not None and len(b) == 2
    if not constant_right or (task.integer and task.plan.weight is None):
        _batch_matmul(low, task)
        return
    weight, _, kind = stored_weights(low, task)
    order = _row_order(low, left, len(a))
    tensor = low.read(left, order, integer=task.integer)
    target, bias = _bias_behind(low, task)
    _product(low, target, tensor, weight.T, bias, kind, order)


def _row_order(low: Lowering, value: ir.Value | None, rank: int) -> Order:
    """An order with the reduced axis last; the others keep their sequence."""
    known = low.orders(value) or [native(rank)]
    fitting = [order for order in known if order[-1] == rank - 1]
    return fitting[0] if fitting else axis_last(known[0], rank - 1)


def _bias_behind(low: Lowering, task: Task) -> tuple[Task, Array | None]:
    """Fold the Add of a constant row after a MatMul into its bias, which saves one rounding.

    Given: ``MatMul(x, w) -> Add(b)``, both int8 or both float. Result: the MatMul with a bias, with the
    output parameters of the Add.
    """
    add = only_consumer(task.node.outputs[0]) if task.plan.group.activation is None else None
    follower = low.tasks.get(add.name or "") if add is not None and add.op_type == "Add" else None
    if add is None or follower is None or follower.integer != task.integer:
        return task, None
    other = add.inputs[1] if add.inputs[0] is task.node.outputs[0] else add.inputs[0]
    array = constant(other)
    outputs = low.shape(task.node.outputs[0])[-1]
    if array is None or array.ndim == 0 or not array.shape[-1] == array.size == outputs:
        return task, None
    if len(low.shape(follower.output)) != len(low.shape(task.node.outputs[0])):
        return task, None
    low.skipped.add(follower.plan.group.name)
    low.joined.add(task.plan.group.name)
    joined = Task(task.node, task.plan, task.rounded, follower.output, follower.bounds, task.integer)
    return joined, array.reshape(-1)


def _product(
    low: Lowering, task: Task, x: int, matrix: Array, bias: Array | None, kind: Quant | None, order: Order
) -> None:
    """Rows of ``x`` times ``matrix`` ``[outputs, K]``, as a 1x1 convolution.

    Runtimes up to 2.14 have no FULLY_CONNECTED with per-channel scales; XNNPACK runs both with the same
    kernel. A vector, ``order`` of one axis, is one row.
    """
    outputs, inputs = matrix.shape
    shape = low.graph.tensors[x].shape
    rows = int(np.prod(shape[:-1])) if shape[:-1] else 1
    image = low.reshape(x, shape if len(shape) == 4 else (1, 1, rows, inputs))
    target = (*low.graph.tensors[image].shape[:3], outputs)
    operands = [
        image,
        weight_tensor(low, task, matrix.reshape(outputs, 1, 1, inputs), kind, 0),
        bias_tensor(low, task, bias, outputs, image, kind),
    ]
    low.write(
        task, "CONV_2D", operands, Output(order, target), fuses=True,
        options={"padding": Padding.VALID, "stride_h": 1, "stride_w": 1},
    )  # fmt: skip


def _batch_matmul(low: Lowering, task: Task) -> None:
    """MatMul of two activations; a transposed right operand is read without a TRANSPOSE."""
    left, right = task.node.inputs[0], task.node.inputs[1]
    a, b = low.shape(left), low.shape(right)
    rank = max(len(a), len(b))
    if min(len(a), len(b)) < 2:
        raise task.refuse("a matrix product with a vector of activations")
    tensors, flipped = [], []
    for value, own in ((left, a), (right, b)):
        order = native(len(own))
        swapped = (*order[:-2], order[-1], order[-2])
        known = low.orders(value)
        # Only the right operand: the delegate has no kernel for a transposed left one.
        flip = value is right and order not in known and swapped in known
        wide = tuple(range(rank - len(own)))
        chosen = swapped if flip else order
        chosen = (*wide, *(axis + len(wide) for axis in chosen))
        tensors.append(low.read(value, chosen, integer=task.integer))
        flipped.append(flip)
    low.write(
        task,
        "BATCH_MATMUL",
        tensors,
        Output(native(rank)),
        options={"adj_x": flipped[0], "adj_y": flipped[1]},
    )


def depthwise_affine(low: Lowering, task: Task, factor: Array, shift: Array) -> None:
    """``factor x + shift`` per channel, as an int8 depthwise 1x1 convolution."""
    source = low.read_image(task.node.inputs[0], integer=True)
    channels = factor.size
    scale = np.maximum(np.abs(factor) / 127, 1e-12).astype(np.float32)
    stored = np.rint(factor / scale).astype(np.int8).reshape(1, 1, 1, channels)
    kind = Quant(scale, np.zeros(channels, np.int64), 3)
    name = f"{task.node.name}_factor"
    bias = bias_tensor(low, task, shift.astype(np.float32), channels, source, kind)
    low.write(
        task,
        "DEPTHWISE_CONV_2D",
        [source, low.constant(stored, name, kind), bias],
        Output(channels_last(len(low.shape(task.output))), low.image_shape(task.output)),
        fuses=True,
        options={"padding": Padding.VALID, "stride_h": 1, "stride_w": 1, "depth_multiplier": 1},
    )


def average_by_convolution(low: Lowering, task: Task, view: Window) -> None:
    """AveragePool of an int8 image, padding counted as zeros, as a depthwise convolution."""
    source = low.read_image(task.node.inputs[0], integer=True)
    tensor, padding = padded(low, source, view)
    channels = low.graph.tensors[source].shape[3]
    height, width = view.size
    scale = np.full(channels, 1 / (height * width * 127), np.float32)
    kind = Quant(scale, np.zeros(channels, np.int64), 3)
    name = f"{task.node.name}_mean"
    weight = low.constant(np.full((1, height, width, channels), 127, np.int8), name, kind)
    low.write(
        task, "DEPTHWISE_CONV_2D", [tensor, weight, bias_tensor(low, task, None, channels, tensor, kind)],
        Output(channels_last(len(low.shape(task.output))), low.image_shape(task.output)),
        options={"depth_multiplier": 1, **options(view, padding)},
    )  # fmt: skip
