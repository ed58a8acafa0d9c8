"""Pooling over windows and whole images, and Resize."""

import numpy as np
import numpy.typing as npt

from edgepack.export.tflite.flatbuffer import Quant
from edgepack.export.tflite.layout import Shape, channels_last
from edgepack.export.tflite.linear import average_by_convolution
from edgepack.export.tflite.lowering import QMIN, Lowering
from edgepack.export.tflite.schema import Padding
from edgepack.export.tflite.tasks import FLOAT, Output, Task, dtype_of
from edgepack.export.tflite.window import Pair, Window, options, pad_image, repeat_border, window
from edgepack.graph.resampling import coordinates, nearest
from edgepack.ir.model import constant, name_of

MOST_COPIES = 4
"""Most inputs of a CONCATENATION that XNNPACK delegates."""


def _filter(view: Window) -> dict[str, float]:
    return {"filter_height": view.size[0], "filter_width": view.size[1]}


def max_pool(low: Lowering, task: Task) -> None:
    """MaxPool; padding is the lowest value of the type."""
    node = task.node
    size = tuple(node.attributes.get_ints("kernel_shape", []))
    if len(size) > 2:
        raise task.refuse(f"it has {len(size)} spatial axes, there are kernels for one and two")
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise task.refuse("its output Indices is used")
    view = window(low, node, size)
    if view.dilations != (1, 1):
        raise task.refuse("there is no kernel for a dilated pool")
    integer = task.integer or low.is_integer(node.inputs[0])
    tensor = low.read_image(node.inputs[0], integer=integer)
    kind = low.graph.tensors[tensor].quant or dtype_of(task.output)
    padding = Padding.SAME if view.is_same and view.needs_padding else Padding.VALID
    if view.needs_padding and padding is Padding.VALID:
        # After a ReLU no value is below zero, so zero pads as the lowest value does.
        lowest = isinstance(kind, Quant) and int(kind.zero_point[0]) == QMIN
        if lowest:
            tensor = pad_image(low, tensor, view.before, view.after)
        else:
            # A window that reaches beyond the border contains it, so repeating the border is exact.
            tensor = repeat_border(low, tensor, [(0, 0), *zip(view.before, view.after, strict=True), (0, 0)])
    result = low.emit(
        "MAX_POOL_2D", [tensor], low.image_shape(task.output), kind, name_of(task.output),
        **options(view, padding), **_filter(view),
    )  # fmt: skip
    low.put(task.output, result, channels_last(len(size) + 2))


def average_pool(low: Lowering, task: Task) -> None:
    """AveragePool, with exact treatment of padding.

    int8, where each window counts all of its entries: a depthwise convolution with equal weights, which
    XNNPACK delegates, unlike the int8 pool. Else float: SAME of TFLite excludes padding from the average, as
    ONNX does by default, and other averages are corrected.
    """
    node = task.node
    size = tuple(node.attributes.get_ints("kernel_shape", []))
    if len(size) > 2:
        raise task.refuse(f"it has {len(size)} spatial axes, there are kernels for one and two")
    view = window(low, node, size)
    if view.dilations != (1, 1):
        raise task.refuse("there is no kernel for a dilated pool")
    counted = bool(node.attributes.get_int("count_include_pad", 0))
    factors = _factors(view, _declared(task, view) if counted else ((0, 0), (0, 0)))
    whole = bool(np.all(factors == 1))
    if task.integer and whole:
        average_by_convolution(low, task, view)
        return
    if task.integer:
        low.islands[task.plan.group.name] = "its padding does not count in the average"
    tensor = low.read_image(node.inputs[0], integer=False)
    left_out = view.is_same and np.array_equal(factors, _factors(view, ((0, 0), (0, 0))))
    padding = Padding.SAME if left_out else Padding.VALID
    if view.needs_padding and not left_out:
        tensor = pad_image(low, tensor, view.before, view.after)
    shape, name = low.image_shape(task.output), name_of(task.output)
    result = low.emit(
        "AVERAGE_POOL_2D", [tensor], shape, FLOAT, name, **options(view, padding), **_filter(view)
    )
    if not left_out and not whole:
        right = low.constant(factors[None, :, :, None].astype(np.float32), "counts")
        result = low.emit("MUL", [result, right], shape, FLOAT, name)
    low.put(task.output, result, channels_last(len(size) + 2))


