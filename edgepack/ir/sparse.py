"""What ``onnx_ir`` does not read: sparse initializers, which it drops, and map types, which it refuses."""

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import walk_nodes


def undefined_input(model: ir.Model) -> tuple[str, str] | None:
    """The first node of the model that consumes a value which nothing defines, and the name of that value."""
    for node in walk_nodes(model.graph):
        for value in node.inputs:
            if value is None or value.producer() is not None:
                continue
            if not value.is_graph_input() and not value.is_initializer():
                return node.name or f"{node.op_type} without a name", value.name or ""
    return None


def load_dense(path: Path) -> ir.Model:
    """The model in the file ``path`` with its sparse initializers as dense ones, of all graphs.

    Raises:
        ValueError: indices and values of a sparse initializer do not fit its dimensions.
    """
    proto = onnx.load(path)  # noqa: TID251  # onnx_ir drops what this is about
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        for sparse in graph.sparse_initializer:
            graph.initializer.append(onnx.numpy_helper.from_array(dense_array(sparse), sparse.values.name))
        del graph.sparse_initializer[:]
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return ir.from_proto(proto)


def dense_array(sparse: onnx.SparseTensorProto) -> Array:
    """A sparse tensor (COO: linear indices ``[NNZ]`` or coordinates ``[NNZ, rank]``) as a dense array.

    Raises:
        ValueError: indices and values do not fit the dimensions.
    """
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    shape = tuple(sparse.dims)
    dense = np.zeros(shape, values.dtype)
    linear = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
    if linear.shape != values.shape or (linear.size and not 0 <= linear.min() <= linear.max() < dense.size):
        raise ValueError(
            f"sparse initializer {sparse.values.name!r} of shape {list(shape)} has {values.size} values at "
            f"{linear.size} indices, or an index outside of it"
        )
    dense.reshape(-1)[linear] = values
    return dense
