"""Rules that fold constant multiplications and additions into the weights beside them.

An affine node is ``y = x * scale + shift`` with constants: Mul, Add, Sub, Div or BatchNormalization. A linear
node is a Conv, ConvTranspose, Gemm or a MatMul with constant weights. Arithmetic is in float64, rounded once.

What LayerNorm and GELU are written with is left alone: the runtime fuses those patterns as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.model import (
    Array,
    computed,
    constant,
    constant_tensor,
    dims,
    name_of,
    new_initializer,
    only_consumer,
)
from edgepack.rules import (
    DONE,
    Outcome,
    Rule,
    bypass,
    float_array,
    int_attribute,
    ints_attribute,
    is_op,
    producer,
    remove,
    substitute,
)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
AFFINE = ("Mul", "Add", "Sub", "Div", "BatchNormalization")
_RUNTIME_FUSES = frozenset({"Erf", "Tanh", "Sqrt"})
_ELEMENTWISE = frozenset({"Mul", "Add", "Sub", "Div", "Erf", "Sqrt", "Pow", "Reciprocal", "Tanh"})


@dataclass(frozen=True, slots=True)
class Affine:
    """``x * scale + shift``; the arrays are float64 and broadcast against ``x``. ``None``: no such part."""

    x: ir.Value
    scale: Array | None
    shift: Array | None


def affine_of(node: ir.Node) -> Affine | None:
    """What an affine node computes, or ``None`` if it is none (an operand is not constant, or not finite)."""
    if is_op(node, "BatchNormalization"):
        found = _batch_norm(node)
    elif is_op(node, "Mul", "Add", "Sub", "Div"):
        found = _binary(node)
    else:
        return None
    parts = [] if found is None else [p for p in (found.scale, found.shift) if p is not None]
    with np.errstate(over="ignore"):  # what does not fit into float32 is what is looked for
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
    """The ``channels`` numbers of an operand that varies along ``axis`` (negative: from the end) only.

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


# ---------------------------------------------------------------------------------------------------------
# After a linear node


def fold_after(main: ir.Graph, node: ir.Node) -> Outcome:
    """Fold an affine node into the linear node before it.

    Given::  y = Conv(x, W, b) * s + t          also BatchNormalization; ConvTranspose, Gemm, MatMul (+ Add)
    Result:: y = Conv(x, W * s, b * s + t)      one s and t per output channel
    """
    affine = affine_of(node)
    if affine is None:
        return None
    linear, add = _linear_before(affine.x)
    if linear is None or (weight := constant_tensor(linear.inputs[1])) is None or len(weight.shape) < 2:
        return None
    if any(only_consumer(v) is None for v in ([affine.x] if add is None else [affine.x, linear.outputs[0]])):
        return f"the {linear.op_type} before it has other users"
    if linear.op_type == "MatMul" and add is None and affine.scale is None:
        return None  # the bias of a MatMul is an Add: nothing to gain
    rank, axis, channels = _output_channels(linear, weight)
    if affine.x.shape is not None:
        rank = len(affine.x.shape)
    scale, shift = (
        None if p is None else per_channel(p, rank, axis, channels) for p in (affine.scale, affine.shift)
    )
    if (affine.scale is not None and scale is None) or (affine.shift is not None and shift is None):
        return f"its constant is not one number per output channel of the {linear.op_type}"
    if linear.op_type == "MatMul":
        return _fold_after_matmul(main, node, linear, add, scale, shift)
    bias = _bias(linear, channels)
    if bias is None:
        return f"the bias of the {linear.op_type} is not one constant per output channel"
    _set_linear(main, linear, weight, _scale_output(linear, scale), bias, scale, shift)
    return _take_place(node, linear)


def _take_place(node: ir.Node, linear: ir.Node) -> Outcome:
    """``linear`` now computes what ``node`` did, under its name."""
    old, new = node.outputs[0], linear.outputs[0]
    name = old.name
    if not bypass(old, new):
        raise AssertionError(f"{linear.op_type} cannot take the place of graph output {name!r}")
    old.name, new.name = f"{name}_before", name
    remove(node)
    return DONE


