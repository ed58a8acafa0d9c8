"""Scales of activations that are trained with the weights.

Esser et al. (2020), learned step size quantization: a scale has a gradient through rounding and through what
saturates. Zero points stay, so that zeros stay exact; what is trained is the logarithm of a scale against the
calibrated one, so that one learning rate serves all.
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
from edgepack.training.held import Parameters

MOST = 1.0
"""Of the logarithm, either way: beyond, the calibrated range was no range of this value."""


@dataclass(frozen=True, slots=True)
class LearnedScale:
    """One scale; activations whose scales are equal share it."""

    name: str
    """Of the constant in the integer graph."""
    start: Tensor
    most: float
    """The largest logarithm: beyond it the range would be wider than what the activation clamps to."""

    @property
    def key(self) -> str:
        """Of what is trained, among the tensors that are held."""
        return f"{self.name} learned"

    def value(self, held: Parameters) -> Tensor:
        """As it is now."""
        return self.start * held.tensors[self.key].clamp(-MOST, self.most).exp()

    def ratio(self, logarithm: Array) -> float:
        """Of the trained scale to the calibrated one."""
        return float(np.exp(np.clip(logarithm, -MOST, self.most)))


Scales = dict[bytes, LearnedScale]
"""By the bytes of the scale in the plan."""


def learned_scales(model: ir.Model, quantized: ir.Model, plan: QuantPlan, held: Parameters) -> Scales:
    """Scales of ``quantized``, the integer graph of ``plan``; ``held`` gets a tensor for each.

    Those that follow from an operator's bounds stay, as they do in every plan, and those whose integers are
    bounds of a Clip or rows of a look-up.
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
            held.add_apart(found[raw].key, torch.zeros(()))
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
    """``ranges`` with those of which a scale was trained, as a plan will make that scale of them again.

    ``content`` has what was trained, by key.
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
