"""The plan: which units become integer and with which parameters. It decides and touches nothing."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibrate.ranges import Range
from edgepack.config import Override
from edgepack.errors import CalibrationError, ConfigError, did_you_mean
from edgepack.model import constant
from edgepack.numerics import MIN_SCALE, choose_params, choose_weight_params
from edgepack.quantize.grid import grid_of
from edgepack.quantize.hard import gate_params
from edgepack.quantize.pairs import could_saturate, with_fewer_bits
from edgepack.quantize.units import RECURRENT_OPS, Role, Unit, activation_bounds, consumers
from edgepack.scheme import Granularity, QuantParams, QuantScheme, QuantType
from edgepack.target import Target


class Method(StrEnum):
    """The form that a unit takes."""

    STATIC = "static"
    """Integer kernel between Q/DQ with calibrated ranges."""
    DYNAMIC = "dynamic"
    """Integer kernel, activation range found at run time."""
    WEIGHT_ONLY = "weight_only"
    """Weights stored as int8, arithmetic in float."""
    FLOAT = "float"


INTEGER_METHODS = frozenset({Method.STATIC, Method.DYNAMIC})
DYNAMIC_OPS = frozenset({"MatMul", "Gemm", "LSTM"})
"""Operators that have a dynamic form at all."""

# Outputs of these have a known range; 1/256 is what every integer kernel of them uses.
FIXED_RANGES: Mapping[str, tuple[float, float]] = {
    "Sigmoid": (0.0, 255 / 256),
    "Softmax": (0.0, 255 / 256),
    "Tanh": (-1.0, 127 / 128),
    "LogSoftmax": (-255 / 16, 0.0),
}


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """One unit's form; ``reason`` says why it is not integer, or why it takes the form it has."""

    unit: Unit
    method: Method
    reason: str = ""
    weight: QuantParams | None = None
    drop_activation: bool = False
    """The Relu or Clip is implied by the saturation of the integers that follow."""
    added_channels: int = 0
    """Channels of zeros that the input of a convolution gets, for the target's fast kernel."""
    narrow: tuple[bool, ...] = ()
    """Which outputs have weights of seven bits, lest sums saturate; none where empty."""
    smoothing: tuple[float, ...] = ()
    """What each input channel of a dynamic product is divided by, and its weights multiplied with."""


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """All decisions: a plan for each unit, and the parameters of each activation that gets a Q/DQ pair."""

    units: tuple[UnitPlan, ...]
    activations: Mapping[str, QuantParams]
    activation_scheme: QuantScheme
    weight_scheme: QuantScheme

    def of(self, method: Method) -> list[UnitPlan]:
        """The units that take ``method``."""
        return [u for u in self.units if u.method is method]


def requested_methods(units: Sequence[Unit], overrides: Iterable[Override]) -> dict[str, tuple[Method, str]]:
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
        by_name = [o for o in overrides if any(fnmatch.fnmatch(unit.name, p) for p in o.nodes)]
        by_type = [o for o in overrides if unit.op_type in o.op_types]
        chosen = next(iter([*by_name, *by_type]), None)
        if chosen is not None and chosen.method != "auto":
            requested[unit.name] = (Method(chosen.method), chosen.reason)
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
    methods: Mapping[str, tuple[Method, str]],
    smoothing: Mapping[str, tuple[float, ...]] | None = None,
    narrow: Mapping[str, tuple[bool, ...]] | None = None,
) -> QuantPlan:
    """Decide the form of each unit.

    ``smoothing`` has factors by activation, see :mod:`.smooth`; ``narrow`` the outputs of static units that
    get weights of seven bits, see :mod:`.saturation`.

    A heavy unit takes the method asked for, where the target has it. A light or moving unit is integer when
    everything it reads is, and when an integer unit follows; otherwise a pair of conversions would buy
    nothing.

    Raises:
        CalibrationError: a range that the plan needs was not measured.
    """
    readers = consumers(model)
    forms = _first_sweep(units, ranges, target, methods)
    if not target.kernels.to_the_end:
        forms = _drop_dangling(units, forms, readers)
    forms = _drop_second_copies(units, forms, readers)
    return _parameters(model, units, ranges, target, forms, readers, smoothing or {}, narrow or {})


