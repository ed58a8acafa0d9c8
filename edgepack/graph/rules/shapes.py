"""What a Reshape does to one axis, also if its shape is computed at run time."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from edgepack.graph.rules.cleanup import copied_dimensions
from edgepack.graph.rules.rule import int_attribute, ints_attribute, is_op, producer, static_shape
from edgepack.ir.model import constant

_LIKE_FIRST = frozenset(
    ["Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Softmax", "LayerNormalization", "Cast", "Clip", "Neg"]
)
_BROADCASTING = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Where"])
_MOST_STEPS = 4096
"""Steps to search back; it bounds the time for a model of a thousand layers."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A dimension of a new shape that equals ``axis`` of ``value``."""

    value: ir.Value
    axis: int


Entry = int | Copied | None
"""One entry of a Reshape's shape: a number, 0 (copy), -1 (infer), a dimension of another value, unknown."""


def reshaped_axis(node: ir.Node, axis: int) -> tuple[int, list[int]] | None:
    """The input axis of a Reshape that equals ``axis`` of its output, and an equivalent constant shape.

    The entry of the shape at ``axis`` may be replaced when the input is cut along that axis. ``None`` if
    elements of other axes are mixed in, or if that is not known.
    """
    x, entries = node.inputs[0], _entries(node)
    if x is None or x.shape is None or entries is None or int_attribute(node, "allowzero", 0):
        return None
    tail = _tail(node, entries, axis)
    before = _axis_with_tail(x, tail, axis)
    lead = None if before is None else _lead(x, entries, axis, before)
    return None if lead is None or before is None or tail is None else (before, [*lead, *tail])


def _entries(node: ir.Node) -> list[Entry] | None:
    numbers = constant(node.inputs[1])
    if numbers is not None:
        return [int(n) for n in numbers.reshape(-1)]
    concat = producer(node.inputs[1], "Concat")
    if concat is None:
        return None
    entries: list[Entry] = []
    for part in concat.inputs:
        numbers = constant(part)
        if numbers is not None:
            entries += [int(n) for n in numbers.reshape(-1)]
            continue
        copied = copied_dimensions(part)
        if copied is None and static_shape(part) != (1,):
            return None
        entries += [None] if copied is None else [Copied(*place) for place in copied]
    return entries


def _tail(node: ir.Node, entries: list[Entry], axis: int) -> list[int] | None:
    """The sizes after ``axis``: those in the shape, or those that consuming matrix products require."""
    shape = node.outputs[0].shape
    tail: list[int] = []
    for i in range(axis + 1, len(entries)):
        entry, known = entries[i], None if shape is None else shape[i]
        if isinstance(entry, int) and entry > 0:
            tail.append(entry)
        elif isinstance(known, int):
            tail.append(known)
        elif i == len(entries) - 1 and (columns := _columns_read(node.outputs[0])) is not None:
            tail.append(columns)
        else:
            return None
    return tail


def _columns_read(value: ir.Value) -> int | None:
    """The size of the last axis, from a product with a constant matrix that consumes the value."""
    for use in value.uses():
        weight = constant(use.node.inputs[1]) if is_op(use.node, "MatMul") and use.idx == 0 else None
        if weight is not None and weight.ndim == 2:
            return int(weight.shape[0])
    return None


def _axis_with_tail(x: ir.Value, tail: list[int] | None, axis: int) -> int | None:
    """The axis of ``x`` followed by as many elements as ``tail`` has; ``axis`` itself if several match."""
    if tail is None or not prod(tail) or x.shape is None:
        return None
    sizes = list(x.shape)
    fit = [a for a in range(len(sizes)) if _product(sizes[a + 1 :]) == prod(tail)]
    return axis if axis in fit else fit[0] if len(fit) == 1 else None


def _product(sizes: Sequence[int | ir.SymbolicDim]) -> int | None:
    known = [d for d in sizes if isinstance(d, int)]
    return prod(known) if len(known) == len(sizes) else None


def _lead(x: ir.Value, entries: list[Entry], axis: int, before: int) -> list[int] | None:
    """The shape up to ``axis`` in numbers, if it ends at axis ``before`` of ``x`` with an equal tail."""
    assert x.shape is not None
    asked = entries[: axis + 1]
    numbers = [e for e in asked if isinstance(e, int)]
    if len(numbers) == len(asked) and asked[-1] == x.shape[before] and (before == axis or 0 not in numbers):
        return numbers  # the axis is as long, so as many elements precede it too
    if before != axis or not all(_no_larger(x, i, e) for i, e in enumerate(asked)):
        return None
    # The number of elements is the same. So if none is inferred and none is larger, none is smaller; and if
    # all others are the same, so is the inferred one.
    worked_out = asked.count(-1) == 1
    return None if worked_out and len(numbers) < len(asked) else [0] * len(asked)


def _no_larger(x: ir.Value, axis: int, entry: Entry) -> bool:
    """Whether the new dimension is at most that of ``x`` (and equal, if a number), or inferred."""
    assert x.shape is not None
    if isinstance(entry, Copied):
        return _grows_from(x, axis, entry)
    return entry in (0, -1) or (entry is not None and entry == x.shape[axis])


def _grows_from(x: ir.Value, axis: int, source: Copied) -> bool:
    """Whether ``axis`` of ``x`` is that of ``source`` or a broadcast of it, which is not smaller."""
    seen: set[tuple[ir.Value, int]] = set()
    waiting = [(x, axis)]
    while waiting and len(seen) < _MOST_STEPS:
        value, at = waiting.pop()
        if (value, at) in seen:
            continue
        seen.add((value, at))
        if (value is source.value and at == source.axis) or _same_name(value, at, source):
            return True
        node = value.producer()
        if node is not None:
            waiting += _sources(node, at)
    return False


def _same_name(value: ir.Value, axis: int, source: Copied) -> bool:
    if value.shape is None or source.value.shape is None or source.axis >= len(source.value.shape):
        return False
    a, b = value.shape[axis], source.value.shape[source.axis]
    if isinstance(a, int) or isinstance(b, int):
        return False
    return a.value is not None and a.value == b.value and "?" not in a.value


def _sources(node: ir.Node, axis: int) -> list[tuple[ir.Value, int]]:
    """The input axes that ``axis`` of the output equals, or is a broadcast of."""
    out = node.outputs[0]
    if out.shape is None or node.domain not in ("", "ai.onnx") or not node.inputs:
        return []
    op, from_end = node.op_type, axis - len(out.shape)
    x = node.inputs[0]
    if x is None or x.shape is None:
        return []
    if op in _LIKE_FIRST:
        return [(x, axis)]
    if op in _BROADCASTING or (op == "MatMul" and from_end < -2):
        return [
            (v, len(v.shape) + from_end)
            for v in node.inputs
            if v is not None and v.shape is not None and len(v.shape) >= -from_end
        ]
    if op == "MatMul":
        return [(x, len(x.shape) - 2)] if from_end == -2 and len(x.shape) > 1 else []
    if op == "Transpose":
        return [(x, (ints_attribute(node, "perm") or list(range(len(out.shape)))[::-1])[axis])]
    if op == "Gather" and int_attribute(node, "axis", 0) == 0:
        index = node.inputs[1]
        return [(index, axis)] if index is not None and index.shape and axis < len(index.shape) else []
    if op == "Reshape":
        entry = (_entries(node) or [None] * len(out.shape))[axis]
        if isinstance(entry, Copied):
            return [(entry.value, entry.axis)]
        return [(x, axis)] if entry == 0 and not int_attribute(node, "allowzero", 0) else []
    return []
