"""Converts int8 weights of integer operators to uint8: equal values, for which no x86 kernel saturates.

Given (the same for MatMulInteger, QLinearConv and the runtime's own operators)::

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
QDQ_OPS = frozenset({"Conv", "Gemm", "MatMul"})
INTEGER_WEIGHT_INPUTS: dict[str, tuple[int | None, tuple[tuple[int, int], ...]]] = {
    "MatMulInteger": (2, ((1, 3),)),
    "MatMulIntegerToFloat": (4, ((1, 5),)),
    "DynamicQuantizeMatMul": (None, ((1, 3),)),
    "DynamicQuantizeLSTM": (None, ((1, 9), (2, 11))),
    "QLinearConv": (2, ((3, 5),)),
    "QLinearMatMul": (2, ((3, 5),)),
    "QGemm": (2, ((3, 5),)),
}
"""By operator: the input with the zero point of its activation (``None``: the operator quantizes it to
uint8), and the inputs with weights, each with that of its zero point."""


def make_weights_unsigned(model: ir.Model, *, int8_activations: bool) -> bool:
    """Convert the int8 weights that ``model`` multiplies with uint8 activations to uint8; whether it has any.

    ``int8_activations``: whether the runtime keeps int8 activations between Q/DQ. Kernels of int8 activations
    and int8 weights do not saturate, and there are none for uint8 weights. Otherwise the runtime converts the
    activations to uint8.
    """
    made: dict[ir.Value | None, ir.Value] = {}
    for node in list(walk_nodes(model.graph)):
        for consumer, weight, zero in _weights(node, int8_activations=int8_activations):
            old = consumer.inputs[weight]
            if old not in made:
                made[old] = _shifted(model.graph, old)
            zeros = _zero_point(model.graph, consumer, zero)
            consumer.resize_inputs(max(len(consumer.inputs), zero + 1))
            consumer.replace_input_with(weight, made[old])
            consumer.replace_input_with(zero, zeros)
    return bool(made)


def _weights(node: ir.Node, *, int8_activations: bool) -> Iterator[tuple[ir.Node, int, int]]:
    """The int8 weights of a node: consumer, index of its weight input, index of its zero point input."""
    if node.op_type in INTEGER_WEIGHT_INPUTS:
        activation_zero, weights = INTEGER_WEIGHT_INPUTS[node.op_type]
        if activation_zero is None or not _is_int8(_input(node, activation_zero)):
            yield from ((node, *place) for place in weights if _is_int8(_input(node, place[0])))
    elif node.op_type in QDQ_OPS and not node.domain:
        a, b = (_dequantize(_input(node, index)) for index in (0, 1))
        for stored, other in ((a, b), (b, a)):
            if stored is None or other is None or not _is_int8(stored.inputs[0]):
                continue
            if not (int8_activations and _is_int8(_input(other, 2))):
                yield stored, 0, 2


def _shifted(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """An initializer plus 128, as uint8."""
    tensor = constant_tensor(value)
    assert value is not None
    assert tensor is not None

    def shift(array: Array) -> Array:
        return np.asarray(array.astype(np.int16) + OFFSET)

    return new_initializer(graph, f"{value.name}_u8", computed(tensor, shift, ir.DataType.UINT8))


def _zero_point(graph: ir.Graph, consumer: ir.Node, index: int) -> ir.Value:
    """The zero point of a weight plus 128; an absent one is zero, of the shape of the scale."""
    value = _input(consumer, index)
    if value is not None:
        return _shifted(graph, value)
    scale = constant_tensor(_input(consumer, 1)) if consumer.op_type == "DequantizeLinear" else None
    shape = dims(scale) if scale is not None else ()
    return new_initializer(graph, f"{consumer.name}_zero_u8", np.full(shape, OFFSET, np.uint8))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_int8(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.dtype == ir.DataType.INT8


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None
