"""Rules for selections and stackings: exporters write ``x[:, i, j]`` and ``stack`` as many small nodes.

In a model of 20 µs the overhead of each node costs as much as the arithmetic.
"""

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
    remove,
    substitute,
)
from edgepack.ir.model import constant, fresh_name, new_initializer

# Fewest inputs of a Concat that select from one tensor and are worth a rewrite.
_RUN = 2


def gather_keeps_axis(main: ir.Graph, node: ir.Node) -> Outcome:
    """Merge a Gather that drops an axis and the Unsqueeze that adds it again.

    Given::  y = Unsqueeze(Gather(x, 3, axis=a), [a])
    Result:: y = Gather(x, [3], axis=a)
    """
    gather = producer(node.inputs[0], "Gather")
    index = None if gather is None else constant(gather.inputs[1])
    axes = _axes(node)
    if gather is None or index is None or index.ndim or axes is None or len(axes) != 1:
        return None
    rank = _rank(gather.inputs[0])
    if rank is None or _axis(gather, rank) != axes[0] % rank or gather.graph is not node.graph:
        return None
    vector = new_initializer(main, f"{node.outputs[0].name}_index", index.reshape(1))
    substitute(node, "Gather", [gather.inputs[0], vector], axis=axes[0] % rank)
    return DONE


def gather_of_gather(main: ir.Graph, node: ir.Node) -> Outcome:
    """Merge Gathers along two adjacent axes into one along the flattened axis.

    Given::  y = Gather(Gather(x, 2, axis=1), [0, 1], axis=1)          x is [n, 4, 5]
    Result:: y = Gather(Reshape(x, [0, 20]), [10, 11], axis=1)
    """
    first = producer(node.inputs[0], "Gather")
    outer = None if first is None else constant(first.inputs[1])
    inner = constant(node.inputs[1])
    if first is None or outer is None or outer.ndim or inner is None or inner.ndim != 1:
        return None
    x = first.inputs[0]
    if x is None or x.shape is None or constant(x) is not None or first.graph is not node.graph:
        return None
    rank = len(x.shape)
    axis = _axis(first, rank)
    sizes = [d if isinstance(d, int) else None for d in x.shape]
    if axis == rank - 1 or _axis(node, rank - 1) != axis or None in sizes[axis:]:
        return None
    rows, columns = int(sizes[axis] or 0), int(sizes[axis + 1] or 0)
    flat = _flattened(main, node, x, [0] * axis + [rows * columns, *(int(s or 0) for s in sizes[axis + 2 :])])
    index = (int(outer) % rows) * columns + inner % columns
    selected = new_initializer(main, f"{node.outputs[0].name}_index", index.astype(np.int64))
    substitute(node, "Gather", [flat, selected], axis=axis)
    return DONE


def _flattened(main: ir.Graph, before: ir.Node, x: ir.Value, shape: list[int]) -> ir.Value:
    """``x`` reshaped, by an existing node or by a new one."""
    for use in x.uses():
        there = constant(use.node.inputs[1]) if is_op(use.node, "Reshape") and use.idx == 0 else None
        if there is not None and there.tolist() == shape and use.node in _before(before):
            return use.node.outputs[0]
    sizes = new_initializer(main, f"{x.name}_flat_shape", np.array(shape, np.int64))
    new = ir.node("Reshape", [x, sizes])
    out = new.outputs[0]
    out.name, out.type = fresh_name(main, f"{x.name}_flat"), x.type
    assert x.shape is not None
    out.shape = ir.Shape([d if d else x.shape[i] for i, d in enumerate(shape)])
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, new)
    return out


def _before(node: ir.Node) -> set[ir.Node]:
    assert isinstance(node.graph, ir.Graph)
    found: set[ir.Node] = set()
    for other in node.graph:
        if other is node:
            break
        found.add(other)
    return found


def concat_of_gathers(main: ir.Graph, node: ir.Node) -> Outcome:
    """Merge Gathers from one tensor that are adjacent inputs of a Concat.

    Given::  y = Concat(Gather(x, [1]), Gather(x, [4, 2]), z)          all along the axis of the Concat
    Result:: y = Concat(Gather(x, [1, 4, 2]), z)
    """
    rank = _rank(node.outputs[0])
    if rank is None:
        return None
    axis = _axis(node, rank)
    merged: list[ir.Value | None] = []
    run: list[ir.Node] = []
    shortened = False

    def close() -> None:
        nonlocal shortened
        if len(run) >= _RUN:
            shortened = True
            merged.append(_one_gather(main, node, run, axis))
        else:
            merged.extend(g.outputs[0] for g in run)
        run.clear()

    for value in node.inputs:
        gather = _selection(value, axis)
        if gather is None or (run and run[0].inputs[0] is not gather.inputs[0]):
            close()
        if gather is None:
            merged.append(value)
        else:
            run.append(gather)
    close()
    if not shortened:
        return None
    substitute(node, "Concat", merged, axis=axis)
    return DONE


