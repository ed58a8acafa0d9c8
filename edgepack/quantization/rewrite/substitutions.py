"""Kernel substitution: other operators for those whose integer kernel is slow in the runtime.

onnxruntime 1.32 computes an int8 AveragePool element by element: 230 µs for 3 x 3 over [1, 48, 44, 44] on one
core, where its depthwise convolution takes 25 and float with both conversions 50. Its Resize, channels-last
next to integer convolutions, takes 370 µs for [1, 64, 40, 40] to twice the size; Gather takes 36.
"""

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.graph.resampling import coordinates, nearest
from edgepack.ir.model import constant, name_of, only_consumer
from edgepack.ir.scheme import QuantParams, QuantType
from edgepack.quantization.rewrite.emit import Emitter

_LAST = (0, 2, 3, 1)
_FIRST = (0, 3, 1, 2)
_PLAIN_MODES = ("asymmetric", "half_pixel", "pytorch_half_pixel")
_BLUR = 1e-4
_FEW_BYTES = 256
"""A ConstantOfShape is smaller than an initializer of more bytes of ones."""


def has_substitute(node: ir.Node) -> bool:
    """Whether this node of operator AveragePool or Resize has a substitute that computes the same."""
    return _is_plain_average(node) if node.op_type == "AveragePool" else _is_plain_nearest(node)


def apply_substitution(emit: Emitter, node: ir.Node, sizes: tuple[int | None, ...]) -> None:
    """Replace ``node``, whose input has ``sizes``, by its substitute; Q/DQ around it exist already."""
    if node.op_type == "AveragePool":
        _average_by_convolution(emit, node, sizes[1])
    else:
        _nearest_by_gather(emit, node, sizes)


def sizes_of(value: ir.Value | None) -> tuple[int | None, ...]:
    """The dimensions of a value, ``None`` for dynamic ones; empty where the shape is unknown."""
    shape = () if value is None or value.shape is None else value.shape
    return tuple(d if isinstance(d, int) else None for d in shape)


def is_slow_average(node: ir.Node) -> bool:
    """Whether an int8 AveragePool is slow: it has several windows, and no substitute.

    Windows at a border average fewer elements, so one weight scale cannot compute them. Nine convolutions,
    one for each border and corner, and their Concat would be exact, but slower than float with both
    conversions. Float takes little more than half of the instructions on a Cortex-A53, and a third of the
    time on x86.
    """
    sizes = sizes_of(node.inputs[0])
    whole = len(sizes) == 4 and sizes[2:] == tuple(node.attributes.get_ints("kernel_shape"))
    return node.op_type == "AveragePool" and len(sizes) == 4 and not whole and not _is_plain_average(node)


def _is_plain_average(node: ir.Node) -> bool:
    sizes = sizes_of(node.inputs[0])
    if len(sizes) != 4 or sizes[1] is None:
        return False
    window = node.attributes.get_ints("kernel_shape")
    pads = node.attributes.get_ints("pads", ())
    border_counts = not any(pads) or bool(node.attributes.get_int("count_include_pad", 0))
    plain = (
        (not node.attributes.get_int("ceil_mode", 0) or _windows_fit(node, sizes))
        and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and set(node.attributes.get_ints("dilations", (1,))) == {1}
    )
    return plain and border_counts and sizes[2:] != tuple(window)  # one window: no gain


def _windows_fit(node: ir.Node, sizes: tuple[int | None, ...]) -> bool:
    """Whether the last window ends at the end of the input, so that ceil_mode changes nothing."""
    window = node.attributes.get_ints("kernel_shape")
    pads = node.attributes.get_ints("pads", (0,) * 4)
    strides = node.attributes.get_ints("strides", (1, 1))
    return all(
        size is not None and (size + pads[axis] + pads[axis + 2] - window[axis]) % strides[axis] == 0
        for axis, size in enumerate(sizes[2:])
    )


def _average_by_convolution(emit: Emitter, node: ir.Node, channels: int | None) -> None:
    """An AveragePool as a depthwise convolution of ones, whose scale is one over the window size.

    Given: ``DQ -> AveragePool(3 x 3) -> Q``. Result: ``DQ -> Conv(ones, scale 1/9, group C) -> Q``.
    """
    assert channels is not None
    window = list(node.attributes.get_ints("kernel_shape"))
    params = QuantParams(
        QuantType.INT8, np.asarray(1 / np.prod(window), np.float32), np.zeros((), np.int8), axis=None
    )
    weight = _ones(emit, node, (channels, 1, *window), params)
    kept = [a for name, a in node.attributes.items() if name in ("kernel_shape", "strides", "pads")]
    kept.append(ir.AttrInt64("group", channels))
    convolution = emit.node("Conv", [node.inputs[0], weight], name_of(node.outputs[0]), attributes=kept)
    convolution.name = node.name
    emit.replace(node, [convolution], convolution.outputs[0])


