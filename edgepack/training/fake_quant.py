"""Fake quantization: trains float weights through the quantized graph of a plan.

Given, in the quantized graph::

    DQ(w int8, s) -> Conv(DQ(x), ., DQ(b int32, s_x s))

Result, with trained float weights ``v`` and ``c``::

    DQ(round(v / s(v)), s(v)) -> Conv(DQ(x), ., DQ(round(c / (s_x s(v))), s_x s(v)))

``s(v)`` is the scale that a plan of the trained weights will choose, so a build with the same ranges computes
what was trained, up to rounding. Rounding uses the straight-through estimator (Jacob et al., 2018).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.ir.model import constant, new_initializer
from edgepack.ir.numerics import MIN_SCALE, weight_limit
from edgepack.quantization.plan.types import GroupPlan, Precision, QuantPlan
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder
from edgepack.training.graph import as_tensor, compile_model, run_program
from edgepack.training.learned_scales import learned_scales
from edgepack.training.operators.quantize import round_through
from edgepack.training.parameters import Parameters
from edgepack.training.start import Displaced, Start
from edgepack.training.step import spread
from edgepack.training.weights import keys_of, source_of

MOST_BIAS = 2.0**30
"""Largest integer bias for which the weight scale is not increased, as in plans."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A fusion group with an integer weight: the keys of its trained tensors and its own constants."""

    weight: str
    bias: str | None
    axis: int | None
    input_scale: Tensor
    fixed_scale: Tensor | None
    """The scale of the plan, if the group has reduced-range outputs or training starts from given
    integers."""
    limit: int
    added_channels: int
    tag: str
    start: tuple[Tensor, Tensor] | None
    """Offset and limit of the integers that training starts from, see :mod:`.start`."""


class QuantizedStudent:
    """The quantized graph of a plan, with integer weights computed from the trained float weights.

    At the start the integers are the nearest ones, or those of ``start``, whose model must be the trained
    one. With ``learn_ranges`` activation scales are trained too.
    """

    def __init__(
        self,
        model: ir.Model,
        parameters: Parameters,
        plan: QuantPlan,
        start: Start | None = None,
        *,
        learn_ranges: bool = False,
    ) -> None:
        self.model = apply_plan(model, plan, Rounder(model)(plan) if start is None else start.stored(model))
        keys = keys_of(model)
        floats, nodes = {n.name: n for n in model.graph}, {n.name: n for n in self.model.graph}
        self.groups: list[_Group] = []
        for group_plan in plan.of(Precision.STATIC):
            node, before = nodes[group_plan.group.name], floats[group_plan.group.name]
            source = source_of(before.inputs[1]) if group_plan.weight is not None else None
            if source is not None and keys[source] in parameters.tensors and _stored(node, 1):
                bias = (
                    source_of(before.inputs[2]) if group_plan.group.bias and len(before.inputs) > 2 else None
                )
                name = keys[bias] if bias is not None and keys[bias] in parameters.tensors else None
                displaced = None if start is None else start.displaced.get(group_plan.group.name)
                self.groups.append(
                    _own_constants(self.model, node, group_plan, plan, keys[source], name, displaced)
                )
        changing = {f"{u.tag}_{part}" for u in self.groups for part in ("w", "s", "b", "t")}
        # Weights that the quantized graph uses in float keep their names.
        left = set(keys_of(self.model).values())
        self.free = [key for key in parameters.tensors if key in left]
        self.scales = learned_scales(model, self.model, plan, parameters) if learn_ranges else {}
        changing |= {scale.name for scale in self.scales.values()}
        self.program = compile_model(self.model, changing | set(self.free))

    def __call__(
        self, feeds: Mapping[str, Tensor], parameters: Parameters, keep: list[str]
    ) -> dict[str, Tensor]:
        """Run the graph; return the values named in ``keep``."""
        values = {key: parameters.value(key) for key in self.free}
        learned = {raw: scale.value(parameters) for raw, scale in self.scales.items()}
        values |= {scale.name: learned[raw] for raw, scale in self.scales.items()}
        for group in self.groups:
            input_scale = learned.get(group.input_scale.numpy().tobytes(), group.input_scale)
            values.update(_stored_values(group, parameters, input_scale))
        return run_program(self.program, feeds, values, keep)


