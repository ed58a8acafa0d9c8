"""Channel rules of operators; see :mod:`edgepack.compression.channels.atoms`."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgepack.compression.channels.atoms import Atoms, Channels, Product, Track, is_constant, label
from edgepack.compression.channels.moves import MOVES
from edgepack.ir.model import captured_values, constant, name_of

Rule = Callable[[Channels, ir.Node], None]


def find_channels(model: ir.Model) -> Channels:
    """Find the channels of a model. The graph must be in topological order with inferred shapes."""
    found = Channels()
    for node in model.graph:
        standard = node.domain in ("", "ai.onnx")
        rule = RULES.get(node.op_type) if standard else None
        if standard and node.op_type in LINEAR:
            LINEAR[node.op_type](found, node)
        elif any(v in found.tracks for v in node.inputs if v is not None):
            if rule is None:
                found.pin_inputs(node, "has no channel rule")
            else:
                rule(found, node)
    for value in model.graph.outputs:
        found.pin(value, f"{value.name!r} is an output of the model")
    captured = captured_values(model.graph)
    for value in list(found.tracks):
        if name_of(value) in captured:
            found.pin(value, f"{value.name!r} is used in a subgraph")
    return found


def _convolution(found: Channels, node: ir.Node) -> None:
    x, weight = node.inputs[0], constant(node.inputs[1])
    if weight is None or not all(is_constant(v) for v in node.inputs[2:]):
        found.pin_inputs(node, "has weights that are not constant")
        return
    transposed, groups = node.op_type == "ConvTranspose", node.attributes.get_int("group", 1)
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    read = found.at(node, x, 1)
    if groups == 1:
        made = found.fresh(outputs)
        found.producers.append((node, made))
        found.cut(node, 1, 1 if transposed else 0, made)
        if read is not None:
            found.cut(node, 1, 0 if transposed else 1, read)
            found.consumers.append((node, read))
        found.products.append(Product(node, (made,) if read is None else (read, made)))
    elif read is None:
        return
    else:
        # The input channels of a convolution group and its outputs are removed together.
        made = np.repeat(found.tie_rows(read.reshape(groups, inputs // groups)), outputs // groups)
        found.cut(node, 1, 0, read if transposed else made)
        found.products.append(Product(node, (made,)))
    found.cut(node, 2, 0, made)
    found.track(node.outputs[0], 1, made)


def _gemm(found: Channels, node: ir.Node) -> None:
    weight = constant(node.inputs[1])
    if weight is None or node.attributes.get_int("transA", 0) > 0:
        found.pin_inputs(node, "has weights that are not constant, or a transposed input")
        return
    transposed = bool(node.attributes.get_int("transB", 0))
    made = _dense(found, node, 1, (0, 1) if transposed else (1, 0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(bias)
    if bias is not None and array is None:
        found.pin(bias, f"{label(node)} adds it")
        found.pin_atoms(made, f"{label(node)} adds {bias.name!r}")
    elif array is not None and array.ndim and array.shape[-1] == len(made):
        found.cut(node, 2, array.ndim - 1, made)


def _dense(found: Channels, node: ir.Node, axis: int, axes: tuple[int, int]) -> Atoms:
    """A dense layer on axis ``axis`` of the input; ``axes`` are the (output, input) axes of the weight."""
    weight = constant(node.inputs[1])
    assert weight is not None
    read = found.at(node, node.inputs[0], axis)
    made = found.fresh(weight.shape[axes[0]])
    found.producers.append((node, made))
    found.cut(node, 1, axes[0], made)
    if read is not None:
        found.cut(node, 1, axes[1], read)
        found.consumers.append((node, read))
    found.products.append(Product(node, (made,) if read is None else (read, made)))
    found.track(node.outputs[0], axis, made)
    return made


def _matmul(found: Channels, node: ir.Node) -> None:
    a, b = node.inputs
    assert a is not None
    assert b is not None
    weight = constant(b)
    if weight is not None and weight.ndim == 2 and a.shape is not None and len(a.shape) > 1:
        _rows(found, node, len(a.shape) - 1)
    elif is_constant(a) or weight is not None or a.shape is None or b.shape is None:
        found.pin_inputs(node, "has a constant that is not the matrix on the right")
    elif len(a.shape) == len(b.shape) > 1:
        _product(found, node, a, b)
    else:
        found.pin_inputs(node, "multiplies values of different rank")


def _rows(found: Channels, node: ir.Node, last: int) -> None:
    """Rows times a matrix; channels along another axis pass through."""
    track = found.tracks.get(node.inputs[0]) if node.inputs[0] is not None else None
    if track is not None and track.axis < last:
        found.products.append(Product(node, (track.atoms,)))
        found.track(node.outputs[0], track.axis, track.atoms)
    else:
        _dense(found, node, last, (1, 0))


def _product(found: Channels, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    """A MatMul of two computed values of one rank: channels may be on a batch axis or an axis that
    remains."""
    assert a.shape is not None
    batch = len(a.shape) - 2
    left, right = found.tracks.get(a), found.tracks.get(b)
    passed: Track | None
    if left is not None and right is not None:
        if left.axis == right.axis < batch and len(left.atoms) == len(right.atoms):
            found.tie(left.atoms, right.atoms)
            passed = left
        else:
            found.pin_inputs(node, "multiplies channels with each other")
            return
    elif left is not None:
        alone = left.axis < batch and found.size(b, left.axis) == 1
        passed = left if alone or left.axis == batch else None
    else:
        assert right is not None
        alone = right.axis < batch and found.size(a, right.axis) == 1
        passed = right if alone or right.axis == batch + 1 else None
    if passed is None:
        found.pin_inputs(node, "multiplies channels with what has none")
        return
    found.products.append(Product(node, (passed.atoms,)))
    found.track(node.outputs[0], passed.axis, passed.atoms)


def _product_or_rows(found: Channels, node: ir.Node) -> None:
    tracked = any(v in found.tracks for v in node.inputs if v is not None)
    if tracked or is_constant(node.inputs[1]):
        _matmul(found, node)


def _unary(found: Channels, node: ir.Node) -> None:
    """Unary elementwise operators."""
    track = found.tracks.get(node.inputs[0]) if node.inputs[0] is not None else None
    for value in node.inputs[1:]:
        found.pin(value, f"{label(node)} takes it as a parameter")
    if track is not None:
        found.track(node.outputs[0], track.axis, track.atoms)


def _elementwise(found: Channels, node: ir.Node) -> None:
    """Elementwise operators with broadcasting: merges the channels of all operands on one axis."""
    output = node.outputs[0]
    if output.shape is None or any(v is None or v.shape is None for v in node.inputs):
        found.pin_inputs(node, "has operands of unknown rank")
        return
    rank = len(output.shape)
    operands = [
        (i, v, rank - len(v.shape))
        for i, v in enumerate(node.inputs)
        if v is not None and v.shape is not None
    ]
    tracked = [
        (found.tracks[v].axis + shift, found.tracks[v].atoms) for _, v, shift in operands if v in found.tracks
    ]
    axis, atoms = tracked[0]
    if any(a != axis or len(t) != len(atoms) for a, t in tracked):
        found.pin_inputs(node, "has operands with different channels")
        return
    wide = []
    for index, value, shift in operands:
        array = constant(value)
        size = (
            found.size(value, axis - shift) if array is None else (1, *array.shape)[max(axis - shift + 1, 0)]
        )
        if value in found.tracks or axis < shift or size == 1:
            continue
        if array is None:
            found.pin_inputs(node, f"combines them with {value.name!r}, whose channels must stay")
            return
        wide.append((index, axis - shift))
    for index, at in wide:
        found.cut(node, index, at, atoms)
    for _, other in tracked[1:]:
        found.tie(atoms, other)
    found.track(output, axis, atoms)


def _by_channel(found: Channels, node: ir.Node) -> None:
    """Pooling and normalizations that treat channels (axis 1) independently, with constants for each."""
    x, track = node.inputs[0], None if node.inputs[0] is None else found.tracks.get(node.inputs[0])
    if track is None or track.axis != 1 or not all(is_constant(v) for v in node.inputs[1:]):
        found.pin(x, f"{label(node)} has its channels along another axis")
        return
    if any(v.uses() for v in node.outputs[1:]):
        found.pin(x, f"{label(node)} has more than one output")
        return
    for index in range(1, len(node.inputs)):
        found.cut(node, index, 0, track.atoms)
    found.track(node.outputs[0], 1, track.atoms)


def _reduction(found: Channels, node: ir.Node) -> None:
    x = node.inputs[0]
    track = None if x is None else found.tracks.get(x)
    if track is None or x is None or x.shape is None:
        found.pin_inputs(node, "takes channels as its axes")
        return
    rank = len(x.shape)
    content = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", ()) if content is None else content.reshape(-1).tolist()
    reduced = {int(a) % rank for a in axes}
    if not reduced or track.axis in reduced:
        found.pin(x, f"{label(node)} works across channels")
        return
    kept = node.attributes.get_int("keepdims", 1)
    axis = track.axis - (0 if kept else sum(a < track.axis for a in reduced))
    found.track(node.outputs[0], axis, track.atoms)


def _along_an_axis(found: Channels, node: ir.Node) -> None:
    """Softmax and LayerNormalization mix their axis (and those after it) and keep others independent."""
    x = node.inputs[0]
    track = None if x is None else found.tracks.get(x)
    if track is None or x is None or x.shape is None:
        found.pin_inputs(node, "takes channels as a parameter")
        return
    axis = node.attributes.get_int("axis", -1) % len(x.shape)
    works_on = range(axis, len(x.shape)) if node.op_type == "LayerNormalization" else (axis,)
    if track.axis in works_on or any(v.uses() for v in node.outputs[1:]):
        found.pin(x, f"{label(node)} works across channels")
        return
    found.track(node.outputs[0], track.axis, track.atoms)


# fmt: off
UNARY = (
    "Abs", "Acos", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal",
    "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh",
    "ThresholdedRelu",
)
BROADCAST = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min",
    "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)
BY_CHANNEL = (
    "AveragePool", "BatchNormalization", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool",
    "InstanceNormalization", "LpPool", "MaxPool",
)
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare",
)
# fmt: on
LINEAR: dict[str, Rule] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _gemm,
    "MatMul": _product_or_rows,
}
"""Operators that produce new channels."""
RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BROADCAST, _elementwise),
    **dict.fromkeys(BY_CHANNEL, _by_channel),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization"), _along_an_axis),
    **MOVES,
}
