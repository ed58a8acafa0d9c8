"""Early selection: compute only the positions that are selected later.

A classifier on a transformer uses the first token of the last layer. Every operator of that layer computes
positions independently, except for the keys and values of attention, so all others can work on one position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.rule import DONE, Outcome, Rule, int_attribute, ints_attribute, is_op
from edgepack.graph.rules.shapes import reshaped_axis
from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, fresh_name, new_initializer

# fmt: off
_UNARY = frozenset([
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Erf",
    "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Softplus", "Softsign", "Mish", "Not", "Cast", "Clip",
])
_BROADCASTING = frozenset([
    "Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max", "PRelu", "And", "Or", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual",
])
# fmt: on
_REDUCING = frozenset(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"])
_PRODUCTS = frozenset(["MatMul", "Gemm"])
_EITHER_END = frozenset([0, -1])
_MOST_INDICES = 4

Axes = list[int | None]
"""For each input of a node the axis to select along; ``None``: the input is used unchanged."""


@dataclass(slots=True)
class _Region:
    """The nodes that can work on the selected positions alone."""

    indices: Array
    axes: dict[ir.Value, int]
    """Values that shrink, each with the axis that shrinks."""
    taken: dict[ir.Node, Axes] = field(default_factory=dict)
    """Nodes that compute fewer positions."""

    def inside(self, value: ir.Value) -> bool:
        """Whether a node of the region computes ``value``, so that it needs no selection."""
        return value.producer() in self.taken


def select_early(main: ir.Graph, node: ir.Node) -> Outcome:
    """Move a Gather or Slice before matrix products instead of after them.

    Given::  y = Gather(LayerNorm(MatMul(x, W) + x), 0, axis=1)          x is [n, tokens, channels]
    Result:: z = Gather(x, [0], axis=1)
             y = Gather(LayerNorm(MatMul(z, W) + z), 0, axis=1)
    """
    found = _selected(node)
    value = None if found is None else node.inputs[0]
    if found is None or value is None or value.shape is None or not _is_real(value):
        return None
    axis = found[0]
    selections = [s for use in value.uses() if (s := _selected(use.node)) is not None and use.idx == 0]
    if len(selections) < len(value.uses()) or value.is_graph_output():
        return None
    if any(other != axis for other, _ in selections):
        return None
    indices = np.unique([i for _, wanted in selections for i in wanted])
    size = value.shape[axis]
    if len(indices) > _MOST_INDICES or (isinstance(size, int) and 2 * len(indices) > size):
        return None
    region = _region(value, axis, indices, node.graph)
    if not any(is_op(taken, *_PRODUCTS) for taken in region.taken):
        return None
    users = [use.node for use in value.uses()]
    _rewrite(main, region)
    for user in users:
        _select_again(main, user, indices)
    return DONE


def _is_real(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _selected(node: ir.Node) -> tuple[int, list[int]] | None:
    """Axis and constant indices of a Gather, or of a Slice of one position."""
    x = node.inputs[0] if node.inputs else None
    if not is_op(node, "Gather", "Slice") or x is None or x.shape is None:
        return None
    rank = len(x.shape)
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is None or not 0 < index.size <= _MOST_INDICES or index.ndim > 1:
            return None
        return int_attribute(node, "axis", 0) % rank, [int(i) for i in index.reshape(-1)]
    numbers = [constant(v) for v in node.inputs[1:]]
    if len(numbers) < 3 or any(n is None or n.size != 1 for n in numbers):
        return None
    start, end, axis, *step = (int(n.item()) for n in numbers if n is not None)
    to_the_end = start == -1 and end > np.iinfo(np.int32).max // 2
    one = to_the_end or (end - start == 1 and (start >= 0 or end < 0))
    inside = start in _EITHER_END or isinstance(x.shape[axis], int)  # a Slice beyond the end is empty
    return (axis % rank, [start]) if one and inside and step in ([], [1]) else None


def _region(value: ir.Value, axis: int, indices: Array, graph: ir.Graph | ir.Function | None) -> _Region:
    """All nodes before ``value`` whose results are consumed at the selected positions only."""
    region = _Region(indices, {value: axis})
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if node is None or node in region.taken or node.graph is not graph:
            continue
        if _used(node) != [node.outputs[0]]:
            continue
        if current is not value and not _only_read_inside(region, current):
            continue
        axes = _axes_through(node, region.axes[current], indices)
        if axes is None or any(region.axes.get(v, a) != a for v, a in _wanted(node, axes)):
            continue
        region.taken[node] = axes
        for v, a in _wanted(node, axes):
            region.axes[v] = a
            waiting.append(v)
    return region


def _used(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.outputs if v.uses() or v.is_graph_output()]


def _wanted(node: ir.Node, axes: Axes) -> Iterator[tuple[ir.Value, int]]:
    """Inputs that shrink."""
    for value, axis in zip(node.inputs, axes, strict=True):
        if value is not None and axis is not None:
            yield value, axis


def _only_read_inside(region: _Region, value: ir.Value) -> bool:
    """Whether only nodes of the region consume the value, all of them at the selected positions."""
    if value.is_graph_output():
        return False
    for use in value.uses():
        axes = region.taken.get(use.node)
        if axes is None or axes[use.idx] is None:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------
# The axis of each input that corresponds to an axis of the output.


def _axes_through(node: ir.Node, axis: int, indices: Array) -> Axes | None:
    """The input axes for ``axis`` of the output, or ``None`` if positions are not independent along it."""
    if node.domain not in ("", "ai.onnx") or node.outputs[0].shape is None or not node.inputs:
        return None
    op, rank = node.op_type, len(node.outputs[0].shape)
    rest: Axes = [None] * (len(node.inputs) - 1)
    if op in _UNARY:
        return [axis, *rest]
    if op in _BROADCASTING:
        return _broadcast(node.inputs, axis - rank, indices)
    if op in ("Softmax", "LogSoftmax"):
        return [axis] if int_attribute(node, "axis", -1) % rank != axis else None
    if op == "LayerNormalization":
        return [axis, *rest] if axis < int_attribute(node, "axis", -1) % rank else None
    if op in _REDUCING:
        return [axis, *rest] if _keeps(node, axis, rank) else None
    if op == "Transpose":
        order = ints_attribute(node, "perm") or list(range(rank))[::-1]
        return [order[axis]]
    if op == "Reshape":
        return _through_reshape(node, axis)
    if op == "MatMul":
        return _through_product(node, axis - rank, indices)
    return _through_gemm(node, axis, indices) if op == "Gemm" else None


def _broadcast(inputs: Sequence[ir.Value | None], from_end: int, indices: Array) -> Axes | None:
    """The axis, counted from the end, of every input that has it and is not broadcast along it."""
    axes: Axes = []
    for value in inputs:
        if value is None or value.shape is None:
            return None
        axis = len(value.shape) + from_end
        size = value.shape[axis] if axis >= 0 else 1
        # The first and last position are valid for any dynamic size: in a broadcast axis of 1 they are equal.
        if not isinstance(size, int) and not _EITHER_END.issuperset(indices.tolist()):
            return None
        axes.append(None if size == 1 else axis)
    return axes


def _keeps(node: ir.Node, axis: int, rank: int) -> bool:
    """Whether a reduction keeps ``axis``."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(ints_attribute(node, "axes"))
    if given is None or not given.size or not int_attribute(node, "keepdims", 1):
        return False
    return axis not in {int(a) % rank for a in given.reshape(-1)}


