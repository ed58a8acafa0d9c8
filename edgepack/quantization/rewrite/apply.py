"""Apply a plan to a graph. All decisions are in the plan.

Given::

    x -> Conv(w, b) -> y -> Relu -> z -> next

Result (``z`` planned uint8 with zero point 0, so that saturation is the Relu)::

    x -> Q -> DQ -> Conv(DQ(w int8), DQ(b int32)) -> z -> Q -> DQ -> next
"""

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgepack.ir.model import clone, constant, name_of, only_consumer
from edgepack.ir.numerics import bias_params, choose_params, quantize
from edgepack.ir.scheme import QuantParams
from edgepack.quantization.groups import RECURRENT_OPS, activation_bounds
from edgepack.quantization.plan.types import GroupPlan, Precision, QuantPlan
from edgepack.quantization.rewrite.dynamic import apply_dynamic
from edgepack.quantization.rewrite.emit import TO_FLOAT, Emitter
from edgepack.quantization.rewrite.float_islands import keep_float
from edgepack.quantization.rewrite.hard_activations import HARD_ACTIVATIONS, apply_hard_activation
from edgepack.quantization.rewrite.recurrent import apply_dynamic_lstm, store_recurrent_weights
from edgepack.quantization.rewrite.substitutions import apply_substitution, sizes_of
from edgepack.quantization.weights.rounding import Rounded
from edgepack.quantization.weights.stored_constants import store_constants


def apply_plan(model: ir.Model, plan: QuantPlan, weights: Mapping[str, Rounded]) -> ir.Model:
    """A new model quantized by ``plan`` with the stored ``weights`` (by group name)."""
    quantized = clone(model)
    graph = quantized.graph
    nodes = {n.name: n for n in graph}
    static = plan.of(Precision.STATIC)
    clamps: dict[str, tuple[float, float]] = {}
    sizes = {u.group.name: sizes_of(nodes[u.group.name].inputs[0]) for u in static if u.substituted}
    for group_plan in static:
        if group_plan.group.activation is not None:
            activation = nodes[group_plan.group.activation]
            if not group_plan.drop_activation:
                clamps[group_plan.group.outputs[0]] = activation_bounds(activation)
            _drop_activation(graph, nodes[group_plan.group.name], activation)
    emit = Emitter(graph)
    values = {v.name: v for n in graph for v in n.outputs} | {v.name: v for v in graph.inputs}
    integer = {nodes[u.group.name] for u in static}
    for name, params in plan.activations.items():
        _insert_pair(emit, values[name], params, integer, clamps.get(name))
    for name, before in sizes.items():
        apply_substitution(emit, nodes[name], before)
    for group_plan in plan.groups:
        if group_plan.group.name not in sizes:
            _apply_group(
                emit, nodes[group_plan.group.name], group_plan, weights.get(group_plan.group.name), plan
            )
    for node in list(graph):
        if node.op_type == "Add" and _feeds_layer_norm(node):
            _as_sum(emit, node)
    _drop_unused_dequantize(graph)
    _tidy_initializers(graph)
    graph.sort()
    return quantized


def _apply_group(
    emit: Emitter, node: ir.Node, group_plan: GroupPlan, rounded: Rounded | None, plan: QuantPlan
) -> None:
    """Rewrite one group for its precision; Q/DQ around integer groups exist already."""
    precision, recurrent = group_plan.precision, node.op_type in RECURRENT_OPS
    if precision is Precision.STATIC:
        if node.op_type in HARD_ACTIVATIONS:
            apply_hard_activation(emit, node, plan.activation_scheme)
            return
        _constant_operands(emit, node, group_plan, plan)
        if rounded is not None:
            _static_weights(emit, node, group_plan, rounded, plan)
    elif precision is Precision.DYNAMIC and recurrent:
        apply_dynamic_lstm(emit, node, plan.weight_scheme)
    elif precision is Precision.DYNAMIC and rounded is not None:
        apply_dynamic(emit, node, group_plan, rounded)
    else:
        keep_float(emit, node)
        if precision is Precision.WEIGHT_ONLY and recurrent:
            store_recurrent_weights(emit, node, plan.weight_scheme)
        elif precision in (Precision.WEIGHT_ONLY, Precision.STORED) and rounded is not None:
            _weight_only(emit, node, group_plan, rounded)
        store_constants(emit, node, group_plan.stored)


