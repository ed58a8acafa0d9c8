"""The plan: which units become integer and with which parameters. It decides and touches nothing."""

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
    Role,
    Unit,
    activation_bounds,
    consumers,
    override_for,
)
from edgepack.quantization.plan.concat_scales import tied_ranges
from edgepack.quantization.plan.precision import first_sweep, in_float
from edgepack.quantization.plan.preparation import NOTHING_PREPARED, WeightPreparation
from edgepack.quantization.plan.types import (
    Method,
    Methods,
    QuantPlan,
    Request,
    UnitPlan,
)
from edgepack.quantization.rewrite.hard_activations import gate_params
from edgepack.quantization.rewrite.substitutions import has_stand_in, is_slow_average
from edgepack.quantization.weights.group_params import narrow_dynamic, unit_weight_params
from edgepack.quantization.weights.params import added_channels
from edgepack.quantization.weights.stored_constants import stored_params
from edgepack.results import Cause, Reason

NOTHING_FOLLOWS = Reason(Cause.NEIGHBOURS, "nothing integer follows")
SLOW_AVERAGE = Reason(
    Cause.NO_KERNEL, "its integer kernel takes entries one by one, and no convolution computes the same"
)
# Outputs of these have a known range; 1/256 is what every integer kernel of them uses.
FIXED_RANGES: Mapping[str, tuple[float, float]] = {
    "Sigmoid": (0.0, 255 / 256),
    "Softmax": (0.0, 255 / 256),
    "Tanh": (-1.0, 127 / 128),
    "LogSoftmax": (-255 / 16, 0.0),
}


def requested_methods(units: Sequence[Unit], overrides: Iterable[Override]) -> dict[str, Request]:
    """The method and its reason for each unit that an override speaks of; a name wins over a type.

    Raises:
        ConfigError: an override names a node or an operator type that the model does not have.
    """
    overrides = tuple(overrides)
    names = [u.name for u in units]
    types = {u.op_type for u in units}
    for override in overrides:
        for pattern in override.nodes:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"override: no node is named {pattern!r}, {did_you_mean(pattern, names)}")
        for op_type in override.op_types:
            if op_type not in types:
                raise ConfigError(f"override: the model has no {op_type!r}, {did_you_mean(op_type, types)}")
    requested = {}
    for unit in units:
        chosen = override_for(unit, (o for o in overrides if o.bits is None or o.method != "auto"))
        if chosen is not None and chosen.method != "auto":
            requested[unit.name] = Request(Method(chosen.method), Reason(Cause.REQUEST, chosen.reason))
    return requested


def tensors_to_observe(units: Sequence[Unit]) -> list[str]:
    """Values whose ranges a static plan may need, in topological order.

    What no integer unit could ever write or read is left out: an attention mask may well be infinite.
    """
    names: dict[str, None] = {}
    reachable: set[str] = set()
    for unit in units:
        heavy = unit.role is Role.HEAVY
        if not heavy and (
            unit.role is Role.FLOAT or not unit.inputs or not reachable.issuperset(unit.inputs)
        ):
            continue
        reachable.update(unit.outputs)
        names.update(dict.fromkeys((*unit.inputs, *unit.outputs)))
    return list(names)


def make_plan(
    model: ir.Model,
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    methods: Methods,
    prepared: WeightPreparation = NOTHING_PREPARED,
) -> QuantPlan:
    """Decide the form of each unit.

    A heavy unit takes the method asked for, where the target has it. A light or moving unit is integer when
    everything it reads is, and when an integer unit follows; otherwise a pair of conversions would buy
    nothing.

    Raises:
        CalibrationError: a range that the plan needs was not measured.
    """
    readers = consumers(model)
    forms = first_sweep(units, ranges, target, _without_slow_averages(model, units, target, methods))
    if not target.kernels.to_the_end:
        forms = _drop_dangling(units, forms, readers)
    forms = _drop_second_copies(units, forms, readers)
    ranges = _tied(model, units, ranges, methods, forms)
    return _parameters(model, units, ranges, target, forms, readers, prepared)


