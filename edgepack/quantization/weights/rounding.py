"""Weight rounding: the integers that represent a weight, and its corrected float bias."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibration.frontier import supports_frontier
from edgepack.data.samples import Samples
from edgepack.ir.model import name_of, new_initializer
from edgepack.ir.numerics import dequantize, quantize, weight_limit
from edgepack.ir.scheme import QuantParams
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.plan.types import GroupPlan, Precision, QuantPlan
from edgepack.quantization.weights.bias_correction import mean_error
from edgepack.quantization.weights.codebook_scales import codebook_scales_of
from edgepack.quantization.weights.gptq import round_gptq, shrink_moments
from edgepack.quantization.weights.low_bit import LowBit, scale_by_error
from edgepack.quantization.weights.matrix import bias_of, from_groups, has_rows, to_groups, weight_of
from edgepack.quantization.weights.moments import InputMoments, stream_moments
from edgepack.quantization.weights.params import reduced_range_outputs, smoothed, weight_params
from edgepack.quantization.weights.sequential import intended_weight, stream_sequential
from edgepack.quantization.weights.smoothquant import smoothing_factors

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Stored integers of a weight (in the weight's own layout) and the bias, float32 ``[channels]``."""

    integers: npt.NDArray[np.integer]
    bias: Floats | None


Rounding = Callable[[QuantPlan], dict[str, Rounded]]
"""Stored weights of a plan, by group name."""