def _stored(node: ir.Node, slot: int) -> bool:
    value = node.inputs[slot] if slot < len(node.inputs) else None
    made = value.producer() if value is not None else None
    return made is not None and made.op_type == "DequantizeLinear" and constant(made.inputs[0]) is not None


def _own_constants(
    model: ir.Model,
    node: ir.Node,
    group_plan: GroupPlan,
    plan: QuantPlan,
    weight: str,
    bias: str | None,
    displaced: Displaced | None,
) -> _Group:
    """Give a group its own copies of shared constants, because training makes them differ."""
    params = group_plan.weight
    assert params is not None
    tag = f"tuned_{group_plan.group.name}"
    _own(model, node, 1, (f"{tag}_w", f"{tag}_s"))
    has_bias = bias is not None and _stored(node, 2)
    if has_bias:
        _own(model, node, 2, (f"{tag}_b", f"{tag}_t"))
    return _Group(
        weight,
        bias if has_bias else None,
        params.axis,
        as_tensor(plan.activations[group_plan.group.inputs[0]].scale),
        as_tensor(params.scale) if any(group_plan.reduced_range) or displaced is not None else None,
        weight_limit(replace(plan.weight_scheme, bits=group_plan.bits)),
        group_plan.added_channels,
        tag,
        None if displaced is None else (as_tensor(displaced.codes), as_tensor(displaced.limit)),
    )


def _own(model: ir.Model, node: ir.Node, slot: int, names: tuple[str, str]) -> None:
    value = node.inputs[slot]
    shared = value.producer() if value is not None else None
    assert shared is not None
    inputs = list(shared.inputs)
    for index, name in enumerate(names):
        array = constant(inputs[index])
        assert array is not None
        inputs[index] = new_initializer(model.graph, name, array)
    own = ir.Node("", "DequantizeLinear", inputs, list(shared.attributes.values()), num_outputs=1, name="")
    own.outputs[0].name = f"{names[0]}_dq"
    model.graph.insert_before(node, own)
    node.replace_input_with(slot, own.outputs[0])


def _stored_values(group: _Group, parameters: Parameters, input_scale: Tensor) -> dict[str, Tensor]:
    weight = parameters.value(group.weight)
    bias = None if group.bias is None else parameters.value(group.bias)
    codebook_scale = (
        parameters.scale(group.weight) if group.axis is not None and group.fixed_scale is None else None
    )
    scale = _scale(group, weight, bias, input_scale) if codebook_scale is None else codebook_scale
    along = scale if group.axis is None else spread(scale, group.axis, weight.dim())
    if group.start is None:
        stored = round_through(weight / along).clamp(-128, 127)
    else:
        displacement, limit = group.start
        stored = round_through(weight / along + displacement).clamp(-limit, limit)
    if group.added_channels:
        stored = torch.cat([stored, torch.zeros_like(stored[:, : group.added_channels])], 1)
    values = {f"{group.tag}_w": stored, f"{group.tag}_s": scale}
    if bias is not None:
        both = (input_scale * scale).float()
        count = weight.shape[group.axis] if group.axis is not None else bias.numel()
        values[f"{group.tag}_b"] = round_through(bias.reshape(-1).expand(count) / both)
        values[f"{group.tag}_t"] = both
    return values


def _scale(group: _Group, weight: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    """The scale that a plan chooses for these weights, without a gradient."""
    if group.fixed_scale is not None:
        return group.fixed_scale
    with torch.no_grad():
        if group.axis is None:
            peak = weight.abs().amax()
        else:
            peak = weight.abs().movedim(group.axis, 0).flatten(1).amax(1)
        scale = (peak / group.limit).clamp(min=float(MIN_SCALE))
        largest = torch.zeros(1) if bias is None else bias.abs().reshape(-1)
        if group.axis is None:
            largest = largest.amax()
        least = (largest / MOST_BIAS).clamp(min=float(MIN_SCALE)) / input_scale
        return torch.maximum(scale, least.expand_as(scale))
