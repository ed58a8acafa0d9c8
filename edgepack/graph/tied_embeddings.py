"""Tied embeddings: a table used by a Gather, and transposed by a MatMul or Gemm.

Given (a language model, whose output layer multiplies with the table of its input embedding)::

    Gather(table, ids) -> x ... MatMul(h, weight) -> logits,  weight = transposed table

Some exporters write one constant and a Transpose, others two constants. Stages that work on weights need the
second, in which every weight is a constant; a file is smaller with the first. This module converts both ways.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import LAZY_BYTES, clone, constant, constant_tensor, dims, name_of, new_initializer

LEAST_ELEMENTS = 1024
"""Least bytes of a table: for a smaller one the added Transpose takes as many bytes as it saves."""


def tied_weights(graph: ir.Graph) -> dict[str, str]:
    """MatMul or Gemm weights that equal a table or its transpose: table names by weight names.

    Every Gather of a table selects rows. ``MatMul`` and ``Gemm`` multiply with its transpose, ``Gemm`` with
    ``transB`` with the table itself.
    """
    tables = list(tables_of(graph))
    found: dict[str, str] = {}
    for node in graph if tables else ():
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or (tensor := constant_tensor(weight)) is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        by_rows = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        for table in tables:
            if weight is table if by_rows else _is_transposed(table, weight):
                found[name_of(weight)] = name_of(table)
                break
    return found


def one_copy(model: ir.Model) -> ir.Model:
    """A copy of ``model`` for a file or for training: see :func:`as_transposes`."""
    made = clone(model)
    as_transposes(made)
    return made


def as_transposes(model: ir.Model) -> dict[str, str]:
    """Replace tables that are a weight's transpose by a Transpose, in place; weight names by table names.

    Given: constants ``table`` and ``weight``. Result: ``table = Transpose(weight)``, which a runtime computes
    when it loads the file. The weight remains the initializer: kernels require a constant weight before
    constant folding, and Gather does not.
    """
    graph, found = model.graph, {}
    for table in list(tables_of(graph)):
        if table.is_graph_output():
            continue
        weight = next((v for v in graph.initializers.values() if _is_transposed(table, v)), None)
        if weight is None or weight is table:
            continue
        name = name_of(table)
        node = ir.node("Transpose", [weight], attributes={"perm": [1, 0]}, name=f"{name}_transposed")
        out = node.outputs[0]
        out.type, out.shape = table.type, table.shape
        graph.insert_before(graph[0], node)
        table.replace_all_uses_with(out)
        del graph.initializers[name]
        table.name, out.name = f"{name}_before", name
        found[name] = name_of(weight)
    return found


def fold_transpose(main: ir.Graph, node: ir.Node) -> bool:
    """Replace a Transpose of a constant, of any size, by a constant; returns whether ``node`` is one.

    A large constant is transposed whenever it is read, and not kept in memory.
    """
    source = constant_tensor(node.inputs[0])
    out = node.outputs[0]
    if node.op_type != "Transpose" or source is None or out.is_graph_output():
        return False
    rank = len(dims(source))
    order = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    turned = new_initializer(main, f"{name_of(out)}_folded", transposed(source, order))
    out.replace_all_uses_with(turned)
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)
    return True


def transposed(source: ir.TensorProtocol, order: list[int]) -> ir.TensorProtocol:
    """A tensor with its axes permuted: computed now, or for a large tensor whenever it is read."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(source.numpy().transpose(order)))

    if source.nbytes <= LAZY_BYTES:
        return compute()
    sizes = dims(source)
    shape = ir.Shape([sizes[axis] for axis in order])
    return ir.LazyTensor(compute, dtype=source.dtype, shape=shape, name=source.name)


def tables_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Constants of two dimensions whose Gathers all select rows."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size < LEAST_ELEMENTS:
            continue
        picking = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
        if picking and all(node.attributes.get_int("axis", 0) in (0, -2) for node in picking):
            yield value


def _is_transposed(table: ir.Value, weight: ir.Value) -> bool:
    """Whether one constant is the transpose of the other; reads data only if the shapes fit."""
    left, right = constant_tensor(table), constant_tensor(weight)
    if left is None or right is None or left.dtype != right.dtype or dims(left) != dims(right)[::-1]:
        return False
    first, second = _array(table), _array(weight)
    return np.array_equal(first[0], second[:, 0]) and np.array_equal(first, second.T)


def _array(value: ir.Value) -> Array:
    array = constant(value)
    assert array is not None
    return array