def _drop_activation(graph: ir.Graph, main: ir.Node, activation: ir.Node) -> None:
    before, after = main.outputs[0], activation.outputs[0]
    # The name of the activation's output stays: it may be a graph output, and ranges and reports use it.
    ir.convenience.replace_all_uses_with(after, before, replace_graph_outputs=True)
    name = after.name
    graph.remove(activation, safe=True)
    before.name = name


def _insert_pair(
    emit: Emitter,
    value: ir.Value,
    params: QuantParams,
    static: set[ir.Node],
    clamp: tuple[float, float] | None,
) -> None:
    """Insert ``Q -> DQ`` after ``value``: for all consumers if its producer is integer, else for
    integer ones.

    With ``clamp``, the bounds of an activation that saturation does not imply: ``Q -> Clip -> DQ``. The
    runtime would fuse a float activation with the operator before it, and run both in float.
    """
    graph, base = emit.graph, name_of(value)
    producer = value.producer()
    from_integer = producer in static
    consumers = [(u.node, u.idx) for u in value.uses() if from_integer or u.node in static]
    takes_output = from_integer and value.is_graph_output()
    store, restore = emit.pair(value, params, base)
    real, made = restore.outputs[0], [store, restore]
    if clamp is not None:
        bounds = [emit.bound(bound, params) for bound in clamp]
        made.insert(1, emit.node("Clip", [store.outputs[0], *bounds], f"{base}_clip"))
        restore.replace_input_with(0, made[1].outputs[0])
    for node, index in consumers:
        node.replace_input_with(index, real)
    if takes_output:
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = real
    if takes_output or clamp is not None:  # the name belongs to the output of the activation
        value.name, real.name = emit.fresh(f"{base}_f"), base
        real.type, real.shape = value.type, value.shape
    if producer is not None:
        graph.insert_after(producer, made)
    else:
        graph.insert_before(graph[0], made)


def _static_weights(
    emit: Emitter, node: ir.Node, group_plan: GroupPlan, rounded: Rounded, plan: QuantPlan
) -> None:
    weight, base = group_plan.weight, group_plan.group.weight
    assert weight is not None
    assert base is not None
    # The runtime fuses Conv without a zero point of the weight; Gemm, also one made of a MatMul, needs it.
    state_zero = node.op_type != "Conv"
    integers = rounded.integers
    input_scale = plan.activations[group_plan.group.inputs[0]].scale
    if group_plan.added_channels:
        _add_channels(emit, node, group_plan.added_channels, plan.activations[group_plan.group.inputs[0]])
        integers = np.pad(integers, [(0, 0), (0, group_plan.added_channels), *[(0, 0)] * (integers.ndim - 2)])
    node.replace_input_with(1, emit.dequantized(node, base, integers, weight, state_zero=state_zero))
    if rounded.bias is None:
        if node.op_type == "MatMul":
            _bias_of_matmul(emit, node, integers.shape[1], bias_params(input_scale, weight))
        return
    params = bias_params(input_scale, weight)
    channels = rounded.integers.shape[weight.axis] if weight.axis is not None else rounded.bias.size
    stored = quantize(np.broadcast_to(rounded.bias, (channels,)), params)
    _give_bias(node, emit.dequantized(node, group_plan.group.bias or f"{base}_bias", stored, params))


def _give_bias(node: ir.Node, bias: ir.Value) -> None:
    """Set the bias of a Conv, ConvTranspose or Gemm that may have had none."""
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)
    node.attributes.pop("beta", None)  # without a bias it may have any value