@dataclass(slots=True)
class Rounder:
    """Rounds the weights of any plan of one model, each weight once per set of parameters.

    With moments of its inputs (:mod:`.moments`) a weight is rounded by GPTQ, and the mean error of its
    output, ``stored · mean(actual input) - weight · mean(float input)``, is subtracted from the bias. With
    both means of the float model this is the analytic bias correction of Nagel et al. (2019, section 4.2),
    with actual inputs after quantized layers the empirical one.
    """

    model: ir.Model
    means: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Mean actual and mean float inputs [groups, K] by group."""
    rounded: Mapping[tuple[str, bytes], npt.NDArray[np.integer]] = field(default_factory=dict)
    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """SmoothQuant factors by activation, for plans, see :mod:`edgepack.quantization.weights.smoothquant`."""
    low_bit: Mapping[str, LowBit] = field(default_factory=dict)
    """Bits and scales by group, for plans, see :mod:`edgepack.quantization.weights.low_bit`."""
    trained: Mapping[tuple[str, bytes], Rounded] = field(default_factory=dict)
    """Weights of static groups from training, by group and scale; they take precedence."""

    def __call__(self, plan: QuantPlan) -> dict[str, Rounded]:
        """The stored weight and the bias of every group that has a planned weight."""
        nodes = {n.name: n for n in self.model.graph}
        return {
            u.group.name: self.one(nodes[u.group.name], u, u.weight)
            for u in plan.groups
            if u.weight is not None
        }

    def one(self, node: ir.Node, group_plan: GroupPlan, params: QuantParams) -> Rounded:
        """The stored weight and the bias of one group, whose node is given."""
        if group_plan.precision is Precision.STATIC:
            found = self.trained.get((group_plan.group.name, params.scale.tobytes()))
            if found is not None:
                return found
        weight = smoothed(node, weight_of(node), group_plan.smoothing)
        stored = self.rounded.get((group_plan.group.name, params.scale.tobytes()))
        integers = _nearest(weight, params, group_plan.bits) if stored is None else stored
        bias = bias_of(node, group_plan)
        means = self.means.get(group_plan.group.name)
        if means is None:
            return Rounded(integers, bias)
        factors = np.asarray(group_plan.smoothing or 1, np.float32)
        # Without GPTQ the weight does not compensate drift, and correcting only its mean does not help.
        actual, intended = means[0 if stored is not None else 1] / factors, means[1] / factors
        matrix = to_groups(node, weight)
        real = to_groups(node, integers).astype(np.float32) * _scales(node, params)
        shift = mean_error(matrix, real, actual, intended)
        # A MatMul has no bias to correct, and an Add would cost a kernel.
        if bias is None and node.op_type == "MatMul":
            return Rounded(integers, None)
        return Rounded(integers, (0 if bias is None else np.broadcast_to(bias, shift.shape)) - shift)


def with_trained(rounder: Rounder, plan: QuantPlan, stored: Mapping[str, Rounded]) -> Rounder:
    """``rounder`` with the ``stored`` weights from training, for plans with the scales of ``plan``."""
    scales = {u.group.name: u.weight.scale.tobytes() for u in plan.groups if u.weight is not None}
    return replace(rounder, trained={(name, scales[name]): found for name, found in stored.items()})


def _nearest(weight: Floats, params: QuantParams, bits: int) -> npt.NDArray[np.integer]:
    integers = quantize(weight, params)
    # Scales chosen by error do not cover the largest weights.
    return integers if bits == 8 else np.clip(integers, -_most(bits), _most(bits))


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
    gptq: bool,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> Rounder:
    """Measure the inputs of the weights of ``plan`` and round the weights; returns a rounder for any plan.

    With low-bit weights, each layer is rounded for the outputs of the quantized layers before it, see
    :mod:`.sequential`; not in graphs with control flow.
    """
    nodes = {n.name: n for n in model.graph}
    planned = {u.group.name: u for u in plan.groups if u.weight is not None}
    groups = [
        u for u in (p.group for p in plan.groups) if u.name in planned and _measurable(u, nodes[u.name])
    ]
    means: dict[str, tuple[Floats, Floats]] = {}
    rounded: dict[tuple[str, bytes], npt.NDArray[np.integer]] = {}
    smoothing: dict[str, tuple[float, ...]] = {}
    low_bit: dict[str, LowBit] = {}
    shared = {v.name for v in model.graph.initializers.values() if len(v.uses()) > 1}
    rounder = Rounder(model, means, rounded, smoothing, low_bit)
    has_low_bit = any(u.bits < 8 for u in planned.values())
    if has_low_bit and gptq and supports_frontier(model):
        measured = stream_sequential(
            model,
            groups,
            samples,
            lambda graph: _store(graph, rounder, planned),
            threads=threads,
            seed=seed,
            on_sample=on_sample,
        )
    else:
        measured = stream_moments(
            model, groups, samples, with_second_moments=gptq, threads=threads, seed=seed, on_sample=on_sample
        )
    consumers: dict[str, list[ir.Node]] = {}
    for group in groups:
        if group.op_type in ("MatMul", "Gemm"):
            consumers.setdefault(group.inputs[0], []).append(nodes[group.name])
    tied = {u.inputs[0] for u in groups if u.table is not None}
    for group, moments in measured:
        if not moments.count:
            continue
        node, name = nodes[group.name], group.inputs[0]
        means[group.name] = (moments.mean, moments.mean if moments.intended is None else moments.intended)
        if planned[group.name].bits < 8:
            planned[group.name], low_bit[group.name] = _scaled(node, planned[group.name], moments)
        if moments.second is not None:
            if name in consumers and name not in smoothing:
                smoothing[name] = () if name in tied else _smoothing(consumers[name], moments)
            if group.weight in shared or (group.table is not None and planned[group.name].bits == 8):
                continue  # rounded to nearest it is equal for all consumers, and stored once
            for variant in _variants(node, planned[group.name], moments, smoothing.get(name, ()), plan):
                rounded[group.name, variant.params.scale.tobytes()] = _round_by_gptq(node, variant)
    rounder.smoothing = {name: factors for name, factors in smoothing.items() if factors}
    return rounder


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """A weight as some plan stores it: ``weight`` [groups, outputs, K] and second moments of its inputs."""

    weight: Floats
    second: Floats
    params: QuantParams
    reduced_range: tuple[bool, ...]
    limit: int


def _variants(
    node: ir.Node,
    group_plan: GroupPlan,
    moments: InputMoments,
    factors: tuple[float, ...],
    plan: QuantPlan,
) -> Iterator[_Variant]:
    """The weight as planned, and as dynamic precision stores it."""
    weight, is_low_bit = weight_of(node), group_plan.bits < 8
    limit = _most(group_plan.bits) if is_low_bit else weight_limit(plan.weight_scheme)
    assert moments.second is not None
    assert group_plan.weight is not None
    # With eight bits the errors are so small that shrinkage gains nothing (docs/decisions/rounding.md).
    shrinks = is_low_bit or moments.drift is not None
    second = shrink_moments(moments.second, moments.count) if shrinks else moments.second
    target = _target_weight(node, moments)
    yield _Variant(target, second, group_plan.weight, group_plan.reduced_range, limit)
    if is_low_bit or node.op_type not in ("MatMul", "Gemm"):
        return
    if factors:
        scale = np.asarray(factors, np.float32)
        params, reduced_range = _dynamic_params(node, smoothed(node, weight, factors), plan)
        yield _Variant(target * scale, second / np.outer(scale, scale), params, reduced_range, limit)
    elif plan.weight_scheme.saturates:
        yield _Variant(target, second, *_dynamic_params(node, weight, plan), limit)


def _target_weight(node: ir.Node, moments: InputMoments) -> Floats:
    """The weight [groups, outputs, K] that rounding approximates."""
    weight = to_groups(node, weight_of(node))
    return weight if codebook_scales_of(node) is not None else intended_weight(weight, moments)


def _scaled(node: ir.Node, group_plan: GroupPlan, moments: InputMoments) -> tuple[GroupPlan, LowBit]:
    """A low-bit group with the scales of least error."""
    assert group_plan.weight is not None
    most = _most(group_plan.bits)
    scale = scale_by_error(_target_weight(node, moments), moments.second, group_plan.weight, most)
    low_bit = LowBit(group_plan.bits, scale)
    return replace(group_plan, weight=low_bit.applied(group_plan.weight)), low_bit


def _most(bits: int) -> int:
    """The largest stored magnitude."""
    return (1 << bits - 1) - 1


def _store(graph: ir.Graph, rounder: Rounder, planned: Mapping[str, GroupPlan]) -> None:
    """Replace weights and biases in a subgraph by those stored, for groups that are rounded already."""
    nodes = {n.name: n for n in rounder.model.graph}
    for node in list(graph):
        group_plan = planned.get(node.name or "")
        if group_plan is None or group_plan.weight is None or group_plan.group.name not in rounder.means:
            continue
        found = rounder.one(nodes[node.name], group_plan, group_plan.weight)
        old = node.inputs[1]
        assert old is not None
        real = dequantize(found.integers, group_plan.weight)
        node.replace_input_with(1, new_initializer(graph, f"{name_of(old)}_stored", real))
        if found.bias is not None and node.op_type != "MatMul":
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, new_initializer(graph, f"{node.name}_bias_stored", found.bias))


def _dynamic_params(node: ir.Node, weight: Floats, plan: QuantPlan) -> tuple[QuantParams, tuple[bool, ...]]:
    """Parameters of a weight at dynamic precision, and which outputs have reduced range."""
    scheme = plan.weight_scheme
    reduced_range = reduced_range_outputs(node, weight, scheme) if scheme.saturates else ()
    return weight_params(node, weight, scheme, reduced_range), reduced_range


def _smoothing(consumers: Sequence[ir.Node], moments: InputMoments) -> tuple[float, ...]:
    """SmoothQuant factors for the activation that ``consumers`` share; none without enough gain."""
    if any(codebook_scales_of(node) is not None for node in consumers):
        return ()  # factors would change the codebook scales
    if any(value is not None and len(value.uses()) > 1 for value in (node.inputs[1] for node in consumers)):
        return ()  # factors would split a shared weight
    weights = [to_groups(node, weight_of(node))[0] for node in consumers]
    assert moments.second is not None
    mean_square = np.diagonal(moments.second[0])
    factors = smoothing_factors(weights, np.stack(moments.low), np.stack(moments.high), mean_square)
    return () if factors is None else tuple(factors.tolist())


def _measurable(group: FusionGroup, node: ir.Node) -> bool:
    return group.role is Role.HEAVY and has_rows(node) and bool(group.inputs)


def _round_by_gptq(node: ir.Node, variant: _Variant) -> npt.NDArray[np.integer]:
    """Stored integers, in the weight's own layout."""
    shape = variant.weight.shape[:2]
    most = np.full(shape, variant.limit, np.float32)
    if any(variant.reduced_range):
        reduced = np.broadcast_to(np.asarray(variant.reduced_range), (shape[0] * shape[1],)).reshape(shape)
        most = np.where(reduced, variant.limit >> 1, most)
    integers = round_gptq(variant.weight, variant.second, _scales(node, variant.params), most)
    return from_groups(node, integers.astype(variant.params.type.dtype))
