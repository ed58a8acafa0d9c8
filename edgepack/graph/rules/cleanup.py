"""Rules that remove nodes which do nothing, or which the following node makes redundant."""

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.rule import (
    DONE,
    Outcome,
    Rule,
    bypass,
    int_attribute,
    ints_attribute,
    producer,
    remove,
    same_number,
    static_shape,
    substitute,
)
from edgepack.graph.tied_embeddings import fold_transpose
from edgepack.ir.model import constant, fresh_name, new_initializer, only_consumer


def drop_no_op(main: ir.Graph, node: ir.Node) -> Outcome:
    """Remove a node whose output is its input.

    Given::  y = Identity(x), Dropout(x), Cast to the same type, Transpose/Reshape/Slice/Expand/Pad that
             change nothing, Concat of one input, Mul or Div by 1, Add or Sub of 0
    Result:: x
    """
    value = _unchanged_input(node)
    if value is None or any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return None
    out = node.outputs[0]
    if not bypass(out, value):
        return "its input or output must keep its own name" if node.op_type != "Identity" else None
    remove(node)
    return DONE


def _unchanged_input(node: ir.Node) -> ir.Value | None:
    """The input that a node passes on unchanged, or ``None``."""
    x = node.inputs[0] if node.inputs else None
    if x is None:
        return None
    op = node.op_type
    if op in ("Add", "Mul"):
        other = node.inputs[1]
        neutral = 0.0 if op == "Add" else 1.0
        if constant(x) is not None:
            x, other = other, x
        return x if _neutral(x, other, node, neutral) else None
    same = (
        op == "Identity"
        or (op == "Dropout" and not _trains(node))
        or (op == "Cast" and x.dtype is not None and x.dtype == int_attribute(node, "to", -1))
        or (op == "Transpose" and _is_identity_permutation(node))
        or (op == "Concat" and len(node.inputs) == 1)
        or (op in ("Sub", "Div") and _neutral(x, node.inputs[1], node, 0.0 if op == "Sub" else 1.0))
        or (op in ("Reshape", "Slice", "Expand", "Pad", "Flatten") and _same_static_shape(node))
    )
    return x if same else None


def _trains(dropout: ir.Node) -> bool:
    mode = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    return mode is not None and not same_number(mode, 0)


def _is_identity_permutation(node: ir.Node) -> bool:
    perm = ints_attribute(node, "perm")
    return bool(perm) and perm == list(range(len(perm)))


def _same_static_shape(node: ir.Node) -> bool:
    before = static_shape(node.inputs[0])
    same = before is not None and before == static_shape(node.outputs[0])
    if not same or node.op_type == "Pad":
        pads = constant(node.inputs[1]) if node.op_type == "Pad" and len(node.inputs) > 1 else None
        return pads is not None and not pads.any()
    if node.op_type == "Slice":  # a negative step reverses the data
        steps = constant(node.inputs[4]) if len(node.inputs) > 4 else None
        return len(node.inputs) < 5 or (steps is not None and bool((steps > 0).all()))
    return True


def _neutral(x: ir.Value | None, other: ir.Value | None, node: ir.Node, number: float) -> bool:
    """Whether ``other`` is full of ``number`` and does not broadcast ``x`` to another shape."""
    array = constant(other)
    if x is None or array is None or not np.issubdtype(array.dtype, np.number) or not (array == number).all():
        return False
    if array.ndim == 0:
        return True
    if x.shape is None or array.ndim > len(x.shape):
        return False
    tail = list(x.shape)[len(x.shape) - array.ndim :]
    return all(size in (1, dim) for size, dim in zip(array.shape, tail, strict=True))


def merge_transposes(main: ir.Graph, node: ir.Node) -> Outcome:
    """Merge two Transposes.

    Given::  y = Transpose(Transpose(x, perm=p), perm=q)
    Result:: y = Transpose(x, perm=p[q])        (removed by drop_no_op when that is 0, 1, 2...)
    """
    first = producer(node.inputs[0], "Transpose")
    if first is None or first.graph is not node.graph:
        return None
    p, q = ints_attribute(first, "perm"), ints_attribute(node, "perm")
    if not p or not q:
        return None
    substitute(node, "Transpose", [first.inputs[0]], perm=[p[i] for i in q])
    return DONE