def _add_channels(emit: Emitter, node: ir.Node, count: int, params: QuantParams) -> None:
    """Channel padding: add channels of zeros to the input; the weight has zeros there too.

    Given: ``q -> DQ -> Conv``. Result: ``q -> Pad(zero point) -> DQ -> Conv``.
    """
    value, weight = node.inputs[0], constant(node.inputs[1])
    restore = value.producer() if value is not None else None
    assert restore is not None
    assert weight is not None
    stored = restore.inputs[0]
    assert stored is not None
    key = ("padded", name_of(stored), count)
    if key not in emit.emitted:
        pads = np.zeros(2 * weight.ndim, np.int64)
        pads[weight.ndim + 1] = count
        base = name_of(stored)
        amounts = emit.initializer(f"{base}_pads", pads)
        pad = emit.node("Pad", [stored, amounts, emit.zero_point(params)], f"{base}_padded")
        again = emit.restore(pad.outputs[0], params, f"{base}_padded", state_zero=True)
        emit.graph.insert_before(node, [pad, again])
        emit.emitted[key] = again.outputs[0]
    node.replace_input_with(0, emit.emitted[key])


def _bias_of_matmul(emit: Emitter, node: ir.Node, outputs: int, params: QuantParams) -> None:
    """Store the constant of an Add after an integer MatMul as an int32 bias.

    Given: ``MatMul(DQ(x), DQ(w)) -> Add(b)``. Result: ``... -> Add(DQ(b int32))``. Where the runtime knows
    all dimensions it fuses the two to a Gemm: an integer one with this bias, else a float one that
    dequantizes the weight in every run.
    """
    add = only_consumer(node.outputs[0])
    if add is None or add.op_type != "Add":
        return
    index = 1 if add.inputs[0] is node.outputs[0] else 0
    value, array = add.inputs[index], constant(add.inputs[index])
    if value is None or array is None or array.ndim == 0 or not array.shape[-1] == array.size == outputs:
        return
    if params.axis is not None:
        params = replace(params, axis=array.ndim - 1)
    # The bias may not fit int32 where all weights of a channel are near zero: then it stays float.
    if np.abs(array / params.scale).max() < 2.0**30:
        add.replace_input_with(index, emit.dequantized(add, name_of(value), quantize(array, params), params))


def _constant_operands(emit: Emitter, node: ir.Node, group_plan: GroupPlan, plan: QuantPlan) -> None:
    """Quantize the constants of an elementwise group in the scheme of activations, as its kernels require."""
    if not group_plan.group.constants:
        return
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if value is None or array is None or array.dtype != np.float32:
            continue
        params = choose_params(float(array.min()), float(array.max()), plan.activation_scheme)
        stored = quantize(array, params)
        node.replace_input_with(index, emit.dequantized(node, name_of(value), stored, params))


def _weight_only(emit: Emitter, node: ir.Node, group_plan: GroupPlan, rounded: Rounded) -> None:
    assert group_plan.weight is not None
    unfold = group_plan.precision is Precision.STORED
    if node.op_type == "Gather" and not unfold:
        _gather_rows(emit, node, group_plan.weight, rounded)
        return
    table = group_plan.group.constants[0] if node.op_type == "Gather" else "weight"
    base, params = group_plan.group.weight or table, group_plan.weight
    integers = rounded.integers.astype(ml_dtypes.int4) if group_plan.bits == 4 else rounded.integers
    if rounded.bias is not None and group_plan.group.op_type != "MatMul":
        _give_bias(node, emit.initializer(group_plan.group.bias or f"{base}_bias", rounded.bias))
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    in_island = source is not None and source.op_type == "DequantizeLinear"
    if node.op_type == "MatMul" and not (unfold or group_plan.group.weight in emit.shared or in_island):
        # The runtime fuses this to MatMulNBits, which consumes the int8 weight. Between Q/DQ it would fuse it
        # to an integer MatMul, which was not requested; a weight that several nodes consume it would
        # dequantize in every run.
        real = emit.dequantized(node, base, integers, params)
    else:
        shape = [1] * integers.ndim
        if params.axis is not None:
            shape[params.axis] = -1
        real = emit.unfolded(
            node, base, integers, params.scale.reshape(shape if params.axis is not None else ())
        )
    node.replace_input_with(0 if node.op_type == "Gather" else 1, real)


