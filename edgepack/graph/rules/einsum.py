"""Rewrite Einsum as MatMul: runtimes have (int8) kernels for MatMul, and few for Einsum.

Keras exports all of its attention as Einsum, JAX most of its matrix products.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.rule import DONE, Outcome, Rule, substitute
from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, fresh_name, new_initializer


class _Axes(NamedTuple):
    """The axes of an Einsum of two operands, by their letters, in the order of an operand that has them."""

    left: str
    right: str
    out: str
    batch: str
    """Batch axes: in both operands and the result."""
    summed: str
    """Summed axes: in both operands, not in the result."""
    rows: str
    """In the left operand and the result."""
    columns: str
    """In the right operand and the result."""


def einsum(main: ir.Graph, node: ir.Node) -> Outcome:
    """Rewrite an Einsum with a constant, or of two activations, as a MatMul.

    Given::  y = Einsum<"btd,hdk->bhtk">(x, w)
    Result:: y = Transpose(Reshape(MatMul(x, w [d, h*k]), [0, 0, h, k]))
    Given::  y = Einsum<"bqhd,bkhd->bhqk">(x, z)
    Result:: y = MatMul(Transpose(x), Transpose(z))
    """
    if len(node.inputs) != 2 or any(value is None for value in node.inputs):
        return f"{len(node.inputs)} operands"
    operands = [constant(value) for value in node.inputs]
    if all(array is not None for array in operands):
        return None  # constant folding handles it
    swapped = operands[0] is not None
    axes = _axes(node.attributes.get_string("equation", ""), swapped=swapped)
    if isinstance(axes, str):
        return axes
    x, y = node.inputs[::-1] if swapped else node.inputs
    weight = constant(y)
    assert x is not None
    assert y is not None
    if weight is not None:
        return _with_a_constant(main, node, axes, x, weight)
    if max(len(axes.summed), len(axes.rows), len(axes.columns)) > 1:
        return "two activations are summed over several axes"
    x = _turned(main, node, x, axes.left, axes.batch + axes.rows + axes.summed)
    y = _turned(main, node, y, axes.right, axes.batch + axes.summed + axes.columns)
    _finish(main, node, [("MatMul", [x, y])], axes.batch + axes.rows + axes.columns, axes.out)
    return DONE


def _axes(equation: str, *, swapped: bool) -> _Axes | str:
    """The axes of an equation of two operands, or the reason why it is no matrix product."""
    before, arrow, out = equation.replace(" ", "").partition("->")
    operands = before.split(",")
    if not arrow or "." in equation or len(operands) != 2:
        return "its equation leaves axes to be inferred"
    left, right = operands[::-1] if swapped else operands
    if any(len(set(letters)) < len(letters) for letters in (left, right, out)):
        return "an axis is repeated: a diagonal"
    if any(c not in out and not (c in left and c in right) for c in left + right):
        return "it sums over an axis of one operand"
    axes = _Axes(
        left,
        right,
        out,
        batch="".join(c for c in left if c in right and c in out),
        summed="".join(c for c in left if c in right and c not in out),
        rows="".join(c for c in left if c not in right),
        columns="".join(c for c in right if c not in left),
    )
    return axes if axes.summed and axes.rows and axes.columns else "a matrix-vector or outer product"


def _with_a_constant(main: ir.Graph, node: ir.Node, axes: _Axes, x: ir.Value, weight: Array) -> Outcome:
    if axes.batch:
        return "the constant has batch axes"
    sizes = dict(zip(axes.right, weight.shape, strict=True))
    kept = [0] * len(axes.rows)  # 0 in the shape of a Reshape: copy the dimension
    x = _turned(main, node, x, axes.left, axes.rows + axes.summed)
    inner = int(np.prod([sizes[c] for c in axes.summed]))
    if len(axes.summed) > 1:
        x = _before(main, node, "Reshape", [x, _numbers(main, node, [*kept, inner])])
    order = [axes.right.index(c) for c in axes.summed + axes.columns]
    matrix = np.ascontiguousarray(weight.transpose(order).reshape(inner, -1))
    base = node.inputs[0 if constant(node.inputs[0]) is not None else 1]
    assert base is not None
    stored = new_initializer(main, fresh_name(main, f"{base.name}_matrix"), matrix)
    steps: list[tuple[str, list[ir.Value | None]]] = [("MatMul", [x, stored])]
    if len(axes.columns) > 1:
        shape = _numbers(main, node, [*kept, *(sizes[c] for c in axes.columns)])
        steps.append(("Reshape", [None, shape]))
    _finish(main, node, steps, axes.rows + axes.columns, axes.out)
    return DONE


def _finish(
    main: ir.Graph,
    node: ir.Node,
    steps: list[tuple[str, list[ir.Value | None]]],
    have: str,
    want: str,
) -> None:
    """Replace ``node`` by a chain of operators, and transpose the axes into their order."""
    last: ir.Value | None = None
    turns = have != want
    for index, (op_type, inputs) in enumerate(steps):
        read = [last if value is None else value for value in inputs]
        if index == len(steps) - 1 and not turns:
            substitute(node, op_type, read)
            return
        last = _before(main, node, op_type, read)
    substitute(node, "Transpose", [last], perm=[have.index(c) for c in want])


def _turned(main: ir.Graph, node: ir.Node, value: ir.Value, have: str, want: str) -> ir.Value:
    if have == want:
        return value
    return _before(main, node, "Transpose", [value], perm=[have.index(c) for c in want])


def _before(
    main: ir.Graph, node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: list[int]
) -> ir.Value:
    made = ir.node(op_type, inputs, attributes=attributes, num_outputs=1)
    made.outputs[0].name = fresh_name(main, f"{node.outputs[0].name}_{op_type.lower()}")
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, made)
    return made.outputs[0]


def _numbers(main: ir.Graph, node: ir.Node, sizes: list[int]) -> ir.Value:
    name = fresh_name(main, f"{node.outputs[0].name}_shape")
    return new_initializer(main, name, np.asarray(sizes, np.int64))


EINSUM: tuple[Rule, ...] = (Rule("einsum", frozenset({"Einsum"}), einsum),)
