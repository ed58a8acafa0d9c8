"""Islands: float units between integer ones, which onnxruntime would make integers of, asked or not."""

import numpy as np
import onnx_ir as ir

from edgepack.model import constant, name_of, only_consumer
from edgepack.quantize.emit import Emitter
from edgepack.quantize.units import ACTIVATIONS
from edgepack.scheme import QuantParams, QuantType

REQUANTIZED_BY_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""onnxruntime quantizes float weights of these, per tensor and unasked, between a per-tensor DQ and a Q."""

FUSED_BY_RUNTIME = frozenset(
    ["Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Where"]
)
"""onnxruntime makes integer kernels of these between DQ and Q, whether they compute the same or not."""


def keep_float(emit: Emitter, node: ir.Node) -> None:
    """Have the runtime compute a float unit in float; Q/DQ around integer units stand already."""
    if node.op_type in REQUANTIZED_BY_RUNTIME:
        _guard_weights(emit, node)
    elif node.op_type in FUSED_BY_RUNTIME:
        _guard_light(emit, node)
    elif node.op_type == "MaxPool":
        _guard_pool(emit, node)


def _guard_weights(emit: Emitter, node: ir.Node) -> None:
    """Keep a float unit with weights between integer ones float.

    Given: ``q -> DQ(scale) -> Conv(w float) -> Q``. Result: ``q -> DQ([scale, scale ...]) -> Conv(w) -> Q``,
    the same values, which the runtime's WeightBiasQuantization leaves alone.
    """
    value, weight = node.inputs[0], constant(node.inputs[1])
    restore = value.producer() if value is not None else None
    if restore is None or restore.op_type != "DequantizeLinear" or weight is None or not _leads_to_q(node):
        return
    stored, scale = restore.inputs[0], constant(restore.inputs[1])
    assert stored is not None
    assert scale is not None
    if scale.ndim:  # rows of a table: it has a scale for each channel already
        return
    # A table's scale has no zero point beside it: its integers are int8 and that is zero.
    shift = constant(restore.inputs[2]) if len(restore.inputs) > 2 else np.int8(0)
    assert shift is not None
    channels = _input_channels(node, weight.shape)
    kind = QuantType(shift.dtype.name)
    params = QuantParams(kind, np.full(channels, scale, np.float32), np.full(channels, shift), axis=1)
    guarded = emit.restore(stored, params, f"{name_of(stored)}_island")
    emit.graph.insert_before(node, guarded)
    node.replace_input_with(0, guarded.outputs[0])


def _guard_light(emit: Emitter, node: ir.Node) -> None:
    """Keep a light float unit between integer ones float.

    Given: ``q -> DQ -> Sigmoid -> Q``. Result: ``q -> DQ -> Max(least) -> Sigmoid -> Q``, where no value is
    below ``least``: an operator that changes nothing, and that the runtime neither removes nor fuses.
    """
    sources = ((v, v.producer()) for v in node.inputs if v is not None)
    value = next((v for v, made in sources if made is not None and made.op_type == "DequantizeLinear"), None)
    if value is None or not _leads_to_q(node):
        return
    guard = emit.node("Max", [value, _least(emit)], f"{name_of(value)}_island")
    emit.graph.insert_before(node, guard)
    node.replace_input_with(list(node.inputs).index(value), guard.outputs[0])


def _leads_to_q(node: ir.Node) -> bool:
    """Whether a QuantizeLinear is all that reads the node, Relu and Clip seen through."""
    after = only_consumer(node.outputs[0])
    while after is not None and after.op_type in ACTIVATIONS:
        after = only_consumer(after.outputs[0])
    return after is not None and after.op_type == "QuantizeLinear"


def _input_channels(node: ir.Node, weight_shape: tuple[int, ...]) -> int:
    if node.op_type == "Conv":
        return weight_shape[1] * node.attributes.get_int("group", 1)
    if node.op_type == "Gemm":
        return weight_shape[1 if node.attributes.get_int("transB", 0) else 0]
    return weight_shape[0]


def _guard_pool(emit: Emitter, node: ir.Node) -> None:
    """Keep a float MaxPool in front of integers float.

    Given: ``MaxPool -> Q``. Result: ``MaxPool -> Max(least) -> Q``. The runtime would quantize before the
    pool, and its kernel for stored integers is slow where no integer convolution turns them to channels last:
    4,300 µs for [1, 32, 176, 176] on one core, in float 190.
    """
    pooled = node.outputs[0]
    store = only_consumer(pooled)
    if store is None or store.op_type != "QuantizeLinear":
        return
    guard = emit.node("Max", [pooled, _least(emit)], f"{name_of(pooled)}_island")
    emit.graph.insert_before(store, guard)
    store.replace_input_with(0, guard.outputs[0])


def _least(emit: Emitter) -> ir.Value:
    return emit.initializer("least", np.asarray(np.finfo(np.float32).min, np.float32))
