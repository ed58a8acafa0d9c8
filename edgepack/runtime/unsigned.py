"""Integer products whose int8 weights become uint8: the same numbers, which no x86 kernel adds in 16 bits.

Given, and the same for MatMulInteger, QLinearConv and the runtime's own operators::

    DequantizeLinear(w int8, scale, zero int8) -> Conv, Gemm or MatMul with a dequantized activation

Result::

    DequantizeLinear(w + 128 uint8, scale, zero + 128 uint8)
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import computed, constant_tensor, dims, new_initializer, walk_nodes

OFFSET = 128
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
INTEGER_PRODUCTS: dict[str, tuple[int | None, tuple[tuple[int, int], ...]]] = {
    "MatMulInteger": (2, ((1, 3),)),
    "MatMulIntegerToFloat": (4, ((1, 5),)),
    "DynamicQuantizeMatMul": (None, ((1, 3),)),
    "DynamicQuantizeLSTM": (None, ((1, 9), (2, 11))),
    "QLinearConv": (2, ((3, 5),)),
    "QLinearMatMul": (2, ((3, 5),)),
    "QGemm": (2, ((3, 5),)),
}
"""By operator: which input is the zero point of its activation (``None``: it quantizes that itself, to
uint8), and which inputs are weights, each with its zero point."""


def make_weights_unsigned(model: ir.Model, *, int8_activations: bool) -> bool:
    """Store the int8 weights that ``model`` multiplies with uint8 activations as uint8; whether it has any.

    ``int8_activations``: whether the runtime keeps int8 activations between Q/DQ. Their products with int8
    are exact, and with uint8 there is no kernel. Otherwise it turns them to uint8 itself.
    """
    made: dict[ir.Value | None, ir.Value] = {}
    for node in list(walk_nodes(model.graph)):
        for reader, weight, zero in _weights(node, int8_activations=int8_activations):
            old = reader.inputs[weight]
            if old not in made:
                made[old] = _shifted(model.graph, old)
            zeros = _zero_point(model.graph, reader, zero)
            reader.resize_inputs(max(len(reader.inputs), zero + 1))
            reader.replace_input_with(weight, made[old])
            reader.replace_input_with(zero, zeros)
    return bool(made)


def _weights(node: ir.Node, *, int8_activations: bool) -> Iterator[tuple[ir.Node, int, int]]:
    """The int8 weights of a product: who reads one, as which input, and as which its zero point."""
    if node.op_type in INTEGER_PRODUCTS:
        activation_zero, weights = INTEGER_PRODUCTS[node.op_type]
        if activation_zero is None or not _is_int8(_input(node, activation_zero)):
            yield from ((node, *place) for place in weights if _is_int8(_input(node, place[0])))
    elif node.op_type in PRODUCTS and not node.domain:
        a, b = (_dequantize(_input(node, index)) for index in (0, 1))
        for stored, other in ((a, b), (b, a)):
            if stored is None or other is None or not _is_int8(stored.inputs[0]):
                continue
            if not (int8_activations and _is_int8(_input(other, 2))):
                yield stored, 0, 2


def _shifted(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """A constant plus 128, as uint8."""
    tensor = constant_tensor(value)
    assert value is not None
    assert tensor is not None

    def shift(array: Array) -> Array:
        return np.asarray(array.astype(np.int16) + OFFSET)

    return new_initializer(graph, f"{value.name}_u8", computed(tensor, shift, ir.DataType.UINT8))


def _zero_point(graph: ir.Graph, reader: ir.Node, index: int) -> ir.Value:
    """The zero point of a weight plus 128; one that is left out is zero, of the shape of the scale."""
    value = _input(reader, index)
    if value is not None:
        return _shifted(graph, value)
    scale = constant_tensor(_input(reader, 1)) if reader.op_type == "DequantizeLinear" else None
    shape = dims(scale) if scale is not None else ()
    return new_initializer(graph, f"{reader.name}_zero_u8", np.full(shape, OFFSET, np.uint8))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_int8(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.dtype == ir.DataType.INT8


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None
