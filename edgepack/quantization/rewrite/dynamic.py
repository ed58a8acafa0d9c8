"""Dynamic quantization: integer MatMul and Gemm whose activation range is computed at run time.

Given::

    MatMul(x, w) -> y

Result (the runtime fuses it into one kernel)::

    DynamicQuantizeLinear(x) -> xq, xs, xz
    MatMulInteger(xq, w int8, xz) -> Cast(float) -> Mul(xs * ws) -> y
"""

import numpy as np
import onnx_ir as ir

from edgepack.ir.model import name_of
from edgepack.quantization.plan.types import GroupPlan
from edgepack.quantization.rewrite.emit import TO_FLOAT, Emitter
from edgepack.quantization.weights.rounding import Rounded


def apply_dynamic(emit: Emitter, node: ir.Node, group_plan: GroupPlan, rounded: Rounded) -> None:
    """Rewrite one MatMul or Gemm with a constant weight."""
    params = group_plan.weight
    assert params is not None
    assert group_plan.group.weight is not None
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    base, out = group_plan.group.weight, name_of(output)
    # Gemm with transB stores [N, K]; MatMulInteger takes [K, N].
    flipped = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    integers = np.ascontiguousarray(rounded.integers.T) if flipped else rounded.integers
    if group_plan.smoothing:
        x = _divided(emit, node, x, group_plan.smoothing)
    stored, x_scale, x_zero = _range_at_run_time(emit, node, x)
    weight = emit.initializer(f"{base}_q", integers)
    matmul = emit.node("MatMulInteger", [stored, weight, x_zero], f"{out}_i")
    real = emit.node("Cast", [matmul.outputs[0]], f"{out}_f", attributes=[TO_FLOAT])
    scale = emit.node("Mul", [x_scale, emit.scale(base, params)], f"{out}_s")
    made = [matmul, real, scale, emit.node("Mul", [real.outputs[0], scale.outputs[0]], f"{out}_dq")]
    if rounded.bias is not None:
        # The kernel fuses only a bias with one value per output.
        name = group_plan.group.bias or f"{base}_bias"
        bias = emit.initializer(name, np.broadcast_to(rounded.bias, integers.shape[1:]))
        made.append(emit.node("Add", [made[-1].outputs[0], bias], f"{out}_b"))
    emit.replace(node, made, made[-1].outputs[0])


def _divided(emit: Emitter, before: ir.Node, x: ir.Value, factors: tuple[float, ...]) -> ir.Value:
    """``x`` divided by its SmoothQuant factors; all consumers of ``x`` share it."""
    key = ("smoothed", name_of(x))
    if key not in emit.emitted:
        inverse = emit.initializer(f"{name_of(x)}_smoothing", 1 / np.asarray(factors, np.float32))
        node = emit.node("Mul", [x, inverse], f"{name_of(x)}_smooth")
        emit.graph.insert_before(before, node)
        emit.emitted[key] = node.outputs[0]
    return emit.emitted[key]


def _range_at_run_time(emit: Emitter, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Quantized values, scale and zero point of ``x``; all consumers of ``x`` share them."""
    key = ("dynamic", name_of(x))
    if (*key, 0) not in emit.emitted:
        node = emit.node("DynamicQuantizeLinear", [x], f"{name_of(x)}_q", outputs=3)
        emit.graph.insert_before(before, node)
        for index, value in enumerate(node.outputs):
            emit.emitted[(*key, index)] = value
    return emit.emitted[(*key, 0)], emit.emitted[(*key, 1)], emit.emitted[(*key, 2)]