def _through_reshape(node: ir.Node, axis: int) -> Axes | None:
    found = reshaped_axis(node, axis)
    return None if found is None else [found[0], None]


def _through_product(node: ir.Node, from_end: int, indices: Array) -> Axes | None:
    """Output rows are rows of the left operand, columns those of the right one; batch axes belong to both."""
    a, b = node.inputs
    if a is None or b is None or a.shape is None or b.shape is None or min(len(a.shape), len(b.shape)) < 2:
        return None
    if from_end == -2:
        return [len(a.shape) - 2, None]
    if from_end == -1:
        return [None, len(b.shape) - 1]
    return _broadcast(node.inputs, from_end, indices)


def _through_gemm(node: ir.Node, axis: int, indices: Array) -> Axes | None:
    if axis != 0:
        return None
    added = _broadcast(node.inputs[2:], -2, indices)
    return None if added is None else [int_attribute(node, "transA", 0), None, *added]


# ---------------------------------------------------------------------------------------------------------


def _rewrite(main: ir.Graph, region: _Region) -> None:
    """Select the inputs of the region, and shrink the shapes inside it."""
    shapes = {
        node: found[1]
        for node in region.taken
        if node.op_type == "Reshape" and (found := reshaped_axis(node, region.axes[node.outputs[0]]))
    }
    entering: dict[ir.Value, ir.Value] = {}
    for node, axes in region.taken.items():
        for index, (value, axis) in enumerate(zip(list(node.inputs), axes, strict=True)):
            if value is not None and axis is not None and not region.inside(value):
                if value not in entering:
                    entering[value] = _selection_of(main, value, axis, region.indices, node)
                node.replace_input_with(index, entering[value])
    for node in region.taken:
        out = node.outputs[0]
        axis = region.axes[out]
        if node in shapes:
            shape = [len(region.indices) if i == axis else d for i, d in enumerate(shapes[node])]
            name = f"{out.name}_shape"
            node.replace_input_with(1, new_initializer(main, name, np.array(shape, np.int64)))
        out.shape = _shrunk(out, axis, len(region.indices))


