"""Rules that fold separate padding into an operator, and replace decomposed activations by one operator."""

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.rule import (
    DONE,
    Outcome,
    Rule,
    int_attribute,
    ints_attribute,
    is_op,
    producer,
    same_number,
    substitute,
)
from edgepack.ir.model import constant, only_consumer


def fold_pad(main: ir.Graph, node: ir.Node) -> Outcome:
    """Fold a Pad into the operator that follows.

    Given::  y = Conv(Pad(x, zeros))                    or AveragePool
    Result:: y = Conv(x, pads=...)                      AveragePool then counts the padding
    """
    pad = producer(node.inputs[0], "Pad")
    if pad is None or pad.graph is not node.graph:
        return None
    amounts = _pads_of(pad)
    if isinstance(amounts, str):
        return amounts
    if any(amounts[0][:2]) or any(amounts[1][:2]):
        return "Pad pads batch or channels"
    if min(*amounts[0], *amounts[1]) < 0:
        return "Pad crops"
    average = node.op_type == "AveragePool"
    if average and (any(ints_attribute(node, "pads")) or int_attribute(node, "ceil_mode", 0)):
        return "AveragePool pads or rounds up itself, so the two paddings count differently"
    if _auto_pad(node) != "NOTSET":
        return f"{node.op_type} chooses its padding itself (auto_pad)"
    if average:
        node.attributes.add(ir.AttrInt64("count_include_pad", 1))
    begin, end = amounts[0][2:], amounts[1][2:]
    own = ints_attribute(node, "pads") or [0] * (2 * len(begin))
    node.attributes.add(ir.AttrInt64s("pads", [a + b for a, b in zip(own, begin + end, strict=True)]))
    node.replace_input_with(0, pad.inputs[0])
    return DONE


def _auto_pad(node: ir.Node) -> str:
    attribute = node.attributes.get("auto_pad")
    return "NOTSET" if attribute is None else attribute.as_string()


def _pads_of(pad: ir.Node) -> tuple[list[int], list[int]] | str:
    """The amounts that a Pad of zeros adds before and after each axis, or why they are not known."""
    mode = pad.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return f"Pad has the mode {mode.as_string()}"
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    if fill is not None:
        number = constant(fill)
        if number is None or number.item() != 0:
            return "Pad does not fill with zeros"
    amounts = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if amounts is None:
        return "Pad computes its amounts at run time"
    half = amounts.size // 2
    axes_input = pad.inputs[3] if len(pad.inputs) > 3 else None
    if axes_input is None:
        return amounts[:half].tolist(), amounts[half:].tolist()
    axes, shape = constant(axes_input), pad.inputs[0].shape if pad.inputs[0] is not None else None
    if axes is None or shape is None:
        return "Pad has axes or a rank that are not known"
    begin, end = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes.tolist()):
        begin[axis], end[axis] = int(amounts[i]), int(amounts[half + i])
    return begin, end


