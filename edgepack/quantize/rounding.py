"""Rounding: which stored integers represent a weight, and which float bias goes with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.data import Samples
from edgepack.numerics import quantize, weight_limit
from edgepack.quantize.grid import grid_of
from edgepack.quantize.plan import QuantPlan, UnitPlan, narrow_outputs, smoothed, weight_params
from edgepack.quantize.second_order import round_second_order
from edgepack.quantize.smooth import smoothing_factors
from edgepack.quantize.statistics import InputMoments, stream_moments
from edgepack.quantize.units import Role, Unit
from edgepack.quantize.weights import bias_of, from_groups, has_rows, to_groups, weight_of
from edgepack.scheme import QuantParams

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Stored integers of a weight (in the weight's own layout) and the bias, float32 ``[channels]``."""

    integers: npt.NDArray[np.integer]
    bias: Floats | None


Rounding = Callable[[QuantPlan], dict[str, Rounded]]
"""Stored weights of a plan, by unit name."""


@dataclass(slots=True)
class Rounder:
    """Rounds the weights of any plan of one model, each weight once per set of parameters.

    With moments of its inputs (see :mod:`edgepack.quantize.statistics`) a weight is rounded by second order
    where ``second_order`` is set, and the mean error of its output is taken out of the bias: what rounding
    adds on average, ``(stored - weight) · mean(input)``, is known (Nagel et al., 2019, section 4.2).
    """

    model: ir.Model
    means: Mapping[str, Floats] = field(default_factory=dict)
    rounded: Mapping[tuple[str, bytes], npt.NDArray[np.integer]] = field(default_factory=dict)
    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Factors by activation for plans to use, see :mod:`edgepack.quantize.smooth`."""

    def __call__(self, plan: QuantPlan) -> dict[str, Rounded]:
        """The stored weight and the bias of every unit that has a planned weight."""
        nodes = {n.name: n for n in self.model.graph}
        return {
            u.unit.name: self._one(nodes[u.unit.name], u, u.weight)
            for u in plan.units
            if u.weight is not None
        }

    def _one(self, node: ir.Node, unit_plan: UnitPlan, params: QuantParams) -> Rounded:
        weight = smoothed(node, weight_of(node), unit_plan.smoothing)
        stored = self.rounded.get((unit_plan.unit.name, params.scale.tobytes()))
        integers = quantize(weight, params) if stored is None else stored
        bias = bias_of(node, unit_plan)
        mean = self.means.get(unit_plan.unit.name)
        if mean is None:
            return Rounded(integers, bias)
        if unit_plan.smoothing:
            mean = np.asarray(mean / np.asarray(unit_plan.smoothing), np.float32)
        matrix = to_groups(node, weight)
        real = to_groups(node, integers).astype(np.float32) * _scales(node, params)
        shift = np.einsum("gok,gk->go", real - matrix, mean).reshape(-1)
        # A bare MatMul has no bias to correct, and an Add for it would cost a kernel.
        if bias is None and node.op_type == "MatMul":
            return Rounded(integers, None)
        return Rounded(integers, (0 if bias is None else np.broadcast_to(bias, shift.shape)) - shift)


def _scales(node: ir.Node, params: QuantParams) -> Floats:
    """Scales as ``[groups, outputs, 1]``."""
    groups, outputs, _ = to_groups(node, weight_of(node)).shape
    scale = np.broadcast_to(params.scale.reshape(-1), (groups * outputs,))
    return scale.reshape(groups, outputs, 1)


def round_weights(
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples,
    *,
    second_order: bool,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> Rounder:
    """Measure what flows into the weights of ``plan`` and round them once; gives a rounder for any plan."""
    nodes = {n.name: n for n in model.graph}
    planned = {u.unit.name: u.weight for u in plan.units if u.weight is not None}
    units = [u for u in (p.unit for p in plan.units) if u.name in planned and _measurable(u, nodes[u.name])]
    shared = {v.name for v in model.graph.initializers.values() if len(v.uses()) > 1}
    means: dict[str, Floats] = {}
    rounded: dict[tuple[str, bytes], npt.NDArray[np.integer]] = {}
    measured = stream_moments(
        model,
        units,
        samples,
        second_order=second_order,
        threads=threads,
        seed=seed,
        on_sample=on_sample,
    )
    readers: dict[str, list[ir.Node]] = {}
    for unit in units:
        if unit.op_type in ("MatMul", "Gemm"):
            readers.setdefault(unit.inputs[0], []).append(nodes[unit.name])
    smoothing: dict[str, tuple[float, ...]] = {}
    limit = weight_limit(plan.weight_scheme)
    narrow = {u.unit.name: u.narrow for u in plan.units}
    for unit, moments in measured:
        if not moments.count:
            continue
        node, means[unit.name] = nodes[unit.name], moments.mean
        forms = [(planned[unit.name], narrow[unit.name], weight_of(node), moments.second)]
        if unit.inputs[0] in readers and moments.second is not None:
            name = unit.inputs[0]
            if name not in smoothing:
                smoothing[name] = _smoothing(readers[name], moments)
            if smoothing[name]:
                weight = smoothed(node, weight_of(node), smoothing[name])
                factors = np.asarray(smoothing[name], np.float32)
                second = moments.second / np.outer(factors, factors)
                forms.append((*_dynamic_params(node, weight, plan), weight, second))
            elif plan.weight_scheme.saturates:
                forms.append((*_dynamic_params(node, weight_of(node), plan), weight_of(node), moments.second))
        if unit.weight in shared:
            continue  # rounded to nearest it is the same for all who read it, and stored once
        for params, fewer, weight, second_moments in forms:
            if second_moments is not None and params is not None:
                key = (unit.name, params.scale.tobytes())
                most = np.where(fewer, limit >> 1, limit) if fewer else np.asarray(limit)
                rounded[key] = _second_order(node, weight, second_moments, params, most)
    return Rounder(model, means, rounded, {name: f for name, f in smoothing.items() if f})


def _dynamic_params(node: ir.Node, weight: Floats, plan: QuantPlan) -> tuple[QuantParams, tuple[bool, ...]]:
    """Parameters of a weight in the dynamic form, and which outputs have seven bits."""
    scheme = plan.weight_scheme
    narrow = narrow_outputs(node, weight, scheme) if scheme.saturates else ()
    return weight_params(node, weight, scheme, narrow), narrow


def _smoothing(readers: Sequence[ir.Node], moments: InputMoments) -> tuple[float, ...]:
    """Factors for the activation that ``readers`` share; none where smoothing does not pay."""
    if any(grid_of(node) is not None for node in readers):
        return ()  # factors would take the weights off their grid
    if any(value is not None and len(value.uses()) > 1 for value in (node.inputs[1] for node in readers)):
        return ()  # or make several of a weight that is shared
    weights = [to_groups(node, weight_of(node))[0] for node in readers]
    assert moments.second is not None
    mean_square = np.diagonal(moments.second[0])
    factors = smoothing_factors(weights, np.stack(moments.low), np.stack(moments.high), mean_square)
    return () if factors is None else tuple(factors.tolist())


def _measurable(unit: Unit, node: ir.Node) -> bool:
    return unit.role is Role.HEAVY and has_rows(node) and bool(unit.inputs)


def _second_order(
    node: ir.Node, weight: Floats, second: Floats, params: QuantParams, limit: npt.NDArray[np.integer]
) -> npt.NDArray[np.integer]:
    """Stored integers; ``limit`` of their magnitude is one number, or one an output."""
    groups = to_groups(node, weight)
    most = np.broadcast_to(limit.astype(np.float32).reshape(-1), (len(groups) * groups.shape[1],))
    most = most.reshape(groups.shape[:2])
    integers = round_second_order(groups, second, _scales(node, params), most)
    return from_groups(node, integers.astype(params.type.dtype))
