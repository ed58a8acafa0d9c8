"""Tied tables: an embedding whose rows are looked up, and with whose transposed a product multiplies.

Given (a language model, whose last product compares with the rows of its first look-up)::

    Gather(table, ids) -> x ... MatMul(h, weight) -> logits,  weight = transposed table

Some exporters write one constant and a Transpose, others two constants. Everything that works on weights
wants the second, for then every weight is a constant; a file wants the first. This module knows both forms.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import LAZY_BYTES, clone, constant, constant_tensor, dims, name_of, new_initializer

LEAST_ELEMENTS = 1024
"""Of a table; the node that makes one constant of two takes as many bytes as this saves of a smaller one."""


def tied_weights(graph: ir.Graph) -> dict[str, str]:
    """Weights of products that are a table or its transposed: by their names the names of the tables.

    Of a table every look-up picks rows. ``MatMul`` and ``Gemm`` may multiply with its transposed, a ``Gemm``
    with ``transB`` with the table itself.
    """
    tables = list(tables_of(graph))
    found: dict[str, str] = {}
    for node in graph if tables else ():
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or (held := constant_tensor(weight)) is None or held.dtype != ir.DataType.FLOAT:
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
    """Write tables that are a weight's transposed as that, in place; gives the weight's name by the table's.

    Given: constants ``table`` and ``weight``. Result: ``table = Transpose(weight)``, which a runtime computes
    when it loads the file. The weight stays what it is: kernels want theirs constant before anything is
    folded, where a look-up takes what it gets.
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
    """Let a constant stand for a Transpose of one, whatever its size; returns whether ``node`` is that.

    A large one is transposed anew whenever it is read, and not kept in memory.
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
    """The axes of a tensor in another order: at once, or for a large one whenever it is read."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(source.numpy().transpose(order)))

    if source.nbytes <= LAZY_BYTES:
        return compute()
    sizes = dims(source)
    shape = ir.Shape([sizes[axis] for axis in order])
    return ir.LazyTensor(compute, dtype=source.dtype, shape=shape, name=source.name)


def tables_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Constants of two dimensions, all of whose look-ups pick rows."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size < LEAST_ELEMENTS:
            continue
        picking = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
        if picking and all(node.attributes.get_int("axis", 0) in (0, -2) for node in picking):
            yield value


def _is_transposed(table: ir.Value, weight: ir.Value) -> bool:
    """Whether two constants hold the same, one by rows and one by columns; reads what may be."""
    left, right = constant_tensor(table), constant_tensor(weight)
    if left is None or right is None or left.dtype != right.dtype or dims(left) != dims(right)[::-1]:
        return False
    first, second = _array(table), _array(weight)
    return np.array_equal(first[0], second[:, 0]) and np.array_equal(first, second.T)


def _array(value: ir.Value) -> Array:
    array = constant(value)
    assert array is not None
    return array