def _gather_rows(emit: Emitter, node: ir.Node, params: QuantParams, rounded: Rounded) -> None:
    """Given: ``Gather(table, ids) -> y``. Result: ``Gather(table int8, ids) -> Cast -> Mul(scales) -> y``.

    With a scale per column, the runtime's DequantizeLinear takes three times as long as Cast and Mul. With a
    scale per row, for tied embeddings, the scales are looked up too.
    """
    table, ids, old = node.inputs[0], node.inputs[1], node.outputs[0]
    assert table is not None
    assert ids is not None
    base, row = name_of(table), name_of(old)
    stored = emit.initializer(f"{base}_q", rounded.integers)
    look_up = emit.node("Gather", [stored, ids], f"{row}_q", attributes=list(node.attributes.values()))
    made = [look_up]
    if params.axis is None:
        made.append(emit.restore(look_up.outputs[0], params, base))
    else:
        # The columns of the table are its last axis, which is also the last axis of the output.
        made.append(emit.node("Cast", [look_up.outputs[0]], f"{row}_i", attributes=[TO_FLOAT]))
        scale = emit.scale(base, params)
        if params.axis == 0:
            scale = _scales_of_rows(emit, node, scale, f"{row}_s")
        made.append(emit.node("Mul", [made[-1].outputs[0], scale], f"{row}_dq"))
    emit.replace(node, made, made[-1].outputs[0])


def _scales_of_rows(emit: Emitter, look_up: ir.Node, scale: ir.Value, name: str) -> ir.Value:
    """Given: ``scale`` [rows], shared with the MatMul. Result: the scales of the rows looked up [..., 1].

    The runtime folds the Unsqueeze when it loads the file. A Gather of ``scale`` itself would prevent the
    fusion of the MatMul.
    """
    key = ("column", name_of(scale))
    if key not in emit.emitted:
        last = emit.initializer("last_axis", np.asarray([-1], np.int64))
        column = emit.node("Unsqueeze", [scale, last], f"{name}_column")
        emit.graph.insert_before(look_up, column)
        emit.emitted[key] = column.outputs[0]
    rows = emit.node("Gather", [emit.emitted[key], look_up.inputs[1]], name)
    emit.graph.insert_before(look_up, rows)
    return rows.outputs[0]


def _feeds_layer_norm(add: ir.Node) -> bool:
    """Whether a layer normalization, fused or as single operators, consumes this Add of two activations."""
    if any(constant(v) is not None for v in add.inputs):
        return False
    consumers = {use.node.op_type for use in add.outputs[0].uses()}
    return "LayerNormalization" in consumers or {"ReduceMean", "Sub"} <= consumers


def _as_sum(emit: Emitter, add: ir.Node) -> None:
    """Given: ``Add(x, y) -> LayerNormalization``. Result: ``Sum(x, y) -> LayerNormalization``, the same.

    Where shapes are known, the runtime fuses the former to SkipLayerNormalization, whose CPU kernel takes six
    times as long as the two operators.
    """
    out = add.outputs[0]
    total = emit.node("Sum", list(add.inputs), f"{name_of(out)}_sum")
    total.name = add.name  # profiles are matched by name
    emit.replace(add, [total], total.outputs[0])


def _drop_unused_dequantize(graph: ir.Graph) -> None:
    """Remove each DequantizeLinear without consumers: the runtime would compute it."""
    for node in list(graph):
        real = node.outputs[0]
        if node.op_type == "DequantizeLinear" and not real.uses() and not real.is_graph_output():
            graph.remove(node, safe=True)


def _tidy_initializers(graph: ir.Graph) -> None:
    """Remove unused initializers; keep the types of the others in their tensors only."""
    for body in graph.subgraphs():
        for name, value in list(body.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del body.initializers[name]
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
        elif not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None