def _shrunk(value: ir.Value, axis: int, size: int) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([size if i == axis else d for i, d in enumerate(value.shape)])


def _selection_of(main: ir.Graph, value: ir.Value, axis: int, indices: Array, before: ir.Node) -> ir.Value:
    """The value at the selected positions: a constant, or a Gather after the node that computes it."""
    name = f"{value.name}_selected"
    array = constant(value)
    if array is not None:
        return new_initializer(main, name, np.take(array, indices, axis))
    taken = new_initializer(main, f"{name}_index", indices.astype(np.int64))
    gather = ir.node("Gather", [value, taken], attributes={"axis": axis})
    out = gather.outputs[0]
    out.name, out.type, out.shape = fresh_name(main, name), value.type, _shrunk(value, axis, len(indices))
    assert isinstance(before.graph, ir.Graph)
    source = value.producer()
    if source is not None and source.graph is before.graph:
        before.graph.insert_after(source, gather)
    else:
        before.graph.insert_before(before.graph[0], gather)
    return out


def _select_again(main: ir.Graph, node: ir.Node, indices: Array) -> None:
    """Adapt a selection inside the region to the selected positions; a Slice of one becomes a Gather."""
    found = _selected(node)
    assert found is not None
    axis, wanted = found
    places = np.searchsorted(indices, wanted)
    index = constant(node.inputs[1])
    shape = () if node.op_type == "Gather" and index is not None and index.ndim == 0 else (len(wanted),)
    at = new_initializer(main, f"{node.outputs[0].name}_index", places.astype(np.int64).reshape(shape))
    if node.op_type == "Gather":
        node.replace_input_with(1, at)
        return
    out = node.outputs[0]
    new = ir.node("Gather", [node.inputs[0], at], attributes={"axis": axis}, name=node.name)
    new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = out.name, out.type, out.shape
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, new)
    out.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    out.name = f"{out.name}_before"
    node.graph.remove(node, safe=True)


SELECTION: tuple[Rule, ...] = (Rule("select_early", frozenset({"Gather", "Slice"}), select_early),)