def _linear_before(value: ir.Value) -> tuple[ir.Node | None, ir.Node | None]:
    """The linear node that computes ``value``, and the Add of a bias between the two if it is a MatMul."""
    linear = producer(value, *LINEAR)
    if linear is not None:
        return linear, None
    add = producer(value, "Add")
    if add is None:
        return None, None
    for y, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
        matmul = producer(y, "MatMul")
        if matmul is not None and float_array(bias) is not None:
            return matmul, add
    return None, None


def _output_channels(linear: ir.Node, weight: ir.TensorProtocol) -> tuple[int | None, int, int]:
    """Rank of the output where the operator fixes it, its channel axis, the number of channels."""
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


def _scale_output(linear: ir.Node, scale: Array | None) -> Callable[[Array], Array] | None:
    """Multiply the weights of each output channel by its scale."""
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


def _bias(linear: ir.Node, channels: int) -> Array | None:
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


def _set_linear(  # noqa: PLR0917
    main: ir.Graph,
    linear: ir.Node,
    weight: ir.TensorProtocol,
    change: Callable[[Array], Array] | None,
    bias: Array,
    scale: Array | None,
    shift: Array | None,
) -> None:
    """Give ``linear`` changed weights and the bias ``bias * scale + shift``, as new constants."""
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


def _fold_after_matmul(  # noqa: PLR0917
    main: ir.Graph,
    node: ir.Node,
    matmul: ir.Node,
    add: ir.Node | None,
    scale: Array | None,
    shift: Array | None,
) -> Outcome:
    """Scale the weights of a MatMul; its bias stays an Add of its own."""
    value = matmul.inputs[1]
    weight = constant_tensor(value)
    assert value is not None and weight is not None
    total = np.zeros(1)
    if add is not None:
        at = 0 if constant(add.inputs[0]) is not None else 1
        raw, shape = float_array(add.inputs[at]), add.outputs[0].shape
        bias = (
            None
            if raw is None
            else per_channel(raw, None if shape is None else len(shape), -1, dims(weight)[-1])
        )
        if bias is None:
            return "the bias of the MatMul is not one number per output channel"
        total = bias
    if scale is not None:
        change = _scale_output(matmul, scale)
        assert change is not None
        total = total * scale
        matmul.replace_input_with(1, new_initializer(main, f"{value.name}_folded", computed(weight, change)))
    if add is None and shift is None:
        return _take_place(node, matmul)
    total = total if shift is None else total + shift
    name = f"{name_of(node.outputs[0])}_bias"
    new_bias = new_initializer(main, name, total.astype(weight.dtype.numpy()))
    if add is None:
        substitute(node, "Add", [matmul.outputs[0], new_bias])
        return DONE
    add.replace_input_with(at, new_bias)
    return _take_place(node, add)


# ---------------------------------------------------------------------------------------------------------
# Before a linear node


def fold_before(main: ir.Graph, node: ir.Node) -> Outcome:
    """Fold an affine node into the linear node after it.

    Given::  y = Conv(x * s + t, W, b)          a number per input channel; also ConvTranspose, Gemm...
    Result:: y = Conv(x, W * s, b + sum(W * t))

    A shift cannot pass zero padding, whose zeros it does not shift, nor a MatMul, which has no bias; then
    ``x * s + t`` becomes ``x + t / s``, where s has no zeros.
    """
    source = node.inputs[0]
    affine_node = producer(source, *AFFINE)
    if affine_node is None or source is None or (weight := constant_tensor(node.inputs[1])) is None:
        return None
    affine = affine_of(affine_node)
    if (
        affine is None
        or len(weight.shape) < 2
        or (node.op_type == "Gemm" and int_attribute(node, "transA", 0))
    ):
        return None
    if _part_of_runtime_fusion(affine.x):
        return "the runtime fuses it with the LayerNorm or GELU before"
    if only_consumer(source) is not node:
        return f"the {affine_node.op_type} has other users"
    if _linear_before(affine.x)[0] is not None:
        return None  # goes into the one before
    axis, channels, rank = _input_channels(node, weight)
    parts = [_input_part(affine.x, p, rank, axis, channels) for p in (affine.scale, affine.shift)]
    if any(
        p is None and whole is not None for p, whole in zip(parts, (affine.scale, affine.shift), strict=True)
    ):
        return f"its constant is not one number per input channel of the {node.op_type}, of a known number"
    scale, shift = parts
    if shift is not None and (reason := _no_shift(node)):
        return _scale_alone(main, node, affine, weight, reason)
    bias = _bias(node, _output_channels(node, weight)[2]) if node.op_type != "MatMul" else np.zeros(1)
    if bias is None:
        return f"the bias of the {node.op_type} is not one constant per output channel"
    extra = None if shift is None else _response(node, constant(node.inputs[1]), shift)
    _set_linear(main, node, weight, _scale_input(node, scale), bias, None, extra)
    node.replace_input_with(0, affine.x)
    return DONE


