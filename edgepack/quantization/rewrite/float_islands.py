"""Float islands: float groups between integer ones, which onnxruntime would otherwise quantize too."""

import numpy as np
import onnx_ir as ir

from edgepack.ir.model import constant, name_of, only_consumer
from edgepack.ir.scheme import QuantParams, QuantType
from edgepack.quantization.groups import ACTIVATIONS
from edgepack.quantization.rewrite.emit import Emitter

REQUANTIZED_BY_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""onnxruntime quantizes float weights of these, per tensor, between a per-tensor DQ and a Q."""

FUSED_BY_RUNTIME = frozenset(
    ["Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Where"]
)
"""onnxruntime fuses these to integer kernels between DQ and Q, even where results differ."""

PASSED_BY_RUNTIME = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""onnxruntime moves DQ and Q past these, to the operators that it fuses to integer kernels."""


def keep_float(emit: Emitter, node: ir.Node) -> None:
    """Keep the runtime from quantizing a float group; Q/DQ around integer groups exist already."""
    if node.op_type in REQUANTIZED_BY_RUNTIME and _is_restored(node.inputs[0]):
        _guard_weights(emit, node)
    elif node.op_type in FUSED_BY_RUNTIME | REQUANTIZED_BY_RUNTIME:
        _guard_light(emit, node)
    elif node.op_type == "MaxPool":
        _guard_pool(emit, node)


def _guard_weights(emit: Emitter, node: ir.Node) -> None:
    """Keep a float group with weights in float where integer groups surround it.

    Given: ``q -> DQ(scale) -> Conv(w float) -> Q``. Result: ``q -> DQ([scale, scale ...]) -> Conv(w) -> Q``,
    the same values; the runtime's WeightBiasQuantization does not change a per-channel DQ.
    """
    value, weight = node.inputs[0], constant(node.inputs[1])
    restore = value.producer() if value is not None else None
    if restore is None or restore.op_type != "DequantizeLinear" or weight is None or not _leads_to_q(node):
        return
    stored, scale = restore.inputs[0], constant(restore.inputs[1])
    assert stored is not None
    assert scale is not None
    if scale.ndim:  # rows of an embedding table: a scale per channel already
        return
    # The DequantizeLinear of an embedding table has no zero point: int8, zero by default.
    shift = constant(restore.inputs[2]) if len(restore.inputs) > 2 else np.int8(0)
    assert shift is not None
    channels = _input_channels(node, weight.shape)
    kind = QuantType(shift.dtype.name)
    params = QuantParams(kind, np.full(channels, scale, np.float32), np.full(channels, shift), axis=1)
    guarded = emit.restore(stored, params, f"{name_of(stored)}_island")
    emit.graph.insert_before(node, guarded)
    node.replace_input_with(0, guarded.outputs[0])


def _guard_light(emit: Emitter, node: ir.Node) -> None:
    """Keep a light group in float where integer groups surround it.

    Given: ``q -> DQ -> Sigmoid -> Q``. Result: ``q -> DQ -> Max(least) -> Sigmoid -> Q``, where ``least``
    is the least float: the Max changes nothing, and the runtime neither removes nor fuses it.
    """
    value = next((v for v in node.inputs if v is not None and _comes_from_dq(v)), None)
    if value is None or not _leads_to_q(node):
        return
    guard = emit.node("Max", [value, _least(emit)], f"{name_of(value)}_island")
    emit.graph.insert_before(node, guard)
    node.replace_input_with(list(node.inputs).index(value), guard.outputs[0])


def _is_restored(value: ir.Value | None) -> bool:
    made = None if value is None else value.producer()
    return made is not None and made.op_type == "DequantizeLinear"


def _comes_from_dq(value: ir.Value) -> bool:
    """Whether the value comes from a DequantizeLinear, through operators that the runtime moves it past."""
    made = value.producer()
    while made is not None and made.op_type in PASSED_BY_RUNTIME and made.inputs[0] is not None:
        made = made.inputs[0].producer()
    return made is not None and made.op_type == "DequantizeLinear"


def _leads_to_q(node: ir.Node) -> bool:
    """Whether the only consumer is a QuantizeLinear, after activations and operators that move data."""
    after = only_consumer(node.outputs[0])
    while after is not None and after.op_type in ACTIVATIONS | PASSED_BY_RUNTIME:
        after = only_consumer(after.outputs[0])
    return after is not None and after.op_type == "QuantizeLinear"


def _input_channels(node: ir.Node, weight_shape: tuple[int, ...]) -> int:
    if node.op_type == "Conv":
        return weight_shape[1] * node.attributes.get_int("group", 1)
    if node.op_type == "Gemm":
        return weight_shape[1 if node.attributes.get_int("transB", 0) else 0]
    return weight_shape[0]


def _guard_pool(emit: Emitter, node: ir.Node) -> None:
    """Keep a MaxPool in float before an integer group.

    Given: ``MaxPool -> Q``. Result: ``MaxPool -> Max(least) -> Q``. The runtime would move the Q before the
    pool; its int8 MaxPool is slow where no integer convolution makes the layout channels-last: 4,300 µs for
    [1, 32, 176, 176] on one core, in float 190.
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