def merge_reshapes(main: ir.Graph, node: ir.Node) -> Outcome:
    """Drop the first of two Reshapes.

    Given::  y = Reshape(Reshape(x, a), b) with a constant b that copies no dimension (no 0)
    Result:: y = Reshape(x, b)
    """
    first = producer(node.inputs[0], "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    shape = constant(node.inputs[1])
    if first is None or shape is None or first.graph is not node.graph:
        return None
    if (shape == 0).any() and not int_attribute(node, "allowzero", 0):
        return None  # 0 copies a dimension of the shape in between
    node.replace_input_with(0, first.inputs[0])
    return DONE


def constant_reshape(main: ir.Graph, node: ir.Node) -> Outcome:
    """Make the shape of a Reshape constant if dimensions are only copied, and at most one is inferred.

    Given::  y = Reshape(x, Concat(Shape(x)[0], n, [64]))         dimension 0 at index 0, and so on
    Result:: y = Reshape(x, [0, -1, 64])                         0 means "copy", -1 "infer"
    """
    x, concat = node.inputs[0], producer(node.inputs[1], "Concat")
    if x is None or concat is None:
        return None
    shape: list[int] = []
    for part in concat.inputs:
        numbers = constant(part)
        if numbers is not None:
            if not numbers.all() and int_attribute(node, "allowzero", 0):
                return "it has a dimension of size 0"
            shape += numbers.tolist()
            continue
        copied = copied_dimensions(part)
        if copied is None and static_shape(part) != (1,):
            return "it computes its shape at run time"
        if copied is None:
            shape.append(-1)
        for place in copied or []:
            shape.append(0 if _same_dimension(x, len(shape), *place) else -1)
    if shape.count(-1) > 1:
        return "it computes several dimensions at run time"
    value = new_initializer(main, f"{concat.outputs[0].name}_constant", np.array(shape, np.int64))
    node.replace_input_with(1, value)
    node.attributes.pop("allowzero", None)
    return DONE


def copied_dimensions(value: ir.Value | None) -> list[tuple[ir.Value, int]] | None:
    """``[(y, i), (y, k)]`` when ``value`` is the vector ``Shape(y)[[i, k]]``, however it is computed."""
    size = static_shape(value)
    if size is None or len(size) != 1:
        return None
    inner = _through(value, *(("Unsqueeze", "Squeeze", "Reshape", "Cast") if size == (1,) else ("Cast",)))
    part = producer(inner, "Shape")
    if part is not None and part.inputs[0] is not None and int_attribute(part, "start", 0) >= 0:
        start = int_attribute(part, "start", 0)
        return [(part.inputs[0], start + i) for i in range(size[0])]
    pick = producer(inner, "Gather", "Slice")
    shape = None if pick is None else producer(_through(pick.inputs[0], "Cast"), "Shape")
    first = None if pick is None else constant(pick.inputs[1])
    if pick is None or shape is None or shape.attributes or shape.inputs[0] is None or first is None:
        return None
    y = shape.inputs[0]
    indices = [int(i) for i in first.reshape(-1)]
    if pick.op_type == "Slice":  # of one axis
        if len(indices) != 1 or (len(pick.inputs) > 4 and not same_number(pick.inputs[4], 1)):
            return None
        indices = [indices[0] + i for i in range(size[0])]
    if y.shape is None or len(indices) != size[0]:
        return None
    places = [(y, i + len(y.shape) if i < 0 else i) for i in indices]
    return places if all(0 <= i < len(y.shape) for _, i in places) else None


def _through(value: ir.Value | None, *ops: str) -> ir.Value | None:
    """The value before a chain of ``ops`` that keep its single element."""
    while (node := producer(value, *ops)) is not None:
        value = node.inputs[0]
    return value


def _same_dimension(x: ir.Value, i: int, y: ir.Value, k: int) -> bool:
    """Whether dimension ``i`` of ``x`` is always dimension ``k`` of ``y``: the same, or of the same name."""
    if x.shape is None or i >= len(x.shape):
        return False
    if x is y:
        return i == k
    if y.shape is None or k >= len(y.shape):
        return False
    a, b = x.shape[i], y.shape[k]
    if isinstance(a, int) or isinstance(b, int) or a.value is None:
        return False
    return a.value == b.value and "?" not in a.value  # Paddle writes ? for unknown dimensions


def constant_transpose(main: ir.Graph, node: ir.Node) -> Outcome:
    """Transpose a constant of any size; constant folding skips large ones.

    Given::  y = Transpose(constant)
    Result:: y is a constant
    """
    return DONE if fold_transpose(main, node) else None


def slice_of_shape(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace a Slice by a Gather, which constant folding supports for a partly known shape.

    Given::  y = Slice(Shape(x), [2], [4])
    Result:: y = Gather(Shape(x), [2, 3])
    """
    shape = producer(node.inputs[0], "Shape")
    x = None if shape is None else shape.inputs[0]
    if shape is None or x is None or x.shape is None or shape.attributes or len(node.inputs) < 3:
        return None
    numbers = [constant(v) for v in node.inputs[1:]]
    if any(n is None or n.size != 1 for n in numbers):
        return None
    start, end, _, step = [int(n.item()) for n in numbers if n is not None] + [0, 1][len(numbers) - 2 :]
    taken = np.arange(len(x.shape), dtype=np.int64)[start:end:step]
    index = new_initializer(main, f"{node.outputs[0].name}_index", taken)
    substitute(node, "Gather", [shape.outputs[0], index], axis=0)
    return DONE


def expanded_sizes(main: ir.Graph, node: ir.Node) -> Outcome:
    """Simplify the sizes of an Expand as PyTorch exports them: -1 keeps an axis, and so does 1.

    Given::  y = Where(s == [-1, -1 ...], [1, 1 ...], s), s = Concat(sizes of shapes, constants)
    Result:: y = Concat(the same, 1 where a constant was -1)
    """
    same, ones, other = (node.inputs[0], constant(node.inputs[1]), node.inputs[2])
    equal, concat = producer(same, "Equal"), producer(other, "Concat")
    if equal is None or concat is None or ones is None or not (ones == 1).all() or other not in equal.inputs:
        return None
    against = constant(equal.inputs[1 if equal.inputs[0] is other else 0])
    if against is None or not (against == -1).all() or max(ones.ndim, against.ndim) > 1:
        return None
    parts: list[ir.Value | None] = []
    for part in concat.inputs:
        numbers = constant(part)
        if numbers is None and copied_dimensions(part) is None:
            return "it computes a size at run time that may be negative"
        if numbers is not None and (numbers == -1).any():
            name = f"{node.outputs[0].name}_sizes"
            part = new_initializer(main, name, np.where(numbers == -1, 1, numbers))  # noqa: PLW2901
        parts.append(part)
    substitute(node, "Concat", parts, axis=0)
    return DONE


def gather_vector(main: ir.Graph, node: ir.Node) -> Outcome:
    """Gather with an index vector, the only case that constant folding supports; :func:`gather_scalar` undoes
    it.

    Given::  y = Gather(Shape(x), 2)
    Result:: y = Reshape(Gather(Shape(x), [2]), [])
    """
    shape, index = producer(node.inputs[0], "Shape"), constant(node.inputs[1])
    if shape is None or index is None or index.ndim > 0:
        return None
    vector = new_initializer(main, f"{node.outputs[0].name}_index", index.reshape(1))
    gather = ir.node("Gather", [shape.outputs[0], vector], attributes={"axis": 0})
    gather.outputs[0].name = fresh_name(main, f"{node.outputs[0].name}_vector")
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, gather)
    scalar = new_initializer(main, f"{node.outputs[0].name}_shape", np.zeros(0, np.int64))
    substitute(node, "Reshape", [gather.outputs[0], scalar])
    return DONE


def gather_scalar(main: ir.Graph, node: ir.Node) -> Outcome:
    """Gather with a scalar index.

    Given::  y = Reshape(Gather(x, [2]), [])
    Result:: y = Gather(x, 2)
    """
    gather, shape = producer(node.inputs[0], "Gather"), constant(node.inputs[1])
    index = None if gather is None else constant(gather.inputs[1])
    if gather is None or shape is None or index is None or shape.size or index.shape != (1,):
        return None
    if gather.inputs[0] is None or gather.inputs[0].shape is None or len(gather.inputs[0].shape) != 1:
        return None
    scalar = new_initializer(main, f"{node.outputs[0].name}_index", index.reshape(()))
    substitute(node, "Gather", [gather.inputs[0], scalar], axis=0)
    return DONE


def drop_flatten(main: ir.Graph, node: ir.Node) -> Outcome:
    """Remove what the converter to opset 13 inserts around a Softmax of the last axis.

    Given::  y = Reshape(Softmax(Flatten(x, axis=last)), Shape(x))          also LogSoftmax, Hardmax
    Result:: y = Softmax(x, axis=-1)
    """
    softmax = producer(node.inputs[0], "Softmax", "LogSoftmax", "Hardmax")
    flatten = None if softmax is None else producer(softmax.inputs[0], "Flatten")
    shape = producer(node.inputs[1], "Shape")
    if softmax is None or flatten is None or shape is None or shape.attributes:
        return None
    x = flatten.inputs[0]
    if x is None or x is not shape.inputs[0] or x.shape is None or flatten.graph is not node.graph:
        return None
    last = len(x.shape) - 1
    if int_attribute(flatten, "axis", 1) not in (last, -1) or int_attribute(softmax, "axis", -1) not in (
        1,
        -1,
    ):
        return "it normalizes over more than the last axis"
    substitute(node, softmax.op_type, [x], axis=-1)
    return DONE


def merge_clips(main: ir.Graph, node: ir.Node) -> Outcome:
    """Merge a Clip or Relu with the one before it.

    Given::  y = Clip(Clip(x, a, b), c, d), Clip(Relu(x), 0, d), Relu(Clip(x, 0, b)), Relu(Relu(x))
    Result:: y = Clip(x, max(a, c), min(b, d)), or the one that implies the other
    """
    first = producer(node.inputs[0], "Clip", "Relu")
    if first is None or only_consumer(first.outputs[0]) is not node:
        return None
    low, high, first_low, first_high = *_bounds(node), *_bounds(first)
    if any(b is None for b in (low, high, first_low, first_high)):
        return None
    assert low is not None and high is not None and first_low is not None and first_high is not None
    if low <= first_low and high >= first_high:  # the second changes nothing
        if not bypass(node.outputs[0], first.outputs[0]):
            return None
        remove(node)
        return DONE
    if low >= first_low and high <= first_high:  # the first is implied by the second
        node.replace_input_with(0, first.inputs[0])
        return DONE
    return "the two clips overlap and neither contains the other"


def _bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Lower and upper bound of a Relu or Clip; ``None`` where a bound is computed at run time."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds: list[float | None] = [-np.inf, np.inf]
    for i in (1, 2):
        if len(node.inputs) > i and node.inputs[i] is not None:
            array = constant(node.inputs[i])
            bounds[i - 1] = None if array is None else float(array.item())
    return bounds[0], bounds[1]


BEFORE_FOLDING: tuple[Rule, ...] = (Rule("gather_vector", frozenset({"Gather"}), gather_vector),)
AFTER_FOLDING: tuple[Rule, ...] = (Rule("gather_scalar", frozenset({"Reshape"}), gather_scalar),)
CLEANING: tuple[Rule, ...] = (
    Rule(
        "drop_no_op",
        frozenset(
            {"Identity", "Dropout", "Cast", "Transpose", "Concat", "Reshape", "Slice", "Expand", "Pad"}
            | {"Flatten", "Add", "Sub", "Mul", "Div"}
        ),
        drop_no_op,
    ),
    Rule("merge_transposes", frozenset({"Transpose"}), merge_transposes),
    Rule("constant_transpose", frozenset({"Transpose"}), constant_transpose),
    Rule("expanded_sizes", frozenset({"Where"}), expanded_sizes),
    Rule("slice_of_shape", frozenset({"Slice"}), slice_of_shape),
    Rule("constant_reshape", frozenset({"Reshape"}), constant_reshape),
    Rule("drop_flatten", frozenset({"Reshape"}), drop_flatten),
    Rule("merge_reshapes", frozenset({"Reshape"}), merge_reshapes),
    Rule("merge_clips", frozenset({"Clip", "Relu"}), merge_clips),
)
