"""Arithmetic of affine and linear nodes, for the rules that fold one into the other.

An affine node is ``y = x * scale + shift`` with constants: Mul, Add, Sub, Div or BatchNormalization. A linear
node is a Conv, ConvTranspose, Gemm or a MatMul with constant weights. Arithmetic is in float64, rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.rule import float_array, int_attribute, is_op
from edgepack.ir.arrays import Array
from edgepack.ir.model import computed, constant, dims, new_initializer

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
AFFINE = ("Mul", "Add", "Sub", "Div", "BatchNormalization")


@dataclass(frozen=True, slots=True)
class Affine:
    """``x * scale + shift``; the arrays are float64 and broadcast against ``x``. ``None``: no operand."""

    x: ir.Value
    scale: Array | None
    shift: Array | None


def affine_of(node: ir.Node) -> Affine | None:
    """What an affine node computes; ``None`` if it is not affine, or an operand is not constant or finite."""
    if is_op(node, "BatchNormalization"):
        found = _batch_norm(node)
    elif is_op(node, "Mul", "Add", "Sub", "Div"):
        found = _binary(node)
    else:
        return None
    parts = [] if found is None else [p for p in (found.scale, found.shift) if p is not None]
    with np.errstate(over="ignore"):  # values that overflow float32 are refused below
        fits = all(np.isfinite(p.astype(np.float32)).all() for p in parts)
    return found if fits else None


def _binary(node: ir.Node) -> Affine | None:
    a, b = node.inputs
    swapped = constant(a) is not None
    x, c = (b, float_array(a)) if swapped else (a, float_array(b))
    if x is None or c is None or constant(x) is not None:
        return None
    match node.op_type:
        case "Add":
            return Affine(x, None, c)
        case "Mul":
            return Affine(x, c, None)
        case "Sub":
            return Affine(x, np.array(-1.0), c) if swapped else Affine(x, None, -c)
        case _:
            return None if swapped or not c.all() else Affine(x, 1.0 / c, None)


def _batch_norm(node: ir.Node) -> Affine | None:
    gamma, beta, mean, variance = (float_array(v) for v in node.inputs[1:5])
    x = node.inputs[0]
    trains = int_attribute(node, "training_mode", 0) or any(v.uses() for v in node.outputs[1:])
    if (
        x is None
        or x.shape is None
        or gamma is None
        or beta is None
        or mean is None
        or variance is None
        or trains
    ):
        return None
    epsilon = node.attributes.get("epsilon")
    scale = gamma / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
    shape = (-1,) + (1,) * (len(x.shape) - 2)
    return Affine(x, scale.reshape(shape), (beta - mean * scale).reshape(shape))


def per_channel(array: Array, rank: int | None, axis: int, channels: int) -> Array | None:
    """The ``channels`` numbers of an operand that varies only along ``axis`` (negative: from the end).

    ``None`` when it varies along another axis or would add dimensions or channels.
    """
    if array.ndim == 0:
        return np.full(channels, array)
    if rank is None and array.ndim > 1:
        return None
    if rank is not None and array.ndim > rank:
        return None
    from_end = axis if axis < 0 else axis - (rank or 0)
    if rank is None and axis >= 0:
        return None
    other = [n for i, n in enumerate(array.shape, start=-array.ndim) if i != from_end]
    if any(n != 1 for n in other):
        return None
    flat = array.reshape(-1)
    if flat.size not in (1, channels):
        return None
    return np.broadcast_to(flat, (channels,))


def output_channels(linear: ir.Node, weight: ir.TensorProtocol) -> tuple[int | None, int, int]:
    """Rank of the output if the operator fixes it, its channel axis, the number of channels."""
    shape = list(dims(weight))
    match linear.op_type:
        case "Conv":
            return len(shape), 1, shape[0]
        case "ConvTranspose":
            return len(shape), 1, shape[1] * int_attribute(linear, "group", 1)
        case "Gemm":
            return 2, 1, shape[0 if int_attribute(linear, "transB", 0) else 1]
        case _:
            return None, -1, shape[-1]


def scale_output(linear: ir.Node, scale: Array | None) -> Callable[[Array], Array] | None:
    """A function that multiplies the weights of each output channel by its scale."""
    if scale is None:
        return None
    if linear.op_type == "ConvTranspose":
        group = int_attribute(linear, "group", 1)

        def transposed(w: Array) -> Array:
            per_group = w.reshape(group, w.shape[0] // group, *w.shape[1:])
            by = scale.reshape(group, 1, -1, *(1 for _ in w.shape[2:]))
            return np.asarray((per_group * by).reshape(w.shape))

        return transposed
    if linear.op_type == "MatMul" or (linear.op_type == "Gemm" and not int_attribute(linear, "transB", 0)):
        return lambda w: np.asarray(w * scale)
    return lambda w: np.asarray(w * scale.reshape(-1, *(1 for _ in w.shape[1:])))


def bias_of(linear: ir.Node, channels: int) -> Array | None:
    """The bias in float64, one number per output channel (zeros when absent), Gemm's beta included."""
    value = linear.inputs[2] if len(linear.inputs) > 2 else None
    if value is None:
        return np.zeros(channels)
    bias = float_array(value)
    if bias is None:
        return None
    beta = linear.attributes.get("beta") if linear.op_type == "Gemm" else None
    flat = per_channel(bias, 2 if linear.op_type == "Gemm" else 1, -1, channels)
    return None if flat is None else flat * (1.0 if beta is None else beta.as_float())