def _declared(task: Task, view: Window) -> tuple[Pair, Pair]:
    """The padding that counts: that of ``pads``, without that of ceil_mode."""
    axes = len(task.node.attributes.get_ints("kernel_shape", []))
    pads = task.node.attributes.get_ints("pads", [0] * (2 * axes))
    if task.node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return view.before, view.after
    before, after = pads[:axes], pads[axes:]
    return ((before[0], before[1]), (after[0], after[1])) if axes == 2 else ((0, before[0]), (0, after[0]))


def _factors(view: Window, counted: tuple[Pair, Pair]) -> npt.NDArray[np.float64]:
    """Window size over the number of counted entries, ``[height, width]`` of the output."""
    sides = []
    for axis in (0, 1):
        start = np.arange(view.outputs[axis]) * view.strides[axis] - view.before[axis]
        first = -counted[0][axis]
        last = view.inputs[axis] + counted[1][axis]
        count = np.minimum(start + view.size[axis], last) - np.maximum(start, first)
        sides.append(view.size[axis] / np.maximum(count, 1))
    return np.asarray(np.outer(*sides), np.float64)


def global_pool(low: Lowering, task: Task) -> None:
    """GlobalAveragePool as MEAN, GlobalMaxPool as MAX_POOL_2D over the whole image."""
    rank = len(low.shape(task.output))
    if rank not in (3, 4):
        raise task.refuse(f"it has {rank - 2} spatial axes, there are kernels for one and two")
    shape = low.image_shape(task.output)
    if task.node.op_type == "GlobalAveragePool":
        source = low.read_image(task.node.inputs[0], integer=task.integer)
        axes = low.numbers([1, 2])
        low.write(
            task, "MEAN", [source, axes], Output(channels_last(rank), shape), options={"keep_dims": True}
        )
        return
    integer = task.integer or low.is_integer(task.node.inputs[0])
    source = low.read_image(task.node.inputs[0], integer=integer)
    _, height, width, _ = low.graph.tensors[source].shape
    kind = low.graph.tensors[source].quant or FLOAT
    result = low.emit(
        "MAX_POOL_2D", [source], shape, kind, name_of(task.output), padding=Padding.VALID,
        stride_h=1, stride_w=1, filter_height=height, filter_width=width,
    )  # fmt: skip
    low.put(task.output, result, channels_last(rank))


def resize(low: Lowering, task: Task) -> None:
    """Resize of height and width: nearest, exactly as ONNX, or bilinear."""
    node = task.node
    attributes = node.attributes
    before, after = low.shape(node.inputs[0]), low.shape(task.output)
    if len(before) not in (3, 4) or before[:2] != after[:2]:
        raise task.refuse("it changes axes other than height and width")
    mode = attributes.get_string("mode", "nearest")
    if mode == "cubic" or attributes.get_int("antialias", 0) != 0:
        raise task.refuse("there is no kernel for cubic or antialiased interpolation")
    transformation = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if transformation == "tf_crop_and_resize":
        raise task.refuse("there is no kernel for tf_crop_and_resize")
    integer = task.integer or (mode == "nearest" and low.is_integer(node.inputs[0]))
    source = low.read_image(node.inputs[0], integer=integer)
    kind = low.graph.tensors[source].quant or dtype_of(task.output)
    places = [
        coordinates(transformation, before[a], after[a], _scale(task, a, before, after))
        for a in range(2, len(before))
    ]
    sides = [np.zeros(1), *places] if len(places) == 1 else places
    result = (
        _nearest(low, task, source, sides, kind)
        if mode == "nearest"
        else _linear(low, task, source, sides, kind)
    )
    low.put(task.output, result, channels_last(len(before)))