def _selection(value: ir.Value | None, axis: int) -> ir.Node | None:
    gather = producer(value, "Gather")
    index = None if gather is None else constant(gather.inputs[1])
    if gather is None or index is None or index.ndim != 1 or constant(gather.inputs[0]) is not None:
        return None
    rank = _rank(gather.inputs[0])
    return gather if rank is not None and _axis(gather, rank) == axis else None


def _one_gather(main: ir.Graph, before: ir.Node, run: list[ir.Node], axis: int) -> ir.Value:
    index = np.concatenate([constant(g.inputs[1]) for g in run]).astype(np.int64)
    base = before.outputs[0].name
    selected = new_initializer(main, f"{base}_index", index)
    new = ir.node("Gather", [run[0].inputs[0], selected], attributes={"axis": axis})
    out, old = new.outputs[0], run[0].outputs[0]
    out.name, out.type = fresh_name(main, f"{base}_selected"), old.type
    if old.shape is not None:
        out.shape = ir.Shape([len(index) if i == axis else d for i, d in enumerate(old.shape)])
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, new)
    return out


def stack_by_reshape(main: ir.Graph, node: ir.Node) -> Outcome:
    """Replace Unsqueeze and Concat by Concat along the next axis and Reshape, which costs nothing.

    Given::  y = Concat(Unsqueeze(a, [1]), Unsqueeze(b, [1]), axis=1)          a and b are [n, 5]
    Result:: y = Reshape(Concat(a, b, axis=1), [0, 2, 5])
    """
    rank = _rank(node.outputs[0])
    if rank is None or len(node.inputs) < _RUN:
        return None
    axis = _axis(node, rank)
    stacked = [producer(v, "Unsqueeze") for v in node.inputs]
    parts = [u.inputs[0] for u in stacked if u is not None and _axes(u) in ([axis], [axis - rank])]
    if len(parts) < len(node.inputs) or axis == rank - 1:
        return None
    shapes = [None if p is None or p.shape is None else tuple(p.shape) for p in parts]
    tail = None if shapes[0] is None else shapes[0][axis:]
    if tail is None or any(s != shapes[0] for s in shapes) or not all(isinstance(d, int) for d in tail):
        return None
    base = node.outputs[0].name
    join = ir.node("Concat", parts, attributes={"axis": axis})
    out = join.outputs[0]
    assert parts[0] is not None and shapes[0] is not None
    out.name, out.type = fresh_name(main, f"{base}_joined"), parts[0].type
    out.shape = ir.Shape([*shapes[0][:axis], len(parts) * int(tail[0]), *tail[1:]])  # type: ignore[arg-type]
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, join)
    sizes = np.array([0] * axis + [len(parts), *(int(d) for d in tail)], np.int64)  # type: ignore[arg-type]
    substitute(node, "Reshape", [out, new_initializer(main, f"{base}_shape", sizes)])
    return DONE


def flatten_of_reshape(main: ir.Graph, node: ir.Node) -> Outcome:
    """Remove a Reshape and the Flatten that undoes it.

    Given::  y = Flatten(Reshape(x, [0, 2, 5]), axis=1)          x is [n, 10]
    Result:: y = x
    """
    reshape = producer(node.inputs[0], "Reshape")
    shape = None if reshape is None else constant(reshape.inputs[1])
    if reshape is None or shape is None or int_attribute(node, "axis", 1) != 1 or not shape.size:
        return None
    x = reshape.inputs[0]
    if x is None or _rank(x) != 2 or shape[0] != 0 or int_attribute(reshape, "allowzero", 0):
        return None
    if node.outputs[0].is_graph_output():
        return None
    node.outputs[0].replace_all_uses_with(x)
    remove(node)
    return DONE


def _axes(node: ir.Node) -> list[int] | None:
    if len(node.inputs) > 1:
        axes = constant(node.inputs[1])
        return None if axes is None else [int(a) for a in axes.reshape(-1)]
    return ints_attribute(node, "axes") or None


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _axis(node: ir.Node, rank: int) -> int:
    return int_attribute(node, "axis", 0) % rank


INDEXING: tuple[Rule, ...] = (
    Rule("gather_keeps_axis", frozenset({"Unsqueeze"}), gather_keeps_axis),
    Rule("gather_of_gather", frozenset({"Gather"}), gather_of_gather),
    Rule("concat_of_gathers", frozenset({"Concat"}), concat_of_gathers),
    Rule("stack_by_reshape", frozenset({"Concat"}), stack_by_reshape),
    Rule("flatten_of_reshape", frozenset({"Flatten"}), flatten_of_reshape),
)