def set_linear(
    main: ir.Graph,
    linear: ir.Node,
    weight: ir.TensorProtocol,
    change: Callable[[Array], Array] | None,
    bias: Array,
    scale: Array | None,
    shift: Array | None,
) -> None:
    """Give ``linear`` the new weights, and the bias ``bias * scale + shift``, as new constants."""
    old = linear.inputs[1]
    assert old is not None
    if change is not None:
        linear.replace_input_with(1, new_initializer(main, f"{old.name}_folded", computed(weight, change)))
    has_bias = len(linear.inputs) > 2 and linear.inputs[2] is not None
    if not has_bias and shift is None:
        return
    total = bias if scale is None else bias * scale
    total = total if shift is None else total + shift
    name = f"{linear.inputs[2].name}_folded" if has_bias else f"{old.name}_bias"  # type: ignore[union-attr]
    if len(linear.inputs) < 3:
        linear.resize_inputs(3)
    linear.replace_input_with(2, new_initializer(main, name, total.astype(weight.dtype.numpy())))
    if linear.op_type == "Gemm":
        linear.attributes.pop("beta", None)


def input_channels(linear: ir.Node, weight: ir.TensorProtocol) -> tuple[int, int, int | None]:
    """Channel axis of the data input, number of channels, rank if the operator fixes it."""
    shape = list(dims(weight))
    match linear.op_type:
        case "Conv":
            return 1, shape[1] * int_attribute(linear, "group", 1), len(shape)
        case "ConvTranspose":
            return 1, shape[0], len(shape)
        case "Gemm":
            return 1, shape[1 if int_attribute(linear, "transB", 0) else 0], 2
        case _:
            return -1, shape[-2], None


def scale_input(linear: ir.Node, scale: Array | None) -> Callable[[Array], Array] | None:
    """A function that multiplies the weights of each input channel by its scale."""
    if scale is None:
        return None
    if linear.op_type == "Conv":
        group = int_attribute(linear, "group", 1)

        def conv(w: Array) -> Array:
            per_group = w.reshape(group, w.shape[0] // group, *w.shape[1:])
            by = scale.reshape(group, 1, -1, *(1 for _ in w.shape[2:]))
            return np.asarray((per_group * by).reshape(w.shape))

        return conv
    if linear.op_type == "ConvTranspose":
        return lambda w: np.asarray(w * scale.reshape(-1, *(1 for _ in w.shape[1:])))
    if linear.op_type == "Gemm" and int_attribute(linear, "transB", 0):
        return lambda w: np.asarray(w * scale)
    return lambda w: np.asarray(w * scale[:, None])


def response(linear: ir.Node, weight: Array | None, shift: Array) -> Array:
    """The output of a Conv without padding, or of a Gemm, for an input that equals ``shift`` everywhere."""
    assert weight is not None
    w = weight.astype(np.float64)
    if linear.op_type == "Conv":
        group = int_attribute(linear, "group", 1)
        sums = w.reshape(group, w.shape[0] // group, w.shape[1], -1).sum(axis=3)
        return np.asarray(np.einsum("goi,gi->go", sums, shift.reshape(group, -1)).reshape(-1))
    alpha = linear.attributes.get("alpha")
    w = w if int_attribute(linear, "transB", 0) else w.T
    return np.asarray(w @ shift * (1.0 if alpha is None else alpha.as_float()))
