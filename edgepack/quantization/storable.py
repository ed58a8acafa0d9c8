"""Which constants can be stored as int8 although no kernel takes them as integers."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, name_of, walk_nodes

LEAST_ELEMENTS = 1024
"""Of a constant; names, scales and two nodes take about as much as this saves of a smaller one."""
MASK_MAGNITUDE = 1e6
"""Constants beyond this stand for infinity, as in attention masks; eight bits that wide hold no more."""


def holds_a_mask(array: Array) -> bool:
    """Whether there is a substitute for infinity in ``array``."""
    return bool(array.size) and not float(np.abs(array).max()) < MASK_MAGNITUDE


def storable(node: ir.Node) -> tuple[str, ...]:
    """Names of the float constants of a node and its bodies that are matrices, and large enough.

    Vectors are left: norms and biases, of which eight bits would be felt everywhere.
    """
    return tuple(dict.fromkeys(name_of(value) for _, _, value in storable_constants(node)))


def storable_constants(node: ir.Node) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """Each place, here and in bodies, where such a constant is read."""
    bodies = (
        graph
        for a in node.attributes.values()
        if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for graph in (a.as_graphs() if a.type is ir.AttributeType.GRAPHS else [a.as_graph()])
    )
    for reader in (node, *(inner for graph in bodies for inner in walk_nodes(graph))):
        for index, value in enumerate(reader.inputs):
            array = constant(value)
            if value is None or array is None or array.dtype != np.float32 or array.size < LEAST_ELEMENTS:
                continue
            if sum(size > 1 for size in array.shape) > 1 and not holds_a_mask(array):
                yield reader, index, value