def _ones(emit: Emitter, node: ir.Node, shape: tuple[int, ...], params: QuantParams) -> ir.Value:
    """A weight of ones; a large one is a ConstantOfShape that the runtime folds when it loads the file."""
    base = f"{name_of(node.outputs[0])}_ones"
    if math.prod(shape) <= _FEW_BYTES:
        return emit.dequantized(node, base, np.ones(shape, np.int8), params)
    filling = ir.AttrTensor("value", ir.tensor(np.ones(1, np.int8)))
    sizes = emit.initializer(f"{base}_shape", np.asarray(shape, np.int64))
    filled = emit.node("ConstantOfShape", [sizes], f"{base}_q", attributes=[filling])
    restore = emit.restore(filled.outputs[0], params, base)
    emit.graph.insert_before(node, [filled, restore])
    return restore.outputs[0]


def _is_plain_nearest(node: ir.Node) -> bool:
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    return (
        len(before) == len(after) == 4
        and None not in (*before[2:], *after[2:])
        and node.attributes.get_string("mode", "nearest") == "nearest"
        and node.attributes.get_string("keep_aspect_ratio_policy", "stretch") == "stretch"
        and node.attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        and all(_scale(node, a) == 1 or (before[a] is not None and before[a] == after[a]) for a in (0, 1))
        and all(sources(node, a, before[a], after[a]) is not None for a in (2, 3))
    )


def _scale(node: ir.Node, axis: int) -> float | None:
    """The factor that the node gives for an axis; ``None`` where it gives a size."""
    listed = [a % 4 for a in node.attributes.get_ints("axes", range(4))]
    if axis not in listed:
        return 1.0
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if scales is None or not scales.size else float(scales[listed.index(axis)])


def _nearest_by_gather(emit: Emitter, node: ir.Node, before: tuple[int | None, ...]) -> None:
    """Gather rows and columns of the quantized tensor, channels-last: the runtime removes both transposes.

    Given: ``q -> DQ -> Resize(nearest) -> Q -> DQ``.
    Result: ``q -> Transpose -> Gather(columns) -> Gather(rows) -> Transpose -> DQ``.
    """
    x, y = node.inputs[0], node.outputs[0]
    restore, store = None if x is None else x.producer(), only_consumer(y)
    assert restore is not None
    assert store is not None
    base, after = name_of(y), sizes_of(y)
    to_last = [ir.AttrInt64s("perm", _LAST)]
    made = [emit.node("Transpose", [restore.inputs[0]], f"{base}_last", attributes=to_last)]
    for axis in (3, 2):
        picked = sources(node, axis, before[axis], after[axis])
        assert picked is not None
        places = emit.initializer(f"{base}_from", picked)
        along = [ir.AttrInt64("axis", axis - 1)]
        made.append(emit.node("Gather", [made[-1].outputs[0], places], f"{base}_of", attributes=along))
    to_first = [ir.AttrInt64s("perm", _FIRST)]
    made.append(emit.node("Transpose", [made[-1].outputs[0]], f"{base}_first", attributes=to_first))
    made[-1].name = node.name
    emit.graph.insert_before(node, made)
    store.outputs[0].replace_all_uses_with(made[-1].outputs[0])
    emit.graph.remove([store, node], safe=True)


def sources(node: ir.Node, axis: int, size: int | None, out: int | None) -> npt.NDArray[np.int32] | None:
    """The input index of each output index along an axis; ``None`` where it depends on float rounding.

    The runtime computes coordinates in float32. Where one lies between two indices, and the scale is no power
    of two, it may take either.
    """
    assert size is not None
    assert out is not None
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    scale = _scale(node, axis) or out / size
    where = coordinates(mode, size, out, scale)
    picked = nearest(where, rounding, size)
    exact = math.frexp(scale)[0] == 0.5 and mode in _PLAIN_MODES
    around = [nearest(where + shift, rounding, size) for shift in (-_BLUR, _BLUR)]
    if not exact and not all(np.array_equal(picked, other) for other in around):
        return None
    return picked.astype(np.int32)
