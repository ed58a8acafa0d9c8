"""Rules that fold constant multiplications and additions into adjacent weights.

The decomposed LayerNorm and GELU patterns are not rewritten: the runtime fuses them as a whole.
"""

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.linear import (
    AFFINE,
    LINEAR,
    Affine,
    affine_of,
    bias_of,
    input_channels,
    output_channels,
    per_channel,
    response,
    scale_input,
    scale_output,
    set_linear,
)
from edgepack.graph.rules.rule import (
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
from edgepack.ir.arrays import Array
from edgepack.ir.model import (
    computed,
    constant,
    constant_tensor,
    dims,
    name_of,
    new_initializer,
    only_consumer,
)

_RUNTIME_FUSES = frozenset({"Erf", "Tanh", "Sqrt"})
_ELEMENTWISE = frozenset({"Mul", "Add", "Sub", "Div", "Erf", "Sqrt", "Pow", "Reciprocal", "Tanh"})


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
        return None  # the bias of a MatMul stays an Add: nothing to gain
    rank, axis, channels = output_channels(linear, weight)
    if affine.x.shape is not None:
        rank = len(affine.x.shape)
    scale, shift = (
        None if p is None else per_channel(p, rank, axis, channels) for p in (affine.scale, affine.shift)
    )
    if (affine.scale is not None and scale is None) or (affine.shift is not None and shift is None):
        return f"its constant is not one number per output channel of the {linear.op_type}"
    if linear.op_type == "MatMul":
        return _fold_after_matmul(main, node, linear, add, scale, shift)
    bias = bias_of(linear, channels)
    if bias is None:
        return f"the bias of the {linear.op_type} is not one constant per output channel"
    set_linear(main, linear, weight, scale_output(linear, scale), bias, scale, shift)
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


def _fold_after_matmul(
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
        change = scale_output(matmul, scale)
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
    axis, channels, rank = input_channels(node, weight)
    parts = [_input_part(affine.x, p, rank, axis, channels) for p in (affine.scale, affine.shift)]
    if any(
        p is None and whole is not None for p, whole in zip(parts, (affine.scale, affine.shift), strict=True)
    ):
        return f"its constant is not one number per (known) input channel of the {node.op_type}"
    scale, shift = parts
    if shift is not None and (reason := _no_shift(node)):
        return _scale_alone(main, node, affine, weight, reason)
    bias = bias_of(node, output_channels(node, weight)[2]) if node.op_type != "MatMul" else np.zeros(1)
    if bias is None:
        return f"the bias of the {node.op_type} is not one constant per output channel"
    extra = None if shift is None else response(node, constant(node.inputs[1]), shift)
    set_linear(main, node, weight, scale_input(node, scale), bias, None, extra)
    node.replace_input_with(0, affine.x)
    return DONE


def _part_of_runtime_fusion(value: ir.Value) -> bool:
    """Whether Erf, Tanh or Sqrt is among the few elementwise nodes before: a GELU, a LayerNorm."""
    frontier: list[ir.Value | None] = [value]
    for _ in range(6):
        nodes = [n for v in frontier if (n := producer(v, *_ELEMENTWISE)) is not None]
        if any(n.op_type in _RUNTIME_FUSES for n in nodes):
            return True
        frontier = [v for n in nodes for v in n.inputs]
    return False


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
    axis, channels, rank = input_channels(node, weight)
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
    change = scale_input(node, scale)
    old = node.inputs[1]
    assert change is not None and old is not None
    node.replace_input_with(1, new_initializer(main, f"{old.name}_folded", computed(weight, change)))
    return DONE


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