def _first_sweep(
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    methods: Mapping[str, tuple[Method, str]],
) -> dict[str, tuple[Method, str]]:
    """Each unit's method, sources first; ``integer`` are the values that an integer unit leaves."""
    integer: set[str] = set()
    forms: dict[str, tuple[Method, str]] = {}
    for unit in units:
        method, reason = _form(unit, integer, ranges, target, methods[unit.name])
        forms[unit.name] = (method, reason)
        if method is Method.STATIC:
            integer.update(unit.outputs)
    return forms


def _form(
    unit: Unit,
    integer: set[str],
    ranges: Mapping[str, Range],
    target: Target,
    requested: tuple[Method, str],
) -> tuple[Method, str]:
    kernels = target.kernels
    method, why = requested
    if unit.role is Role.FLOAT:
        return Method.FLOAT, unit.reason
    if unit.constants and not unit.inputs and unit.op_type == "Gather":
        # An embedding: the table is data, the indices come in.
        if method is Method.FLOAT:
            return Method.FLOAT, why or "asked for"
        if "Gather" in kernels.weight_only:
            return Method.WEIGHT_ONLY, "embedding: int8 rows, dequantized after the look-up"
        return Method.FLOAT, "the target's runtime has no weight_only kernel for Gather"
    if not unit.inputs:
        return Method.FLOAT, "reads constants only"
    if method is Method.FLOAT:
        return Method.FLOAT, why or "asked for"
    if unit.role is Role.HEAVY:
        return _heavy_form(unit, ranges, target, method, why)
    if method is not Method.STATIC:
        return Method.FLOAT, why or f"has no {method} form"
    missing = [name for name in unit.inputs if name not in integer]
    if missing:
        return Method.FLOAT, f"its input {missing[0]!r} is float"
    unmeasured = [name for name in unit.outputs if name not in ranges and unit.role is Role.LIGHT]
    if unmeasured:
        return Method.FLOAT, f"no sample reached its output {unmeasured[0]!r}"
    return Method.STATIC, ""


def _heavy_form(
    unit: Unit, ranges: Mapping[str, Range], target: Target, method: Method, why: str
) -> tuple[Method, str]:
    """``why``, the reason of the request, explains the form asked for, and float instead of stored weights.

    Where an integer form was asked for and another one results, the reason is that of the plan.
    """
    kernels, op = target.kernels, unit.op_type
    asked_integer = method in INTEGER_METHODS
    if method is Method.STATIC and op in kernels.integer and op not in RECURRENT_OPS:
        unmeasured = [name for name in (*unit.inputs, *unit.outputs) if name not in ranges]
        if unmeasured:
            return Method.FLOAT, f"no sample reached {unmeasured[0]!r}"
        return Method.STATIC, why
    no_form = f"the target's runtime has no {method} kernel for {op}"
    if unit.weight is None:
        no_form = f"two activations: no {method} form"
    elif asked_integer and op in kernels.dynamic and op in DYNAMIC_OPS:
        return Method.DYNAMIC, why if method is Method.DYNAMIC else f"no static kernel for {op}"
    elif op in kernels.weight_only:
        stored = f"no {method} kernel for {op}; weights stored as int8"
        return Method.WEIGHT_ONLY, stored if asked_integer else why
    return Method.FLOAT, no_form if asked_integer else why or no_form


