"""``onnx_ir`` models: constants, names, consumers.

Pitfalls of the IR that are handled here:

- a new ``ir.Value`` takes neither type nor shape from its ``const_value``: :func:`new_initializer` sets both;
- an initializer that is also a graph input is a default, not an input that a caller must feed.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from edgepack.errors import ModelError
from edgepack.ir.arrays import Array

LARGE_BYTES = 1_000_000_000
"""A model with more bytes of weights is large: no stage may hold all of its weights in memory."""
LAZY_BYTES = 16 << 20
"""A computed tensor larger than this is computed on each read and not cached."""


def clone(model: ir.Model) -> ir.Model:
    """An independent copy; tensors, which are never changed in place, are shared."""
    return model.clone()


def name_of(value: ir.Value) -> str:
    """The value's name; values in a loaded model always have one."""
    if value.name is None:
        raise ModelError(f"a value without a name: output of {value.producer()}")
    return value.name


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant node, also behind Identity; ``None`` if not constant.

    An initializer that is also a graph input is not constant: a caller may feed something else.
    """
    while value is not None:
        node = value.producer()
        if node is None:
            constant_here = value.is_initializer() and not value.is_graph_input()
            return value.const_value if constant_here else None
        if node.domain != "" or node.op_type not in ("Identity", "Constant"):
            return None
        if node.op_type == "Constant":
            return ir.convenience.get_const_tensor(value)
        value = node.inputs[0]
    return None


def constant(value: ir.Value | None) -> Array | None:
    """The array of a constant value (see :func:`constant_tensor`), or ``None``. Do not write to it."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(dims(tensor))


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The dimensions of a tensor, which are always known."""
    return tuple(d for d in tensor.shape if isinstance(d, int))


def fresh_name(graph: ir.Graph, base: str) -> str:
    """``base``, or ``base_1``, ``base_2``...: the first name that no value in ``graph`` or its subgraphs has.

    Pass the model's main graph: a subgraph does not know its outer graph.
    """
    taken: set[str | None] = set()
    for inner in (graph, *graph.subgraphs()):
        taken.update(v.name for v in inner.inputs)
        taken.update(inner.initializers)
        taken.update(v.name for node in inner for v in node.outputs)
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def new_initializer(graph: ir.Graph, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
    """Add an initializer to the main ``graph``, named ``name`` or, if that is taken, a derived name."""
    name = fresh_name(graph, name)
    # NumPy returns scalars for arrays without dimensions, so these are accepted too.
    tensor: ir.TensorProtocol
    if isinstance(content, np.ndarray | np.generic):
        tensor = ir.tensor(np.asarray(content), name=name)
    else:
        tensor = content
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=_shape(tensor), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_constant(model: ir.Model, name: str, content: Array) -> None:
    """Replace the content of the initializer ``name`` for all its consumers; type and shape may change.

    Raises:
        ModelError: no such initializer.
    """
    for graph in model.graphs():
        value = graph.initializers.get(name)
        if value is not None:
            tensor = ir.tensor(content, name=name)
            value.const_value, value.shape = tensor, _shape(tensor)
            value.type = ir.TensorType(tensor.dtype)
            return
    raise ModelError(f"the model has no initializer {name!r}")


def computed(
    source: ir.TensorProtocol, function: Callable[[Array], Array], dtype: ir.DataType | None = None
) -> ir.TensorProtocol:
    """``function`` applied to a tensor, same shape: computed now, or for a large tensor on each read.

    ``dtype``: the type of the result; by default that of ``source``.
    """
    made = dtype or source.dtype

    def compute() -> ir.TensorProtocol:
        # Not ascontiguousarray, which gives a scalar a dimension.
        return ir.tensor(np.asarray(function(source.numpy()), made.numpy(), order="C"))

    if source.nbytes <= LAZY_BYTES:
        return compute()
    return ir.LazyTensor(compute, dtype=made, shape=_shape(source), name=source.name)


def walk_nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """All nodes of ``graph`` in order, including subgraphs, each before the nodes of its subgraphs."""
    return iter(ir.traversal.RecursiveGraphIterator(graph))


def captured_values(graph: ir.Graph) -> set[str]:
    """Names of the values of ``graph`` that subgraphs of If, Loop or Scan capture."""
    captured = set()
    for inner in graph.subgraphs():
        used = [v for node in inner for v in node.inputs if v is not None]
        captured |= {name_of(v) for v in [*used, *inner.outputs] if v.graph is graph}
    return captured


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The only consumer of ``value``: one use, in the same graph, and ``value`` is no graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    ((node, _),) = uses
    return node if node.graph is value.graph else None
