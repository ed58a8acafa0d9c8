"""Softmax over channels, in the form that the runtime computes fast.

onnxruntime 1.32 merges the transposes around a Softmax into its axis, and computes any axis but the last
element by element: 286 µs for [1, 80, 22, 22], against 33 µs as rows. A change of shape between the transpose
and the Softmax keeps it from doing so.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepack.model import fresh_name, new_initializer
from edgepack.rules import DONE, Outcome, Rule, int_attribute, ints_attribute, producer, substitute

_LEAST_RANK = 3


def softmax_on_rows(main: ir.Graph, node: ir.Node) -> Outcome:
    """Compute a Softmax of another axis than the last, or behind a Transpose, on a matrix.

    Given::  y = Softmax(x, axis=1)          x is [n, 80, 22, 22]
    Result:: y = Transpose(Reshape(Softmax(Reshape(Transpose(x), [-1, 80])), [-1, 22, 22, 80]))
    """
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) < _LEAST_RANK:
        return None
    rank = len(x.shape)
    axis = int_attribute(node, "axis", -1) % rank
    turned = producer(x, "Transpose")
    if axis == rank - 1 and (turned is None or not _moves_last(turned, rank)):
        return None
    to_last = [i for i in range(rank) if i != axis] + [axis]
    sizes = [x.shape[i] for i in to_last]
    if sum(not isinstance(d, int) for d in sizes) > 1 or not isinstance(sizes[-1], int):
        return "more than one size is unknown, so the rows could not take their shape back"
    known = [d if isinstance(d, int) else -1 for d in sizes]
    assert isinstance(node.graph, ir.Graph)
    base = node.outputs[0].name
    value = x
    if axis != rank - 1:
        value = _new(main, node, "Transpose", [x], sizes, f"{base}_last", perm=to_last)
    rows = new_initializer(main, f"{base}_rows_shape", np.array([-1, known[-1]], np.int64))
    value = _new(main, node, "Reshape", [value, rows], [None, sizes[-1]], f"{base}_rows")
    value = _new(main, node, node.op_type, [value], [None, sizes[-1]], f"{base}_on_rows", axis=-1)
    back = new_initializer(main, f"{base}_back_shape", np.array(known, np.int64))
    if axis == rank - 1:
        substitute(node, "Reshape", [value, back])
        return DONE
    value = _new(main, node, "Reshape", [value, back], sizes, f"{base}_back")
    substitute(node, "Transpose", [value], perm=[int(i) for i in np.argsort(to_last)])
    return DONE


def _moves_last(transpose: ir.Node, rank: int) -> bool:
    order = ints_attribute(transpose, "perm") or list(range(rank))[::-1]
    return order[-1] != rank - 1


def _new(
    main: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], sizes: Sequence[object], name: str,
    **attributes: object,
) -> ir.Value:  # fmt: skip
    node = ir.node(op_type, inputs, attributes=attributes)  # type: ignore[arg-type]
    out = node.outputs[0]
    out.name, out.type = fresh_name(main, name), inputs[0].type
    out.shape = ir.Shape(sizes)  # type: ignore[arg-type]
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, node)
    return out


ROWS: tuple[Rule, ...] = (Rule("softmax_on_rows", frozenset({"Softmax", "LogSoftmax"}), softmax_on_rows),)
