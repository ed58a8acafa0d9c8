"""Constants that no kernel takes as integers: stored as int8 all the same, floats once the file is loaded.

Given (the runtime has no integer kernel for Einsum; the same in a body of control flow)::

    x -> Einsum(w float) -> y

Result::

    x -> Einsum(Mul(Cast(w int8), scales)) -> y

The runtime folds Cast and Mul when it loads the file: a quarter of the bytes, and the time of a float model.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgepack.ir.model import Array, constant, constant_tensor, name_of, walk_nodes
from edgepack.ir.numerics import choose_weight_params, dequantize, quantize
from edgepack.ir.scheme import Granularity, QuantParams, QuantScheme
from edgepack.quantization.rewrite.emit import Emitter

if TYPE_CHECKING:
    from edgepack.quantization.groups import Unit

LEAST_ELEMENTS = 1024
"""Of a constant; names, scales and two nodes take about as much as this saves of a smaller one."""
LEAST_SHARE = 16
"""Values for each scale, at least."""
MASK_MAGNITUDE = 1e6
"""Constants beyond this stand for infinity, as in attention masks; eight bits that wide hold no more."""


def holds_a_mask(array: Array) -> bool:
    """Whether there is a stand-in for infinity in ``array``."""
    return bool(array.size) and not float(np.abs(array).max()) < MASK_MAGNITUDE


def storable(node: ir.Node) -> tuple[str, ...]:
    """Names of the float constants of a node and its bodies that are matrices, and large enough.

    Vectors are left: norms and biases, of which eight bits would be felt everywhere.
    """
    return tuple(dict.fromkeys(name_of(value) for _, _, value in _constants(node)))


def _constants(node: ir.Node) -> Iterator[tuple[ir.Node, int, ir.Value]]:
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


def stored_params(node: ir.Node, unit: "Unit", scheme: QuantScheme) -> tuple[tuple[str, QuantParams], ...]:
    """Parameters of each constant that the ``unit`` of this node stores."""
    found = {name_of(value): value for _, _, value in _constants(node) if name_of(value) in unit.stored}
    return tuple(
        (name, _params(array, scheme)) for name, v in found.items() if (array := constant(v)) is not None
    )


def _params(array: Array, scheme: QuantScheme) -> QuantParams:
    """Scales along the axis that leaves the least error: what the axes mean only the operator knows."""
    axes: list[int | None] = [None]
    if scheme.granularity is Granularity.PER_CHANNEL:
        axes += [
            axis for axis, size in enumerate(array.shape) if array.size >= size * LEAST_SHARE and size > 1
        ]
    options = [choose_weight_params(array, scheme, axis) for axis in axes]
    errors = [
        float(np.square(dequantize(quantize(array, p), p) - array).sum(dtype=np.float64)) for p in options
    ]
    return options[int(np.argmin(errors))]


def store_constants(emit: Emitter, node: ir.Node, stored: tuple[tuple[str, QuantParams], ...]) -> None:
    """Give a node, and the nodes of its bodies, their constants from stored integers."""
    params = dict(stored)
    for reader, index, value in list(_constants(node)):
        if name_of(value) not in params:
            continue
        array, p = constant(value), params[name_of(value)]
        assert array is not None
        shape = [1] * array.ndim
        if p.axis is not None:
            shape[p.axis] = -1
        scale = p.scale.reshape(shape if p.axis is not None else ())
        reader.replace_input_with(index, emit.unfolded(node, name_of(value), quantize(array, p), scale))


def unfolded_bytes(model: ir.Model) -> int:
    """How much more the constants take that a runtime makes floats of when it loads ``model``."""
    casts = (node for node in model.graph if node.op_type == "Cast")
    stored = {v: t for node in casts if (t := constant_tensor(v := node.inputs[0])) is not None}
    return sum(t.size * np.dtype(np.float32).itemsize - t.nbytes for t in stored.values())