def _without_slow_averages(
    model: ir.Model, units: Sequence[Unit], target: Target, methods: Methods
) -> Methods:
    """``methods`` with averages in float that integers are slow at, where what follows takes conversions."""
    if "AveragePool" not in target.kernels.stand_ins:
        return methods
    slow = {n.name for n in model.graph if n.op_type == "AveragePool" and is_slow_average(n)}
    light = {name for unit in units if unit.role is not Role.HEAVY for name in unit.inputs}
    alone = [u.name for u in units if u.name in slow and not light & set(u.outputs)]
    static = [name for name in alone if methods[name][0] is Method.STATIC]
    return {**methods, **dict.fromkeys(static, Request(Method.FLOAT, SLOW_AVERAGE))}


def _tied(
    model: ir.Model,
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    methods: Methods,
    forms: Methods,
) -> Mapping[str, Range]:
    tied = {u.name for u in units if u.op_type == "Concat" and methods[u.name][0] is Method.TIED}
    if not tied:
        return ranges
    static = [u for u in units if forms[u.name][0] is Method.STATIC]
    fixed = {"HardSigmoid", *FIXED_RANGES}
    return tied_ranges(static, {n.name: n for n in model.graph}, ranges, tied, fixed)


def _drop_dangling(
    units: Sequence[Unit], forms: dict[str, Request], readers: Mapping[str, list[ir.Node]]
) -> dict[str, Request]:
    """Light and moving units with nothing integer behind them go back to float, sinks first."""
    forms = dict(forms)
    unit_of = {u.name: u for u in units}
    inner = {u.activation for u in units if u.activation}
    for unit in reversed(units):
        if forms[unit.name][0] is not Method.STATIC or unit.role is Role.HEAVY:
            continue
        after = {n.name for name in unit.outputs for n in readers.get(name, ())} - inner
        if not any(forms[name][0] is Method.STATIC for name in after if name in unit_of):
            forms[unit.name] = Request(in_float(unit, Method.STATIC), NOTHING_FOLLOWS)
    return forms


def _drop_second_copies(
    units: Sequence[Unit], forms: Methods, readers: Mapping[str, list[ir.Node]]
) -> dict[str, Request]:
    """Weights that the file must hold in float anyway are not stored as int8 besides."""
    in_float = {u.name for u in units if forms[u.name][0] is Method.FLOAT}
    known = {u.name for u in units}
    twins: dict[str | None, set[str]] = {}
    for weight, table in ((u.weight, u.table) for u in units if u.weight and u.table):
        twins.setdefault(table, set()).add(weight)
        twins.setdefault(weight, set()).add(table)
    forms = dict(forms)
    for unit in units:
        if forms[unit.name][0] not in (Method.WEIGHT_ONLY, Method.STORED):
            continue
        own: tuple[str | None, ...] = unit.stored or (unit.weight, *unit.constants)
        for name in dict.fromkeys((*own, *(twin for n in own for twin in sorted(twins.get(n, ()))))):
            others = [n for n in readers.get(name or "", ()) if n.name in in_float or n.name not in known]
            if others:
                why = f"{others[0].name!r} needs {name!r} in float: storing int8 as well would cost bytes"
                forms[unit.name] = Request(Method.FLOAT, Reason(Cause.NEIGHBOURS, why))
    return forms