def explicit_pads(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace ``auto_pad`` by explicit ``pads``.

    Given::  y = Conv(x, auto_pad=SAME_UPPER | SAME_LOWER | VALID), also pooling
    Result:: y = Conv(x, pads=...)
    """
    mode = _auto_pad(node)
    if mode == "NOTSET":
        return None
    if mode == "VALID":
        node.attributes.pop("auto_pad")
        return DONE
    shape = static_shape_of_space(node.inputs[0])
    weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
    kernel = ints_attribute(node, "kernel_shape") or (list(weight.shape[2:]) if weight is not None else [])
    if shape is None or not kernel:
        return "the image size is not known, so SAME cannot be written as numbers"
    strides = ints_attribute(node, "strides") or [1] * len(kernel)
    dilations = ints_attribute(node, "dilations") or [1] * len(kernel)
    first, second = [], []
    for size, k, stride, dilation in zip(shape, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        first.append(total // 2)
        second.append(total - total // 2)
    pads = first + second if mode == "SAME_UPPER" else second + first
    node.attributes.pop("auto_pad")
    node.attributes.add(ir.AttrInt64s("pads", pads))
    return DONE


def static_shape_of_space(value: ir.Value | None) -> tuple[int, ...] | None:
    """The dimensions after batch and channels, if they are known."""
    dims = [] if value is None or value.shape is None else list(value.shape)[2:]
    return (
        tuple(d for d in dims if isinstance(d, int))
        if dims and all(isinstance(d, int) for d in dims)
        else None
    )


def hard_sigmoid(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace a decomposed HardSigmoid by the operator.

    Given::  y = Clip(x + 3, 0, 6) / 6                 or * (1 / 6)
    Result:: y = HardSigmoid(x, alpha=1/6, beta=1/2)
    """
    clipped = _times_sixth(node)
    x = None if clipped is None else _relu6_of_x_plus_3(clipped)
    if x is None:
        return None
    substitute(node, "HardSigmoid", [x], alpha=1 / 6, beta=0.5)
    return DONE


def hard_swish(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace a decomposed HardSwish by the operator (opset 14).

    Given::  y = x * Clip(x + 3, 0, 6) / 6             in either order, or * (1 / 6)
             y = x * HardSigmoid(x, alpha=1/6, beta=1/2)
    Result:: y = HardSwish(x)
    """
    x = hard_swish_input(node)
    if x is None:
        return None
    substitute(node, "HardSwish", [x])
    return DONE


def hard_swish_input(node: ir.Node) -> ir.Value | None:
    """``x`` when ``node`` is the last node of a decomposed ``HardSwish(x)``."""
    product = _times_sixth(node)
    if product is not None:
        inner = producer(product, "Mul")
        if inner is None or only_consumer(product) is not node:
            return None
        return next((x for x, gate in _both_ways(inner) if x is _relu6_of_x_plus_3(gate)), None)
    if not is_op(node, "Mul"):
        return None
    for x, gate in _both_ways(node):
        if x is not None and (x is _gate_input(gate)):
            return x
    return None


def _gate_input(gate: ir.Value | None) -> ir.Value | None:
    """``x`` when ``gate = clip(x + 3, 0, 6) / 6``, decomposed or as HardSigmoid."""
    sigmoid = producer(gate, "HardSigmoid")
    if sigmoid is not None:
        alpha, beta = (sigmoid.attributes.get(name) for name in ("alpha", "beta"))
        exact = (
            alpha is not None
            and bool(np.isclose(alpha.as_float(), 1 / 6, rtol=1e-6, atol=0))
            and (beta is None or beta.as_float() == 0.5)
        )
        return sigmoid.inputs[0] if exact else None
    node = None if gate is None else gate.producer()
    clipped = None if node is None else _times_sixth(node)
    return None if clipped is None else _relu6_of_x_plus_3(clipped)


def _both_ways(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    a, b = node.inputs
    return [(a, b), (b, a)]


def _times_sixth(node: ir.Node) -> ir.Value | None:
    """``v`` when the node is ``v / 6`` or ``v * (1 / 6)``."""
    if is_op(node, "Div") and same_number(node.inputs[1], 6.0):
        return node.inputs[0]
    if is_op(node, "Mul"):
        return next((v for v, c in _both_ways(node) if same_number(c, 1 / 6)), None)
    return None


def _relu6_of_x_plus_3(value: ir.Value | None) -> ir.Value | None:
    """``x`` when ``value = Clip(x + 3, 0, 6)``."""
    clip = producer(value, "Clip")
    if clip is None or len(clip.inputs) < 3:
        return None
    lower = constant(clip.inputs[1])
    if lower is None or lower.item() != 0 or not same_number(clip.inputs[2], 6.0):
        return None
    add = producer(clip.inputs[0], "Add")
    return None if add is None else next((x for x, c in _both_ways(add) if same_number(c, 3.0)), None)


def leaky_relu(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace a PRelu with one slope (PyTorch's default) by LeakyRelu, which has an int8 kernel.

    Given::  y = PRelu(x, slope)        all slopes equal
    Result:: y = LeakyRelu<alpha = slope>(x)
    """
    slope = constant(node.inputs[1])
    if slope is None or not slope.size or not np.issubdtype(slope.dtype, np.floating):
        return None
    first = slope.reshape(-1)[0]
    if not (slope == first).all():
        return "the slopes differ between channels"
    substitute(node, "LeakyRelu", [node.inputs[0]], alpha=float(first))
    return DONE


PADDING: tuple[Rule, ...] = (
    Rule("explicit_pads", frozenset({"Conv", "MaxPool", "AveragePool"}), explicit_pads),
    Rule("fold_pad", frozenset({"Conv", "AveragePool"}), fold_pad),
)
ACTIVATIONS: tuple[Rule, ...] = (
    Rule("hard_swish", frozenset({"Mul", "Div"}), hard_swish),
    Rule("hard_sigmoid", frozenset({"Mul", "Div"}), hard_sigmoid),
    Rule("leaky_relu", frozenset({"PRelu"}), leaky_relu),
)