def _scale(task: Task, axis: int, before: Shape, after: Shape) -> float:
    """The scale of an axis: as given, or from the sizes."""
    scales = constant(task.node.inputs[2]) if len(task.node.inputs) > 2 else None
    if scales is None or scales.size == 0:
        return after[axis] / before[axis]
    listed = list(task.node.attributes.get_ints("axes", range(len(before))))
    return float(scales[listed.index(axis)]) if axis in listed else 1.0


def _nearest(
    low: Lowering,
    task: Task,
    source: int,
    sides: list[npt.NDArray[np.float64]],
    kind: "Quant | np.dtype[np.generic]",
) -> int:
    """Copies for a small integer factor, else a GATHER of rows and columns."""
    rounding = task.node.attributes.get_string("nearest_mode", "round_prefer_floor")
    tensor = source
    for axis, side in ((2, sides[1]), (1, sides[0])):
        shape = low.graph.tensors[tensor].shape
        index = nearest(side, rounding, shape[axis]).astype(np.int32)
        times = len(index) // shape[axis]
        target = (*shape[:axis], len(index), *shape[axis + 1 :])
        if np.array_equal(index, np.arange(shape[axis])):
            continue
        if times * shape[axis] == len(index) and np.array_equal(
            index, np.repeat(np.arange(shape[axis]), times)
        ):
            tensor = _repeated(low, tensor, axis, times, kind)
        else:
            places = low.numbers(index)
            tensor = low.emit("GATHER", [tensor, places], target, kind, name_of(task.output), axis=axis)
    return tensor


def _repeated(low: Lowering, tensor: int, axis: int, times: int, kind: "Quant | np.dtype[np.generic]") -> int:
    """Each entry of an axis repeated: the tensor concatenated with itself on the next axis, then reshaped.

    Given: ``[N, H, W, C]`` and axis 2. Result: ``CONCATENATION -> [N, H, W, 2 C] -> [N, H, 2 W, C]``.
    """
    source = low.graph.tensors[tensor]
    inner = int(np.prod(source.shape[axis + 1 :]))
    flat = low.reshape(tensor, (1, int(np.prod(source.shape[:axis])), source.shape[axis], inner))
    outer = low.graph.tensors[flat].shape
    while times > 1:
        step = next((n for n in range(min(times, MOST_COPIES), 1, -1) if times % n == 0), times)
        shape = (*outer[:3], low.graph.tensors[flat].shape[3] * step)
        flat = low.emit("CONCATENATION", [flat] * step, shape, kind, source.name, axis=3)
        times //= step
    total = int(np.prod(low.graph.tensors[flat].shape)) // (inner * int(np.prod(source.shape[:axis])))
    return low.reshape(flat, (*source.shape[:axis], total, *source.shape[axis + 1 :]))


def _linear(
    low: Lowering,
    task: Task,
    source: int,
    sides: list[npt.NDArray[np.float64]],
    kind: "Quant | np.dtype[np.generic]",
) -> int:
    """RESIZE_BILINEAR, with the coordinate transformation of the node."""
    shape = low.image_shape(task.output)
    lengths = low.graph.tensors[source].shape[1:3]
    for align, half in ((False, True), (True, False), (False, False)):
        if all(
            np.allclose(
                np.clip(side, 0, length - 1),
                np.clip(_tflite_places(length, len(side), align, half), 0, length - 1),
                atol=1e-4,
            )
            for side, length in zip(sides, lengths, strict=True)
        ):
            sizes = low.numbers(shape[1:3])
            return low.emit(
                "RESIZE_BILINEAR", [source, sizes], shape, kind, name_of(task.output),
                align_corners=align, half_pixel_centers=half,
            )  # fmt: skip
    raise task.refuse("there is no kernel with its coordinate transformation")


def _tflite_places(length: int, outputs: int, align: bool, half: bool) -> npt.NDArray[np.float64]:
    scale = (length - 1) / (outputs - 1) if align and outputs > 1 else length / outputs
    x = np.arange(outputs, dtype=np.float64)
    return np.asarray((x + 0.5) * scale - 0.5 if half else x * scale, np.float64)
