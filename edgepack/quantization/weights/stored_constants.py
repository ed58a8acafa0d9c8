"""Initializers of operators without an integer kernel, stored as int8 and dequantized at load.

Given (the runtime has no integer kernel for Einsum; the same in a subgraph of control flow)::

    x -> Einsum(w float) -> y

Result::

    x -> Einsum(Mul(Cast(w int8), scales)) -> y

The runtime folds Cast and Mul when it loads the file: a quarter of the bytes, and the time of a float model.
"""

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, constant_tensor, name_of
from edgepack.ir.numerics import choose_weight_params, dequantize, quantize
from edgepack.ir.scheme import Granularity, QuantParams, QuantScheme
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.rewrite.emit import Emitter
from edgepack.quantization.storable import storable_constants

LEAST_SHARE = 16
"""Least number of values per scale."""


def stored_params(
    node: ir.Node, group: FusionGroup, scheme: QuantScheme
) -> tuple[tuple[str, QuantParams], ...]:
    """Parameters of each initializer that the ``group`` of this node stores as int8."""
    found = {name_of(v): v for _, _, v in storable_constants(node) if name_of(v) in group.stored}
    return tuple(
        (name, _params(array, scheme)) for name, v in found.items() if (array := constant(v)) is not None
    )


def _params(array: Array, scheme: QuantScheme) -> QuantParams:
    """Per-channel scales along the axis with the least error; which axis has channels is not known here."""
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
    """Replace initializers of a node and its subgraphs by dequantized int8 ones."""
    params = dict(stored)
    for consumer, index, value in list(storable_constants(node)):
        if name_of(value) not in params:
            continue
        array, p = constant(value), params[name_of(value)]
        assert array is not None
        shape = [1] * array.ndim
        if p.axis is not None:
            shape[p.axis] = -1
        scale = p.scale.reshape(shape if p.axis is not None else ())
        consumer.replace_input_with(index, emit.unfolded(node, name_of(value), quantize(array, p), scale))


def unfolded_bytes(model: ir.Model) -> int:
    """Bytes of memory that initializers gain where the runtime dequantizes them when it loads ``model``."""
    casts = (node for node in model.graph if node.op_type == "Cast")
    stored = {v: t for node in casts if (t := constant_tensor(v := node.inputs[0])) is not None}
    return sum(t.size * np.dtype(np.float32).itemsize - t.nbytes for t in stored.values())
