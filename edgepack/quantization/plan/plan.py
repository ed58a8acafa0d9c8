"""The plan: the precision and parameters of each fusion group. Nothing here changes the graph."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.config.recipe import Override
from edgepack.config.target import Target
from edgepack.errors import CalibrationError, ConfigError, did_you_mean
from edgepack.ir.numerics import choose_params
from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.groups import (
    FusionGroup,
    Role,
    activation_bounds,
    consumers,
    override_for,
)
from edgepack.quantization.plan.concat_scales import shared_ranges
from edgepack.quantization.plan.precision import first_sweep, in_float
from edgepack.quantization.plan.preparation import NOTHING_PREPARED, WeightPreparation
from edgepack.quantization.plan.types import (
    GroupPlan,
    Precision,
    Precisions,
    QuantPlan,
    Request,
)
from edgepack.quantization.rewrite.hard_activations import gate_params
from edgepack.quantization.rewrite.substitutions import has_substitute, is_slow_average
from edgepack.quantization.weights.group_params import group_weight_params, reduced_range_dynamic
from edgepack.quantization.weights.params import added_channels
from edgepack.quantization.weights.stored_constants import stored_params
from edgepack.results import Cause, Reason

NOTHING_FOLLOWS = Reason(Cause.NEIGHBOURS, "no integer group follows")
SLOW_AVERAGE = Reason(Cause.NO_KERNEL, "its integer kernel is slow, and no convolution computes the same")
# Operators whose output has a fixed range; their integer kernels use a scale of 1/256.
FIXED_RANGES: Mapping[str, tuple[float, float]] = {
    "Sigmoid": (0.0, 255 / 256),
    "Softmax": (0.0, 255 / 256),
    "Tanh": (-1.0, 127 / 128),
    "LogSoftmax": (-255 / 16, 0.0),
}


def requested_precisions(groups: Sequence[FusionGroup], overrides: Iterable[Override]) -> dict[str, Request]:
    """Precision and reason for each group that an override applies to; a name wins over a type.

    Raises:
        ConfigError: an override names a node or an operator type that the model does not have.
    """
    overrides = tuple(overrides)
    names = [u.name for u in groups]
    types = {u.op_type for u in groups}
    for override in overrides:
        for pattern in override.nodes:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"override: no node is named {pattern!r}, {did_you_mean(pattern, names)}")
        for op_type in override.op_types:
            if op_type not in types:
                raise ConfigError(f"override: the model has no {op_type!r}, {did_you_mean(op_type, types)}")
    requested = {}
    for group in groups:
        chosen = override_for(group, (o for o in overrides if o.bits is None or o.method != "auto"))
        if chosen is not None and chosen.method != "auto":
            requested[group.name] = Request(Precision(chosen.method), Reason(Cause.REQUEST, chosen.reason))
    return requested


def tensors_to_observe(groups: Sequence[FusionGroup]) -> list[str]:
    """Values whose ranges a static plan may need, in topological order.

    Values that no integer group can produce or consume are left out: an attention mask may be infinite.
    """
    names: dict[str, None] = {}
    reachable: set[str] = set()
    for group in groups:
        heavy = group.role is Role.HEAVY
        if not heavy and (
            group.role is Role.FLOAT or not group.inputs or not reachable.issuperset(group.inputs)
        ):
            continue
        reachable.update(group.outputs)
        names.update(dict.fromkeys((*group.inputs, *group.outputs)))
    return list(names)


def make_plan(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    ranges: Mapping[str, Range],
    target: Target,
    requests: Precisions,
    prepared: WeightPreparation = NOTHING_PREPARED,
) -> QuantPlan:
    """Decide the precision of each group.

    A heavy group has the requested precision where the target supports it. A light or moving group is integer
    where all its inputs are, and an integer group follows; otherwise its conversions would save nothing.

    Raises:
        CalibrationError: a range that the plan needs was not measured.
    """
    consumers_of = consumers(model)
    precisions = first_sweep(groups, ranges, target, _without_slow_averages(model, groups, target, requests))
    if not target.kernels.to_the_end:
        precisions = _drop_dangling(groups, precisions, consumers_of)
    precisions = _drop_second_copies(groups, precisions, consumers_of)
    ranges = _shared_scales(model, groups, ranges, requests, precisions)
    return _parameters(model, groups, ranges, target, precisions, consumers_of, prepared)


def _without_slow_averages(
    model: ir.Model, groups: Sequence[FusionGroup], target: Target, requests: Precisions
) -> Precisions:
    """``requests`` with float for AveragePool whose integer kernel is slow, where no light group follows."""
    if "AveragePool" not in target.kernels.stand_ins:
        return requests
    slow = {n.name for n in model.graph if n.op_type == "AveragePool" and is_slow_average(n)}
    light = {name for group in groups if group.role is not Role.HEAVY for name in group.inputs}
    alone = [u.name for u in groups if u.name in slow and not light & set(u.outputs)]
    static = [name for name in alone if requests[name][0] is Precision.STATIC]
    return {**requests, **dict.fromkeys(static, Request(Precision.FLOAT, SLOW_AVERAGE))}


def _shared_scales(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    ranges: Mapping[str, Range],
    requests: Precisions,
    precisions: Precisions,
) -> Mapping[str, Range]:
    shared = {
        u.name for u in groups if u.op_type == "Concat" and requests[u.name][0] is Precision.SHARED_SCALE
    }
    if not shared:
        return ranges
    static = [u for u in groups if precisions[u.name][0] is Precision.STATIC]
    fixed = {"HardSigmoid", *FIXED_RANGES}
    return shared_ranges(static, {n.name: n for n in model.graph}, ranges, shared, fixed)


def _drop_dangling(
    groups: Sequence[FusionGroup], precisions: dict[str, Request], consumers_of: Mapping[str, list[ir.Node]]
) -> dict[str, Request]:
    """Light and moving groups that no integer group follows go back to float, in reverse order."""
    precisions = dict(precisions)
    group_of = {u.name: u for u in groups}
    inner = {u.activation for u in groups if u.activation}
    for group in reversed(groups):
        if precisions[group.name][0] is not Precision.STATIC or group.role is Role.HEAVY:
            continue
        after = {n.name for name in group.outputs for n in consumers_of.get(name, ())} - inner
        if not any(precisions[name][0] is Precision.STATIC for name in after if name in group_of):
            precisions[group.name] = Request(in_float(group, Precision.STATIC), NOTHING_FOLLOWS)
    return precisions


def _drop_second_copies(
    groups: Sequence[FusionGroup], precisions: Precisions, consumers_of: Mapping[str, list[ir.Node]]
) -> dict[str, Request]:
    """Weights that the file holds in float anyway are not stored as int8 too."""
    in_float = {u.name for u in groups if precisions[u.name][0] is Precision.FLOAT}
    known = {u.name for u in groups}
    twins: dict[str | None, set[str]] = {}
    for weight, table in ((u.weight, u.table) for u in groups if u.weight and u.table):
        twins.setdefault(table, set()).add(weight)
        twins.setdefault(weight, set()).add(table)
    precisions = dict(precisions)
    for group in groups:
        if precisions[group.name][0] not in (Precision.WEIGHT_ONLY, Precision.STORED):
            continue
        own: tuple[str | None, ...] = group.stored or (group.weight, *group.constants)
        for name in dict.fromkeys((*own, *(twin for n in own for twin in sorted(twins.get(n, ()))))):
            others = [
                n for n in consumers_of.get(name or "", ()) if n.name in in_float or n.name not in known
            ]
            if others:
                why = f"{others[0].name!r} needs {name!r} in float: storing int8 as well would cost bytes"
                precisions[group.name] = Request(Precision.FLOAT, Reason(Cause.NEIGHBOURS, why))
    return precisions


def _parameters(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    ranges: Mapping[str, Range],
    target: Target,
    precisions: Precisions,
    consumers_of: Mapping[str, list[ir.Node]],
    prepared: WeightPreparation,
) -> QuantPlan:
    scheme = target.quantization.activation
    nodes = {n.name: n for n in model.graph}
    static = {u.name for u in groups if precisions[u.name][0] is Precision.STATIC}
    activations: dict[str, QuantParams] = {}

    def activation(name: str, group: FusionGroup | None = None) -> QuantParams:
        if name not in activations:
            activations[name] = _activation_params(name, group, nodes, ranges, scheme)
        return activations[name]

    planned = []
    for group in groups:
        precision, reason = precisions[group.name]
        weight, drop, added = None, False, 0
        factors: tuple[float, ...] = ()
        reduced: tuple[bool, ...] = ()
        low_bit = prepared.low_bit.get(group.name)
        if precision is Precision.STATIC:
            inputs = [activation(name) for name in group.inputs]
            if group.role is Role.MOVE:
                activations.update(dict.fromkeys(group.outputs, inputs[0]))
            elif _needs_output(group, target, static, consumers_of):
                outputs = [activation(name, group) for name in group.outputs]
                drop = group.activation is not None and _implied(nodes[group.activation], outputs[0])
            reduced = () if low_bit else prepared.reduced_range.get(group.name, ())
            weight = group_weight_params(group, nodes, target, inputs[0], reduced, low_bit=low_bit)
            multiple = target.quantization.input_channels_multiple
            added = added_channels(nodes[group.name], multiple)
        elif precision is not Precision.FLOAT:
            if precision is Precision.DYNAMIC and group.op_type in ("MatMul", "Gemm") and low_bit is None:
                factors = prepared.smoothing.get(group.inputs[0], ())
            if precision is Precision.DYNAMIC and target.quantization.saturates and low_bit is None:
                reduced = reduced_range_dynamic(group, nodes[group.name], target.quantization.weight, factors)
            weight = group_weight_params(group, nodes, target, None, reduced, factors, low_bit)
        if any(reduced) and not reason:
            why = f"{sum(reduced)} of {len(reduced)} outputs have 7-bit weights: 8 would saturate"
            reason = Reason(Cause.STORAGE, why)
        bits = low_bit.bits if low_bit is not None and weight is not None else 8
        if bits < 8 and not reason:
            reason = Reason(Cause.STORAGE, f"weights of {bits} bits")
        other = precision is Precision.STATIC and _is_substituted(nodes[group.name], target)
        kept = (
            stored_params(nodes[group.name], group, target.quantization.weight)
            if precision is Precision.STORED
            else ()
        )
        planned.append(
            GroupPlan(group, precision, reason, weight, drop, added, reduced, factors, bits, other, kept)
        )
    planned = _with_tied_embeddings(planned)
    return QuantPlan(tuple(planned), activations, scheme, target.quantization.weight)


def _is_substituted(node: ir.Node, target: Target) -> bool:
    return node.op_type in target.kernels.stand_ins and has_substitute(node)


def _with_tied_embeddings(planned: Sequence[GroupPlan]) -> list[GroupPlan]:
    """Tied embeddings: the table takes the scales of the MatMul, one a row, so both store one tensor."""
    matmuls = {u.group.table: u for u in reversed(planned) if u.group.table and u.weight and u.bits == 8}
    found = []
    for u in planned:
        matmul = matmuls.get(next(iter(u.group.constants), "")) if u.group.op_type == "Gather" else None
        if matmul is not None and matmul.weight is not None and u.weight is not None:
            axis = None if matmul.weight.axis is None else 0
            reason = Reason(Cause.STORAGE, f"{u.reason}, tied to {matmul.group.name!r}")
            found.append(replace(u, weight=replace(matmul.weight, axis=axis), reason=reason))
        else:
            found.append(u)
    return found


def _needs_output(
    group: FusionGroup, target: Target, static: set[str], consumers_of: Mapping[str, list[ir.Node]]
) -> bool:
    """Whether the output is quantized: matrix products have integer kernels with float output."""
    if group.op_type not in target.kernels.float_output or group.activation is not None:
        return True
    return any(node.name in static for name in group.outputs for node in consumers_of.get(name, ()))


def _activation_params(
    name: str,
    group: FusionGroup | None,
    nodes: Mapping[str | None, ir.Node],
    ranges: Mapping[str, Range],
    scheme: QuantScheme,
) -> QuantParams:
    if group is not None and group.op_type == "HardSigmoid":
        return gate_params(scheme)
    if group is not None and group.op_type in FIXED_RANGES:
        return choose_params(*FIXED_RANGES[group.op_type], scheme)
    if name not in ranges:
        raise CalibrationError(f"tensor {name!r} has no range; calibrate again")
    low, high = ranges[name].low, ranges[name].high
    if group is not None and group.activation is not None:
        floor, ceiling = activation_bounds(nodes[group.activation])
        low, high = max(low, floor), min(high, ceiling)
    return choose_params(min(low, high), high, scheme)


def _implied(activation: ir.Node, params: QuantParams) -> bool:
    """Whether saturation does what the activation does, within one quantization step."""
    scale, zero = float(params.scale), int(params.zero_point)
    low, high = (params.type.qmin - zero) * scale, (params.type.qmax - zero) * scale
    floor, ceiling = activation_bounds(activation)
    return low >= floor - scale * 0.51 and high <= ceiling + scale * 0.51