def _drop_dangling(
    units: Sequence[Unit], forms: dict[str, tuple[Method, str]], readers: Mapping[str, list[ir.Node]]
) -> dict[str, tuple[Method, str]]:
    """Light and moving units with nothing integer behind them go back to float, sinks first."""
    forms = dict(forms)
    unit_of = {u.name: u for u in units}
    inner = {u.activation for u in units if u.activation}
    for unit in reversed(units):
        if forms[unit.name][0] is not Method.STATIC or unit.role is Role.HEAVY:
            continue
        after = {n.name for name in unit.outputs for n in readers.get(name, ())} - inner
        if not any(forms[name][0] is Method.STATIC for name in after if name in unit_of):
            forms[unit.name] = (Method.FLOAT, "nothing integer follows")
    return forms


def _drop_second_copies(
    units: Sequence[Unit], forms: Mapping[str, tuple[Method, str]], readers: Mapping[str, list[ir.Node]]
) -> dict[str, tuple[Method, str]]:
    """Weights that the file must hold in float anyway are not stored as int8 besides."""
    in_float = {u.name for u in units if forms[u.name][0] is Method.FLOAT}
    known = {u.name for u in units}
    forms = dict(forms)
    for unit in units:
        if forms[unit.name][0] is not Method.WEIGHT_ONLY:
            continue
        for name in (unit.weight, *unit.constants):
            others = [n for n in readers.get(name or "", ()) if n.name in in_float or n.name not in known]
            if others:
                reason = f"{others[0].name!r} needs {name!r} in float: storing int8 as well would cost bytes"
                forms[unit.name] = (Method.FLOAT, reason)
    return forms