def _part_of_runtime_fusion(value: ir.Value) -> bool:
    """Whether Erf, Tanh or Sqrt is among the few elementwise nodes before: a GELU, a LayerNorm."""
    front: list[ir.Value | None] = [value]
    for _ in range(6):
        nodes = [n for v in front if (n := producer(v, *_ELEMENTWISE)) is not None]
        if any(n.op_type in _RUNTIME_FUSES for n in nodes):
            return True
        front = [v for n in nodes for v in n.inputs]
    return False


def _input_channels(linear: ir.Node, weight: ir.TensorProtocol) -> tuple[int, int, int | None]:
    """Channel axis of the data input, number of channels, rank where the operator fixes it."""
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


def _input_part(x: ir.Value, part: Array | None, rank: int | None, axis: int, channels: int) -> Array | None:
    """One number per input channel, if the operand does not broadcast ``x`` to a larger shape."""
    if part is None:
        return None
    if part.ndim > 0:
        if x.shape is None or (rank is not None and len(x.shape) != rank):
            return None
        rank = len(x.shape)
        if part.size > 1 and x.shape[axis] != channels:
            return None
    return per_channel(part, rank, axis, channels)


def _no_shift(linear: ir.Node) -> str:
    """Why a shift of the input is not a shift of the output, or nothing."""
    if linear.op_type in ("MatMul", "ConvTranspose"):
        return f"a shift cannot pass a {linear.op_type}"
    auto_pad = linear.attributes.get("auto_pad")
    pads = any(ints_attribute(linear, "pads")) or (
        auto_pad is not None and auto_pad.as_string() not in ("NOTSET", "VALID")
    )
    return "a shift cannot pass the zero padding of the Conv" if pads else ""


def _scale_alone(
    main: ir.Graph, node: ir.Node, affine: Affine, weight: ir.TensorProtocol, reason: str
) -> Outcome:
    """Fold the scale of ``x * scale`` past the shift that has to stay (see :func:`fold_before`)."""
    source = node.inputs[0]
    assert source is not None and affine.shift is not None
    add = source.producer()
    mul = producer(affine.x, "Mul")
    inner = None if mul is None else affine_of(mul)
    if not is_op(add, "Add", "Sub") or inner is None or inner.scale is None or affine.scale is not None:
        return reason
    if only_consumer(affine.x) is not add or not inner.scale.all():
        return reason
    axis, channels, rank = _input_channels(node, weight)
    scale = _input_part(inner.x, inner.scale, rank, axis, channels)
    shift = affine.shift / inner.scale
    if scale is None or inner.x.shape is None or shift.ndim > len(inner.x.shape):
        return reason
    bound = np.abs(shift).max() > 64 * max(1.0, np.abs(affine.shift).max())
    if bound or _part_of_runtime_fusion(inner.x):
        return reason  # a tiny scale would blow the shift up and lose x in it
    new_shift = new_initializer(main, f"{source.name}_shift", shift.astype(weight.dtype.numpy()))
    assert add is not None
    substitute(add, "Add", [inner.x, new_shift])
    change = _scale_input(node, scale)
    old = node.inputs[1]
    assert change is not None and old is not None
    node.replace_input_with(1, new_initializer(main, f"{old.name}_folded", computed(weight, change)))
    return DONE


def _scale_input(linear: ir.Node, scale: Array | None) -> Callable[[Array], Array] | None:
    """Multiply the weights of each input channel by its scale."""
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


