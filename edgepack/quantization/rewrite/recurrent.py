"""LSTM and GRU with int8 weights.

Given::

    LSTM(x, W [D, 4H, I], R [D, 4H, H], ...) -> y

Result with dynamic precision (one scale per row of W and R; ranges of x and state computed at run time)::

    com.microsoft.DynamicQuantizeLSTM(x, W int8 [D, I, 4H], R int8 [D, H, 4H], ..., scales, zero points) -> y

GRU has no such kernel: its weights are stored as int8 and dequantized when the file is loaded.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import constant, name_of
from edgepack.ir.numerics import choose_weight_params, quantize
from edgepack.ir.scheme import Granularity, QuantParams, QuantScheme
from edgepack.quantization.rewrite.emit import Emitter
from edgepack.quantization.weights.pair_saturation import rows_with_reduced_range

DOMAIN = "com.microsoft"
WEIGHTS = (1, 2)
"""Inputs of LSTM and GRU that hold W and R."""


def apply_dynamic_lstm(emit: Emitter, node: ir.Node, scheme: QuantScheme) -> None:
    """Replace one LSTM by a DynamicQuantizeLSTM, weights rounded to nearest."""
    # X, W, R, B, sequence_lens, initial_h, initial_c, P are the same inputs of both operators.
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    for index in WEIGHTS:
        integers, params, directions = _stored(node, index, scheme, integer=True)
        base = name_of(_input(node, index))
        turned = np.ascontiguousarray(integers.reshape(directions, -1, integers.shape[1]).transpose(0, 2, 1))
        per_tensor = params.axis is None
        scale = np.repeat(params.scale, directions) if per_tensor else params.scale.reshape(directions, -1)
        inputs[index] = emit.initializer(f"{base}_q", turned)
        inputs += [
            emit.initializer(f"{base}_s", scale),
            emit.initializer("zero_int8", np.zeros(scale.shape, np.int8)),
        ]
    kept = [a for name, a in node.attributes.items() if name != "layout"]
    made = emit.node(
        "DynamicQuantizeLSTM",
        inputs,
        name_of(node.outputs[0]) or "lstm",
        outputs=len(node.outputs),
        domain=DOMAIN,
        attributes=kept,
    )
    emit.graph.opset_imports[DOMAIN] = 1
    emit.graph.insert_before(node, made)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        name = old.name
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name = name
    emit.graph.remove(node, safe=True)


def store_recurrent_weights(emit: Emitter, node: ir.Node, scheme: QuantScheme) -> None:
    """Store both weights of an LSTM or GRU as int8; the arithmetic stays float."""
    for index in WEIGHTS:
        integers, params, directions = _stored(node, index, scheme, integer=False)
        shape = (directions, -1, integers.shape[1])
        scale = params.scale.reshape((directions, -1, 1) if params.axis is not None else ())
        real = emit.unfolded(node, name_of(_input(node, index)), integers.reshape(shape), scale)
        node.replace_input_with(index, real)


def _stored(
    node: ir.Node, index: int, scheme: QuantScheme, *, integer: bool
) -> tuple[npt.NDArray[np.integer], QuantParams, int]:
    """Integers ``[D * gates * H, columns]``, their parameters, and D, the number of directions.

    ``integer``: an integer kernel consumes them.
    """
    array = constant(node.inputs[index])
    assert array is not None, f"{node.name} was planned with constant weights"
    rows = np.asarray(array, np.float32).reshape(-1, array.shape[2])
    axis = 0 if scheme.granularity is Granularity.PER_CHANNEL else None
    params = choose_weight_params(rows, scheme, axis)
    if integer and scheme.saturates:
        params = rows_with_reduced_range(rows, params, scheme)
    return quantize(rows, params), params, array.shape[0]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