def _parameters(
    model: ir.Model,
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    forms: Mapping[str, tuple[Method, str]],
    readers: Mapping[str, list[ir.Node]],
    smoothing: Mapping[str, tuple[float, ...]],
    narrow: Mapping[str, tuple[bool, ...]],
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
        if method is Method.STATIC:
            inputs = [activation(name) for name in unit.inputs]
            if unit.role is Role.MOVE:
                activations.update(dict.fromkeys(unit.outputs, inputs[0]))
            elif _needs_output(unit, target, static, readers):
                outputs = [activation(name, unit) for name in unit.outputs]
                drop = unit.activation is not None and _implied(nodes[unit.activation], outputs[0])
            fewer = narrow.get(unit.name, ())
            weight = _weight_params(unit, nodes, target, inputs[0], fewer)
            multiple = target.quantization.input_channels_multiple
            added = _added_channels(unit, nodes[unit.name], multiple)
        elif method is not Method.FLOAT:
            if method is Method.DYNAMIC and unit.op_type in ("MatMul", "Gemm"):
                factors = smoothing.get(unit.inputs[0], ())
            if method is Method.DYNAMIC and target.quantization.saturates:
                fewer = _narrow_dynamic(unit, nodes[unit.name], target.quantization.weight, factors)
            weight = _weight_params(unit, nodes, target, None, fewer, factors)
        if any(fewer) and not reason:
            reason = f"{sum(fewer)} of {len(fewer)} outputs have 7-bit weights: 8 would saturate"
        planned.append(UnitPlan(unit, method, reason, weight, drop, added, fewer, factors))
    return QuantPlan(tuple(planned), activations, scheme, target.quantization.weight)


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


def _added_channels(unit: Unit, node: ir.Node, multiple: int) -> int:
    """How many channels of zeros bring a dense spatial convolution to the target's fast kernel."""
    weight = constant(node.inputs[1]) if unit.op_type == "Conv" else None
    if weight is None or node.attributes.get_int("group", 1) != 1 or max(weight.shape[2:]) == 1:
        return 0
    channels = int(weight.shape[1])
    added = -channels % multiple
    return added if added * 2 <= channels else 0


def weight_axis(op_type: str, node: ir.Node) -> int | None:
    """The axis of a weight that holds output channels; ``None`` where channels cannot have own scales."""
    if op_type == "Conv":
        return 0
    if op_type == "ConvTranspose":
        group = node.attributes.get("group")
        return 1 if group is None or group.as_int() == 1 else None
    if op_type == "Gemm":
        trans_b = node.attributes.get("transB")
        return 0 if trans_b is not None and trans_b.as_int() else 1
    if op_type == "MatMul":
        return -1
    if op_type == "Gather":
        # Rows keep their last axis whatever the shape of the indices, unless it is the axis they pick from.
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        rank = len(shape) if shape is not None else 0
        return -1 if node.attributes.get_int("axis", 0) % max(rank, 1) != rank - 1 else None
    return None


def _weight_params(
    unit: Unit,
    nodes: Mapping[str | None, ir.Node],
    target: Target,
    x: QuantParams | None,
    narrow: tuple[bool, ...],
    factors: tuple[float, ...] = (),
) -> QuantParams | None:
    node = nodes[unit.name]
    source = node.inputs[0] if unit.op_type == "Gather" else node.inputs[1] if unit.weight else None
    array = constant(source) if source is not None else None
    if array is None or unit.op_type in RECURRENT_OPS:
        return None
    params = weight_params(node, smoothed(node, array, factors), target.quantization.weight, narrow)
    if x is None:
        return params
    bias = constant(node.inputs[2]) if unit.bias else None
    return _fit_bias(params, np.zeros(1, np.float32) if bias is None else bias, x)


def weight_params(
    node: ir.Node, weight: npt.NDArray[np.float32], scheme: QuantScheme, narrow: tuple[bool, ...] = ()
) -> QuantParams:
    """Parameters of the ``weight`` of a node, one scale an output channel where scheme and node allow.

    ``narrow`` outputs have seven bits. A weight that stands on a grid keeps it.
    """
    axis = weight_axis(node.op_type, node)
    whole = scheme.granularity is Granularity.PER_TENSOR or axis is None
    grid = grid_of(node) if scheme.type is QuantType.INT8 and not (whole or scheme.reduce_range) else None
    if grid is not None and axis is not None:
        params = QuantParams(scheme.type, grid, np.zeros(grid.shape, scheme.type.dtype), axis % weight.ndim)
        return with_fewer_bits(weight, params, scheme, narrow)
    params = choose_weight_params(weight, scheme, None if whole or axis is None else axis % weight.ndim)
    return with_fewer_bits(weight, params, scheme, narrow)


def _narrow_dynamic(
    unit: Unit, node: ir.Node, scheme: QuantScheme, factors: tuple[float, ...]
) -> tuple[bool, ...]:
    """Outputs that could saturate: a range found at run time is used to its end in every run."""
    array = constant(node.inputs[1]) if unit.weight and unit.op_type not in RECURRENT_OPS else None
    return () if array is None else narrow_outputs(node, smoothed(node, array, factors), scheme)


def narrow_outputs(node: ir.Node, weight: npt.NDArray[np.float32], scheme: QuantScheme) -> tuple[bool, ...]:
    """Outputs of a dynamic product that need seven bits on a target that saturates."""
    return could_saturate(node, weight, weight_params(node, weight, scheme))


def smoothed(
    node: ir.Node, weight: npt.NDArray[np.float32], factors: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """The weight of a MatMul or Gemm with each input channel multiplied by its factor."""
    if not factors:
        return weight
    scale = np.asarray(factors, np.float32)
    by_output = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    return weight * (scale if by_output else scale[:, None])


def _fit_bias(weight: QuantParams, bias: npt.NDArray[np.float32], x: QuantParams) -> QuantParams:
    """Widen the scale of channels so small that their bias would not fit 32 bits, or its scale a float."""
    peak = np.abs(np.broadcast_to(bias.reshape(-1), (max(weight.scale.size, bias.size),)))
    peak = peak if weight.axis is not None else peak.max()
    least = np.maximum(peak / 2.0**30, float(MIN_SCALE)) / float(x.scale)
    scale = np.maximum(weight.scale, least.reshape(weight.scale.shape)).astype(np.float32)
    return QuantParams(weight.type, scale, weight.zero_point, weight.axis)