def _response(linear: ir.Node, weight: Array | None, shift: Array) -> Array:
    """What a Conv without padding or a Gemm answers to an input that is ``shift`` everywhere."""
    assert weight is not None
    w = weight.astype(np.float64)
    if linear.op_type == "Conv":
        group = int_attribute(linear, "group", 1)
        sums = w.reshape(group, w.shape[0] // group, w.shape[1], -1).sum(axis=3)
        return np.asarray(np.einsum("goi,gi->go", sums, shift.reshape(group, -1)).reshape(-1))
    alpha = linear.attributes.get("alpha")
    w = w if int_attribute(linear, "transB", 0) else w.T
    return np.asarray(w @ shift * (1.0 if alpha is None else alpha.as_float()))


# ---------------------------------------------------------------------------------------------------------
# Affine nodes among themselves


def div_to_mul(main: ir.Graph, node: ir.Node) -> Outcome:
    """Multiply instead of dividing by a constant.

    Given::  y = Div(x, c)
    Result:: y = Mul(x, 1 / c)          not before Erf: the runtime knows GELU by its division
    """
    affine = affine_of(node)
    if affine is None or affine.scale is None:
        return None
    if any(is_op(user, "Erf") for user in node.outputs[0].consumers()):
        return "the runtime fuses it with the GELU after"
    original = constant(node.inputs[1])
    assert original is not None
    inverse = affine.scale.astype(original.dtype)
    if not (np.abs(inverse) >= np.finfo(original.dtype).tiny).all():
        return "the reciprocal is too small for the type"
    value = new_initializer(main, f"{name_of(node.inputs[1])}_inverse", inverse)  # type: ignore[arg-type]
    substitute(node, "Mul", [affine.x, value])
    return DONE


def merge_affine(main: ir.Graph, node: ir.Node) -> Outcome:
    """One multiplication for two, one addition for two.

    Given::  y = (x * a) * b        or (x + a) + b, constants
    Result:: y = x * (a * b)        or x + (a + b)
    """
    outer = affine_of(node)
    before = None if outer is None else producer(outer.x, "Mul", "Add", "Sub")
    inner = None if before is None else affine_of(before)
    if outer is None or before is None or inner is None or only_consumer(outer.x) is not node:
        return None
    if outer.shift is None and inner.shift is None:
        assert outer.scale is not None and inner.scale is not None
        op, merged = "Mul", outer.scale * inner.scale
    elif outer.scale is None and inner.scale is None:
        assert outer.shift is not None and inner.shift is not None
        op, merged = "Add", outer.shift + inner.shift
    else:
        return None
    if _part_of_runtime_fusion(inner.x):
        return "the runtime fuses it with the LayerNorm or GELU before"
    if merged.size > max(_constant_size(outer), _constant_size(inner)):
        return "the merged constant would be larger than both"
    dtype = next(a.dtype for v in node.inputs if (a := constant(v)) is not None)
    value = new_initializer(main, f"{name_of(node.outputs[0])}_{op.lower()}", merged.astype(dtype))
    substitute(node, op, [inner.x, value])
    return DONE


def _constant_size(affine: Affine) -> int:
    """Elements of the constant of an affine node with one constant."""
    return max(p.size for p in (affine.scale, affine.shift) if p is not None)


def matmul_add_to_gemm(main: ir.Graph, node: ir.Node) -> Outcome:
    """A Gemm where there is a matrix and a bias.

    Given::  y = MatMul(x, W) + b       x and W of rank 2, b one number per column
    Result:: y = Gemm(x, W, b)
    """
    matmul, add = _linear_before(node.outputs[0])
    if add is not node or matmul is None or only_consumer(matmul.outputs[0]) is not node:
        return None
    x, w = matmul.inputs
    bias = node.inputs[0] if constant(node.inputs[0]) is not None else node.inputs[1]
    weight, b = constant_tensor(w), constant_tensor(bias)
    if x is None or x.shape is None or weight is None or b is None or len(weight.shape) != 2:
        return None
    if len(x.shape) != 2:
        return None
    if tuple(b.shape) not in ((weight.shape[1],), (1, weight.shape[1]), (1,), ()):
        return "the bias is not one number per column"
    substitute(node, "Gemm", [x, w, bias])
    return DONE


FOLDING: tuple[Rule, ...] = (
    Rule("div_to_mul", frozenset({"Div"}), div_to_mul),
    Rule("merge_affine", frozenset({"Mul", "Add", "Sub"}), merge_affine),
    Rule("fold_after", frozenset(AFFINE), fold_after),
    Rule("fold_before", frozenset(LINEAR), fold_before),
)
GEMM: tuple[Rule, ...] = (Rule("matmul_add_to_gemm", frozenset({"Add"}), matmul_add_to_gemm),)
