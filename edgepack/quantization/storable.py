"""Which initializers can be stored as int8 although no integer kernel consumes them."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, name_of, walk_nodes

LEAST_ELEMENTS = 1024
"""Of an initializer; below this, names, scales and two nodes take about as many bytes as int8 saves."""
MASK_MAGNITUDE = 1e6
"""Larger values stand for infinity, as in attention masks; int8 of that range resolves nothing else."""


def holds_a_mask(array: Array) -> bool:
    """Whether ``array`` holds infinity, or a large value that stands for it."""
    return bool(array.size) and not float(np.abs(array).max()) < MASK_MAGNITUDE


def storable(node: ir.Node) -> tuple[str, ...]:
    """Names of the large float initializers with two or more dimensions of a node and its subgraphs.

    Vectors are left out: eight bits for the scales of norms and for biases would cost accuracy everywhere.
    """
    return tuple(dict.fromkeys(name_of(value) for _, _, value in storable_constants(node)))


def storable_constants(node: ir.Node) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """Each use of such an initializer, in the node or its subgraphs: consumer, input index, value."""
    subgraphs = (
        graph
        for a in node.attributes.values()
        if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for graph in (a.as_graphs() if a.type is ir.AttributeType.GRAPHS else [a.as_graph()])
    )
    for consumer in (node, *(inner for graph in subgraphs for inner in walk_nodes(graph))):
        for index, value in enumerate(consumer.inputs):
            array = constant(value)
            if value is None or array is None or array.dtype != np.float32 or array.size < LEAST_ELEMENTS:
                continue
            if sum(size > 1 for size in array.shape) > 1 and not holds_a_mask(array):
                yield consumer, index, value
