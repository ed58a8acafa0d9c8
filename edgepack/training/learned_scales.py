"""Learned activation scales.

Esser et al. (2020), learned step size quantization (LSQ): a scale gets gradients from rounding and from
saturated values. Zero points are fixed, so that zero stays exact. The trained tensor is the logarithm of the
ratio to the calibrated scale, so that one learning rate fits all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.calibration.ranges import Range
from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, name_of
from edgepack.ir.scheme import QuantParams
from edgepack.quantization.groups import activation_bounds
from edgepack.quantization.plan.plan import FIXED_RANGES
from edgepack.quantization.plan.types import Precision, QuantPlan
from edgepack.quantization.rewrite.hard_activations import HARD_ACTIVATIONS
from edgepack.training.graph import as_tensor
from edgepack.training.parameters import Parameters

MOST = 1.0
"""Limit of the magnitude of the logarithm."""


@dataclass(frozen=True, slots=True)
class LearnedScale:
    """One trained scale; activations with equal scales share it."""

    name: str
    """Name of the constant in the quantized graph."""
    start: Tensor
    most: float
    """Upper limit of the logarithm, at which the range is that of the activation function."""

    @property
    def key(self) -> str:
        """Key of the trained tensor in :class:`Parameters`."""
        return f"{self.name} learned"

    def value(self, parameters: Parameters) -> Tensor:
        """The current scale."""
        return self.start * parameters.tensors[self.key].clamp(-MOST, self.most).exp()

    def ratio(self, logarithm: Array) -> float:
        """Ratio of the trained scale to the calibrated one."""
        return float(np.exp(np.clip(logarithm, -MOST, self.most)))


Scales = dict[bytes, LearnedScale]
"""Scales by the bytes of the calibrated scale in the plan."""


def learned_scales(model: ir.Model, quantized: ir.Model, plan: QuantPlan, parameters: Parameters) -> Scales:
    """The trainable scales of ``quantized``, the quantized graph of ``plan``; adds a tensor for each to
    ``parameters``.

    Scales that an operator fixes (such as Softmax) are not trained, nor those used by integer bounds of a
    Clip or by rows of an embedding table.
    """
    fixed = _fixed(plan)
    most = _most(model, plan)
    found: Scales = {}
    for node in quantized.graph:
        value = node.inputs[1] if node.op_type == "QuantizeLinear" else None
        scale = None if value is None else constant(value)
        if value is None or scale is None or scale.ndim or (raw := scale.tobytes()) in fixed:
            continue
        if raw not in found:
            found[raw] = LearnedScale(name_of(value), as_tensor(scale), most.get(raw, MOST))
            parameters.add_apart(found[raw].key, torch.zeros(()))
    return found


def _fixed(plan: QuantPlan) -> set[bytes]:
    fixed: set[bytes] = set()
    for group_plan in plan.of(Precision.STATIC):
        group = group_plan.group
        if group.op_type in HARD_ACTIVATIONS:
            names = (*group.inputs, *group.outputs)
        elif group.op_type in FIXED_RANGES or (
            group.activation is not None and not group_plan.drop_activation
        ):
            names = group.outputs
        else:
            continue
        fixed |= {plan.activations[n].scale.tobytes() for n in names if n in plan.activations}
    return fixed


def _most(model: ir.Model, plan: QuantPlan) -> dict[bytes, float]:
    nodes = {n.name: n for n in model.graph}
    found: dict[bytes, float] = {}
    for group_plan in plan.of(Precision.STATIC):
        group = group_plan.group
        params = plan.activations.get(group.outputs[0]) if group.activation is not None else None
        if params is None or group.activation is None:
            continue
        low, high = _covered(params)
        floor, ceiling = activation_bounds(nodes[group.activation])
        room = [bound / end for bound, end in ((floor, low), (ceiling, high)) if end and np.isfinite(bound)]
        if room:
            raw = params.scale.tobytes()
            found[raw] = min(found.get(raw, MOST), max(0.0, float(np.log(min(room)))))
    return found


def _covered(params: QuantParams) -> tuple[float, float]:
    scale, zero = float(params.scale), int(params.zero_point)
    return (params.type.qmin - zero) * scale, (params.type.qmax - zero) * scale


def learned_ranges(
    plan: QuantPlan, ranges: Mapping[str, Range], scales: Scales, content: Mapping[str, Array]
) -> dict[str, Range]:
    """``ranges`` updated so that a plan derives the trained scales from them.

    ``content`` has the trained values by key.
    """
    found = dict(ranges)
    for name, params in plan.activations.items():
        learned = scales.get(params.scale.tobytes())
        if learned is None or name not in found:
            continue
        ratio = learned.ratio(content[learned.key])
        low, high = (end * ratio for end in _covered(params))
        if plan.activation_scheme.symmetric:
            low = -high
        found[name] = replace(found[name], low=low, high=high)
    return found