def _parameters(
    model: ir.Model,
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    forms: Methods,
    readers: Mapping[str, list[ir.Node]],
    prepared: WeightPreparation,
) -> QuantPlan:
    scheme = target.quantization.activation
    nodes = {n.name: n for n in model.graph}
    static = {u.name for u in units if forms[u.name][0] is Method.STATIC}
    activations: dict[str, QuantParams] = {}

    def activation(name: str, unit: Unit | None = None) -> QuantParams:
        if name not in activations:
            activations[name] = _activation_params(name, unit, nodes, ranges, scheme)
        return activations[name]

    planned = []
    for unit in units:
        method, reason = forms[unit.name]
        weight, drop, added = None, False, 0
        factors: tuple[float, ...] = ()
        fewer: tuple[bool, ...] = ()
        few = prepared.few_bits.get(unit.name)
        if method is Method.STATIC:
            inputs = [activation(name) for name in unit.inputs]
            if unit.role is Role.MOVE:
                activations.update(dict.fromkeys(unit.outputs, inputs[0]))
            elif _needs_output(unit, target, static, readers):
                outputs = [activation(name, unit) for name in unit.outputs]
                drop = unit.activation is not None and _implied(nodes[unit.activation], outputs[0])
            fewer = () if few else prepared.narrow.get(unit.name, ())
            weight = unit_weight_params(unit, nodes, target, inputs[0], fewer, few=few)
            multiple = target.quantization.input_channels_multiple
            added = added_channels(nodes[unit.name], multiple)
        elif method is not Method.FLOAT:
            if method is Method.DYNAMIC and unit.op_type in ("MatMul", "Gemm") and few is None:
                factors = prepared.smoothing.get(unit.inputs[0], ())
            if method is Method.DYNAMIC and target.quantization.saturates and few is None:
                fewer = narrow_dynamic(unit, nodes[unit.name], target.quantization.weight, factors)
            weight = unit_weight_params(unit, nodes, target, None, fewer, factors, few)
        if any(fewer) and not reason:
            why = f"{sum(fewer)} of {len(fewer)} outputs have 7-bit weights: 8 would saturate"
            reason = Reason(Cause.STORAGE, why)
        bits = few.bits if few is not None and weight is not None else 8
        if bits < 8 and not reason:
            reason = Reason(Cause.STORAGE, f"weights of {bits} bits")
        other = method is Method.STATIC and _stands_in(nodes[unit.name], target)
        kept = (
            stored_params(nodes[unit.name], unit, target.quantization.weight)
            if method is Method.STORED
            else ()
        )
        planned.append(UnitPlan(unit, method, reason, weight, drop, added, fewer, factors, bits, other, kept))
    planned = _with_tied_tables(planned)
    return QuantPlan(tuple(planned), activations, scheme, target.quantization.weight)


def _stands_in(node: ir.Node, target: Target) -> bool:
    return node.op_type in target.kernels.stand_ins and has_stand_in(node)


def _with_tied_tables(planned: Sequence[UnitPlan]) -> list[UnitPlan]:
    """Tables that a product multiplies with take its scales, one a row: both then store the same integers."""
    products = {u.unit.table: u for u in reversed(planned) if u.unit.table and u.weight and u.bits == 8}
    found = []
    for u in planned:
        product = products.get(next(iter(u.unit.constants), "")) if u.unit.op_type == "Gather" else None
        if product is not None and product.weight is not None and u.weight is not None:
            axis = None if product.weight.axis is None else 0
            reason = Reason(Cause.STORAGE, f"{u.reason}, the integers of {product.unit.name!r}")
            found.append(replace(u, weight=replace(product.weight, axis=axis), reason=reason))
        else:
            found.append(u)
    return found


def _needs_output(unit: Unit, target: Target, static: set[str], readers: Mapping[str, list[ir.Node]]) -> bool:
    """Matrix products have integer kernels with float output: better where nothing integer follows."""
    if unit.op_type not in target.kernels.float_output or unit.activation is not None:
        return True
    return any(node.name in static for name in unit.outputs for node in readers.get(name, ()))


def _activation_params(
    name: str,
    unit: Unit | None,
    nodes: Mapping[str | None, ir.Node],
    ranges: Mapping[str, Range],
    scheme: QuantScheme,
) -> QuantParams:
    if unit is not None and unit.op_type == "HardSigmoid":
        return gate_params(scheme)
    if unit is not None and unit.op_type in FIXED_RANGES:
        return choose_params(*FIXED_RANGES[unit.op_type], scheme)
    if name not in ranges:
        raise CalibrationError(f"tensor {name!r} has no range; calibrate again")
    low, high = ranges[name].low, ranges[name].high
    if unit is not None and unit.activation is not None:
        floor, ceiling = activation_bounds(nodes[unit.activation])
        low, high = max(low, floor), min(high, ceiling)
    return choose_params(min(low, high), high, scheme)


def _implied(activation: ir.Node, params: QuantParams) -> bool:
    """Whether saturation does what the activation does, within one step of the integers."""
    scale, zero = float(params.scale), int(params.zero_point)
    low, high = (params.type.qmin - zero) * scale, (params.type.qmax - zero) * scale
    floor, ceiling = activation_bounds(activation)
    return low >= floor - scale * 0.51 and high <= ceiling + scale * 0.51
