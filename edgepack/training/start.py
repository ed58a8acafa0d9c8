"""Start of QAT from integer weights that are not rounded to nearest, such as those of GPTQ.

Given a float weight ``w`` and its integers ``q``, the trained weight ``v`` is stored as ``round(v / s + d)``
with the fixed offset ``d = q - w / s``. At the start ``v = w``, which gives ``q``. The scales ``s`` are those
of the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import clone, new_initializer
from edgepack.ir.numerics import weight_limit
from edgepack.quantization.plan.types import Precision, QuantPlan
from edgepack.quantization.weights.matrix import bias_of, weight_of
from edgepack.quantization.weights.rounding import Rounded


@dataclass(frozen=True, slots=True, eq=False)
class Displaced:
    """The offset ``d`` of one weight in its own layout, float32, and the largest stored magnitude."""

    codes: Array
    limit: Array
    bias: Array | None
    """The bias that a node without one gets; it is not trained."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """The start of training; ``model`` is the float model with the stored (corrected) biases."""

    model: ir.Model
    plan: QuantPlan
    displaced: Mapping[str, Displaced]
    """Offsets by fusion group."""

    def stored(self, trained: ir.Model) -> dict[str, Rounded]:
        """The integer weights of ``trained``, which is :attr:`model` with trained weights."""
        nodes = {n.name: n for n in trained.graph}
        found = {}
        for group_plan in self.plan.of(Precision.STATIC):
            name, params = group_plan.group.name, group_plan.weight
            if name in self.displaced and params is not None:
                node, own = nodes[name], self.displaced[name]
                codes = np.rint(weight_of(node) / along(params.scale, params.axis, node) + own.codes)
                integers = np.clip(codes, -own.limit, own.limit).astype(params.type.dtype)
                bias = bias_of(node, group_plan)
                found[name] = Rounded(integers, own.bias if bias is None else bias)
        return found


def start_from(model: ir.Model, plan: QuantPlan, stored: Mapping[str, Rounded]) -> Start:
    """The start from the ``stored`` weights and biases of the static int8 groups of ``plan``."""
    begun, displaced = clone(model), {}
    nodes = {n.name: n for n in begun.graph}
    for group_plan in plan.of(Precision.STATIC):
        name, params = group_plan.group.name, group_plan.weight
        if params is None or name not in stored:
            continue
        node, rounded = nodes[name], stored[name]
        exact = weight_of(node) / along(params.scale, params.axis, node)
        most = weight_limit(replace(plan.weight_scheme, bits=group_plan.bits))
        limits = (
            np.where(group_plan.reduced_range, most >> 1, most)
            if any(group_plan.reduced_range)
            else np.array(most)
        )
        displaced[name] = Displaced(
            np.asarray(rounded.integers - exact, np.float32),
            along(limits.astype(np.float32), params.axis if limits.ndim else None, node),
            rounded.bias if group_plan.group.bias is None else None,
        )
        if rounded.bias is not None and group_plan.group.bias is not None:
            bias = new_initializer(begun.graph, f"{name}_bias_start", rounded.bias.astype(np.float32))
            node.replace_input_with(2, bias)
    return Start(begun, plan, displaced)


def along(values: Array, axis: int | None, node: ir.Node) -> Array:
    """One value, or values by output, shaped to broadcast against the weight of ``node``."""
    shape = [1] * weight_of(node).ndim
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)
