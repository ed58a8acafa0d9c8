"""Apply: write a plan into a graph. It touches and decides nothing.

Given::

    x -> Conv(w, b) -> y -> Relu -> z -> next

Result (``z`` planned uint8 with zero point 0, so that saturation is the Relu)::

    x -> Q -> DQ -> Conv(DQ(w int8), DQ(b int32)) -> z -> Q -> DQ -> next
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepack.model import clone, constant, name_of
from edgepack.numerics import bias_params, choose_params, quantize
from edgepack.quantize.dynamic import apply_dynamic
from edgepack.quantize.emit import Emitter
from edgepack.quantize.plan import Method, QuantPlan, UnitPlan
from edgepack.quantize.rounding import Rounded
from edgepack.quantize.units import ACTIVATIONS
from edgepack.scheme import QuantParams, QuantType


REQUANTIZED_BY_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""onnxruntime quantizes float weights of these, per tensor and unasked, between a per-tensor DQ and a Q."""


def apply_plan(model: ir.Model, plan: QuantPlan, weights: Mapping[str, Rounded]) -> ir.Model:
    """A new model in which ``plan`` is carried out with the stored ``weights`` (by unit name)."""
    quantized = clone(model)
    graph = quantized.graph
    nodes = {n.name: n for n in graph}
    static_nodes = {nodes[u.unit.name] for u in plan.of(Method.STATIC)}
    for unit_plan in plan.units:
        if unit_plan.drop_activation:
            _drop_activation(graph, nodes[unit_plan.unit.name], nodes[unit_plan.unit.activation])
    emit = Emitter(graph)
    values = {v.name: v for n in graph for v in n.outputs} | {v.name: v for v in graph.inputs}
    for name, params in plan.activations.items():
        _insert_pair(emit, values[name], params, static_nodes)
    for unit_plan in plan.units:
        node = nodes[unit_plan.unit.name]
        rounded = weights.get(unit_plan.unit.name)
        if unit_plan.method is Method.STATIC:
            _constant_operands(emit, node, unit_plan, plan)
        elif node.op_type in REQUANTIZED_BY_RUNTIME:
            _guard_float_island(emit, node)
        if rounded is None:
            continue
        if unit_plan.method is Method.STATIC:
            _static_weights(emit, node, unit_plan, rounded, plan)
        elif unit_plan.method is Method.DYNAMIC:
            apply_dynamic(emit, node, unit_plan, rounded)
        elif unit_plan.method is Method.WEIGHT_ONLY:
            _weight_only(emit, node, unit_plan, rounded)
    _remove_unused_initializers(graph)
    graph.sort()
    return quantized


def _drop_activation(graph: ir.Graph, main: ir.Node, activation: ir.Node) -> None:
    before, after = main.outputs[0], activation.outputs[0]
    # The outer name stays: it may be a graph output, and ranges and reports speak of it.
    ir.convenience.replace_all_uses_with(after, before, replace_graph_outputs=True)
    name = after.name
    graph.remove(activation, safe=True)
    before.name = name


def _insert_pair(emit: Emitter, value: ir.Value, params: QuantParams, static_nodes: set[ir.Node]) -> None:
    """Put ``Q -> DQ`` behind ``value``: for all readers if an integer unit makes it, else for integer ones."""
    graph, base = emit.graph, name_of(value)
    producer = value.producer()
    from_integer = producer is not None and _ends_integer_unit(producer, static_nodes)
    readers = [(u.node, u.idx) for u in value.uses() if from_integer or u.node in static_nodes]
    takes_output = from_integer and value.is_graph_output()
    store, restore = emit.pair(value, params, base)
    real = restore.outputs[0]
    for node, index in readers:
        node.replace_input_with(index, real)
    if takes_output:
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = real
        value.name = emit.fresh(f"{base}_before_quantization")
        real.name = base
    if producer is not None:
        graph.insert_after(producer, [store, restore])
    else:
        graph.insert_before(graph[0], [store, restore])


def _ends_integer_unit(producer: ir.Node, static_nodes: set[ir.Node]) -> bool:
    """Whether the node ends an integer unit: it is its main node, or the activation kept behind it."""
    if producer in static_nodes:
        return True
    if producer.op_type not in ACTIVATIONS or producer.inputs[0] is None:
        return False
    return producer.inputs[0].producer() in static_nodes


