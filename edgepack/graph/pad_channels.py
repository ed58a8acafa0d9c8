"""Channel padding: zero channels bring depthwise convolutions to a multiple that the target's kernel prefers.

Given (24 channels, and a kernel that computes 16 at a time and the remainder one by one)::

    x -> Conv(w [24, k, 1, 1]) -> Relu -> Conv(d [24, 1, 3, 3], group 24) -> Conv(v [n, 24, 1, 1]) -> y

Result::

    x -> Conv(w [32, k, 1, 1]) -> Relu -> Conv(d [32, 1, 3, 3], group 32) -> Conv(v [n, 32, 1, 1]) -> y

The added channels of ``w``, ``d`` and their biases are zeros, and so are the added input channels of ``v``.
Whatever nodes between them (activations, pooling, squeeze and excitation) compute there, ``y`` is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepack.ir.model import clone, constant, name_of, new_initializer

MOST_ADDED = 0.5
"""Largest share of added channels; beyond it the adjacent convolutions lose what the depthwise one gains."""

BY_CHANNEL = frozenset(
    [
        "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Softplus", "Abs",
        "Neg", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Add", "Mul",
        "Sub",
    ]
)  # fmt: skip
"""Operators that compute each channel of the output from the same channel of the inputs alone."""
BINARY = frozenset(["Add", "Mul", "Sub"])


@dataclass(slots=True)
class _Group:
    """Values whose channels grow together, and the convolutions that produce, keep and consume them."""

    values: list[ir.Value] = field(default_factory=list)
    depthwise: list[ir.Node] = field(default_factory=list)
    makers: list[ir.Node] = field(default_factory=list)
    consumers: list[ir.Node] = field(default_factory=list)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)
    """Operands ``[.., channels, 1, ..]`` of elementwise nodes."""


def pad_depthwise(model: ir.Model, multiple: int) -> tuple[ir.Model, int]:
    """An equivalent model, and how many depthwise convolutions were padded to ``multiple`` channels.

    A convolution is not padded if its channels reach something that cannot grow: a graph output, a Concat, a
    grouped convolution.
    """
    if multiple == 1:
        return model, 0
    half_precision = clone(model)
    done: set[ir.Node] = set()
    count = 0
    for node in list(half_precision.graph):
        channels = _depthwise_channels(node)
        added = -channels % multiple
        if node in done or not 0 < added <= channels * MOST_ADDED:
            continue
        group = _grow(node, channels)
        if group is None:
            continue
        done.update(group.depthwise)
        count += len(group.depthwise)
        _to_float32(half_precision.graph, group, channels, added)
    return half_precision, count


def _depthwise_channels(node: ir.Node) -> int:
    """Channels of a depthwise convolution with channel multiplier 1, 0 for every other node."""
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return 0
    weight = constant(node.inputs[1])
    group = node.attributes.get_int("group", 1)
    fits = weight is not None and group > 1 and weight.shape[:2] == (group, 1)
    return group if fits and _has_constant_bias(node) else 0


def _has_constant_bias(node: ir.Node) -> bool:
    return len(node.inputs) < 3 or node.inputs[2] is None or constant(node.inputs[2]) is not None


def _grow(start: ir.Node, channels: int) -> _Group | None:
    """All values that must grow with the channels of ``start``; ``None`` if one of them cannot."""
    group = _Group()
    waiting = [v for v in (start.inputs[0], start.outputs[0]) if v is not None]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is None or value.is_graph_output() or _channels(value) != channels:
            return None
        more = list(_through(producer, value, channels, group))
        for use in value.uses():
            more += _through(use.node, value, channels, group)
        if None in more:
            return None
        group.values.append(value)
        waiting += [v for v in more if v is not None]
    return group


def _through(node: ir.Node, value: ir.Value, channels: int, group: _Group) -> Iterator[ir.Value | None]:
    """Values that must grow with ``value``, which ``node`` produces or consumes; ``None`` if one cannot."""
    makes = value in node.outputs
    if node.op_type == "Conv" and node.domain in ("", "ai.onnx"):
        if _depthwise_channels(node) == channels:
            _once(group.depthwise, node)
            yield from (node.inputs[0], node.outputs[0])
        elif _is_dense(node, value, makes=makes):
            _once(group.makers if makes else group.consumers, node)
        else:
            yield None
        return
    if node.op_type not in BY_CHANNEL or len(node.outputs) != 1:
        yield None
        return
    yield node.outputs[0]
    for index, operand in enumerate(node.inputs):
        array = constant(operand)
        if operand is None:
            continue
        if array is None:
            yield operand if index == 0 or node.op_type in BINARY else None
        elif node.op_type in BINARY and array.size > 1:
            if not _is_channel_vector(array.shape, channels, _rank(value)):
                yield None
            elif (node, index) not in group.constants:
                group.constants.append((node, index))


def _channels(value: ir.Value) -> int:
    """The size of axis 1, where it is known."""
    size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else 0
    return size if isinstance(size, int) else 0


def _is_dense(node: ir.Node, value: ir.Value, *, makes: bool) -> bool:
    """Whether a convolution without groups produces ``value``, or consumes it as its data input."""
    if node.attributes.get_int("group", 1) != 1 or constant(node.inputs[1]) is None:
        return False
    return _has_constant_bias(node) if makes else value not in node.inputs[1:]


def _once(nodes: list[ir.Node], node: ir.Node) -> None:
    if node not in nodes:
        nodes.append(node)


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _is_channel_vector(shape: tuple[int, ...], channels: int, rank: int) -> bool:
    """Whether an operand of a value of ``rank`` has one number for each channel (axis 1) and no more."""
    axis = 1 - (rank - len(shape))
    return rank > 1 and axis >= 0 and shape[axis] == channels == int(np.prod(shape))


def _to_float32(graph: ir.Graph, group: _Group, channels: int, added: int) -> None:
    for node in (*group.depthwise, *group.makers):
        _pad(graph, node, 1, 0, added)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            _pad(graph, node, 2, 0, added)
    for node in group.depthwise:
        node.attributes["group"] = ir.AttrInt64("group", channels + added)
    for node in group.consumers:
        _pad(graph, node, 1, 1, added)
    for node, index in group.constants:
        array = constant(node.inputs[index])
        assert array is not None
        _pad(graph, node, index, array.shape.index(channels), added)
    for value in group.values:
        assert value.shape is not None
        value.shape = ir.Shape([d if i != 1 else channels + added for i, d in enumerate(value.shape)])


def _pad(graph: ir.Graph, node: ir.Node, index: int, axis: int, added: int) -> None:
    """Append zeros to a constant operand; other consumers of the constant keep the original."""
    old = node.inputs[index]
    array = constant(old)
    assert old is not None
    assert array is not None
    amounts = [(0, added if i == axis else 0) for i in range(array.ndim)]
    wide = np.pad(array, amounts)
    if len(old.uses()) == 1 and not old.is_graph_output() and old.name in graph.initializers:
        tensor = ir.tensor(wide, name=old.name)
        old.const_value, old.shape = tensor, ir.Shape(wide.shape)
    else:
        node.replace_input_with(index, new_initializer(graph, f"{name_of(old)}_wide", wide))