def _guard_float_island(emit: Emitter, node: ir.Node) -> None:
    """Keep a float unit between integer ones float.

    Given: ``q -> DQ(scale) -> Conv(w float)``. Result: ``q -> DQ([scale, scale ...], axis 1) -> Conv(w)``,
    the same values, which the runtime's WeightBiasQuantization leaves alone.
    """
    value, weight = node.inputs[0], constant(node.inputs[1])
    restore = value.producer() if value is not None else None
    if restore is None or restore.op_type != "DequantizeLinear" or weight is None:
        return
    stored, scale, zero = (constant(v) if i else v for i, v in enumerate(restore.inputs))
    channels = _input_channels(node, weight.shape)
    assert isinstance(stored, ir.Value)
    params = QuantParams(
        QuantType(np.asarray(zero).dtype.name),
        np.full(channels, scale, np.float32),
        np.full(channels, zero),
        axis=1,
    )
    guarded = emit.restore(stored, params, f"{value.name}_float_island" if value is not None else "island")
    guarded.outputs[0].type, guarded.outputs[0].shape = restore.outputs[0].type, restore.outputs[0].shape
    emit.graph.insert_before(node, guarded)
    node.replace_input_with(0, guarded.outputs[0])


def _input_channels(node: ir.Node, weight_shape: tuple[int, ...]) -> int:
    if node.op_type == "Conv":
        return weight_shape[1] * node.attributes.get_int("group", 1)
    if node.op_type == "Gemm":
        return weight_shape[1 if node.attributes.get_int("transB", 0) else 0]
    return weight_shape[0]


def _static_weights(
    emit: Emitter, node: ir.Node, unit_plan: UnitPlan, rounded: Rounded, plan: QuantPlan
) -> None:
    weight, base = unit_plan.weight, unit_plan.unit.weight
    assert weight is not None
    assert base is not None
    node.replace_input_with(1, emit.dequantized(node, base, rounded.integers, weight))
    if rounded.bias is None:
        return
    params = bias_params(plan.activations[unit_plan.unit.inputs[0]].scale, weight)
    channels = rounded.integers.shape[weight.axis] if weight.axis is not None else rounded.bias.size
    stored = quantize(np.broadcast_to(rounded.bias, (channels,)), params)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, emit.dequantized(node, unit_plan.unit.bias or f"{base}_bias", stored, params))


def _constant_operands(emit: Emitter, node: ir.Node, unit_plan: UnitPlan, plan: QuantPlan) -> None:
    """Constants of elementwise units are stored in the scheme of activations, as their kernels require."""
    if not unit_plan.unit.constants:
        return
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if value is None or array is None or value.dtype != ir.DataType.FLOAT:
            continue
        params = choose_params(float(array.min()), float(array.max()), plan.activation_scheme)
        stored = quantize(np.asarray(array, np.float32), params)
        node.replace_input_with(index, emit.dequantized(node, name_of(value), stored, params))


def _weight_only(emit: Emitter, node: ir.Node, unit_plan: UnitPlan, rounded: Rounded) -> None:
    assert unit_plan.weight is not None
    if node.op_type == "Gather":
        _gather_rows(emit, node, unit_plan.weight, rounded)
        return
    base = unit_plan.unit.weight or "weight"
    if node.op_type == "MatMul":
        # The runtime makes this a MatMulNBits, which reads the bytes as they are.
        node.replace_input_with(1, emit.dequantized(node, base, rounded.integers, unit_plan.weight))
    else:
        node.replace_input_with(1, emit.unfolded(node, base, rounded.integers, unit_plan.weight))


def _gather_rows(emit: Emitter, node: ir.Node, params: QuantParams, rounded: Rounded) -> None:
    """Given: ``Gather(table, ids) -> y``. Result: ``Gather(table int8, ids) -> DequantizeLinear -> y``."""
    table, ids, old = node.inputs[0], node.inputs[1], node.outputs[0]
    assert table is not None
    assert ids is not None
    stored = emit.initializer(f"{table.name}_quantized", rounded.integers)
    look_up = emit.node("Gather", [stored, ids], name_of(old), axis=node.attributes.get_int("axis", 0))
    look_up.outputs[0].dtype, look_up.outputs[0].shape = ir.DataType.INT8, old.shape
    # Channels of the table are its last axis, which stays the last whatever the shape of the indices.
    real = emit.restore(look_up.outputs[0], params, name_of(old), axis=-1)
    emit.replace(node, [look_up, real], real.outputs[0])


def _remove_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
