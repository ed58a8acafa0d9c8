"""Rounding: which stored integers represent a weight, and which float bias goes with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibration.frontier import can_be_parted
from edgepack.data.samples import Samples
from edgepack.ir.model import name_of, new_initializer
from edgepack.ir.numerics import dequantize, quantize, weight_limit
from edgepack.ir.scheme import QuantParams
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.plan.types import GroupPlan, Precision, QuantPlan
from edgepack.quantization.weights.codebook_scales import codebook_scales_of
from edgepack.quantization.weights.gptq import round_gptq, trusted
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

    With moments of its inputs (:mod:`.moments`) a weight is rounded by GPTQ
    where ``gptq`` is set, and the mean error of its output is taken out of the bias: what rounding
    adds on average, ``stored · mean(actual input) - weight · mean(float input)``, is known. With both means
    of the float model this is the analytic correction of Nagel et al. (2019, section 4.2), with actual inputs
    behind quantized layers the empirical one.
    """

    model: ir.Model
    means: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Mean actual and mean float inputs [groups, K] by group."""
    rounded: Mapping[tuple[str, bytes], npt.NDArray[np.integer]] = field(default_factory=dict)
    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Factors by activation for plans to use, see :mod:`edgepack.quantization.weights.smoothquant`."""
    low_bit: Mapping[str, LowBit] = field(default_factory=dict)
    """Bits and scales by group for plans to use, see :mod:`edgepack.quantization.weights.low_bit`."""
    trained: Mapping[tuple[str, bytes], Rounded] = field(default_factory=dict)
    """What training has found for static groups, by group and scale; it goes before all else."""

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
        # Rounded to nearest after all, it does nothing else about drift, and the mean alone is no help.
        actual, intended = means[0 if stored is not None else 1] / factors, means[1] / factors
        matrix = to_groups(node, weight)
        real = to_groups(node, integers).astype(np.float32) * _scales(node, params)
        shift = np.einsum("gok,gk->go", real - matrix, actual)
        shift = (shift + np.einsum("gok,gk->go", matrix, actual - intended)).reshape(-1)
        # A bare MatMul has no bias to correct, and an Add for it would cost a kernel.
        if bias is None and node.op_type == "MatMul":
            return Rounded(integers, None)
        return Rounded(integers, (0 if bias is None else np.broadcast_to(bias, shift.shape)) - shift)


def with_trained(rounder: Rounder, plan: QuantPlan, stored: Mapping[str, Rounded]) -> Rounder:
    """``rounder`` with what training has ``stored`` for groups of ``plan``, in plans with these scales."""
    scales = {u.group.name: u.weight.scale.tobytes() for u in plan.groups if u.weight is not None}
    return replace(rounder, trained={(name, scales[name]): found for name, found in stored.items()})


def _nearest(weight: Floats, params: QuantParams, bits: int) -> npt.NDArray[np.integer]:
    integers = quantize(weight, params)
    # Scales that were chosen by error do not cover the largest weights.
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
    """Measure what flows into the weights of ``plan`` and round them once; gives a rounder for any plan.

    Where some weights have fewer than eight bits, each layer is rounded for the inputs that the stored layers
    before it will give, see :mod:`.sequential`; not in graphs with bodies of control flow.
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
    few = any(u.bits < 8 for u in planned.values())
    if few and gptq and can_be_parted(model):
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
            model, groups, samples, second_order=gptq, threads=threads, seed=seed, on_sample=on_sample
        )
    readers: dict[str, list[ir.Node]] = {}
    for group in groups:
        if group.op_type in ("MatMul", "Gemm"):
            readers.setdefault(group.inputs[0], []).append(nodes[group.name])
    tied = {u.inputs[0] for u in groups if u.table is not None}
    for group, moments in measured:
        if not moments.count:
            continue
        node, name = nodes[group.name], group.inputs[0]
        means[group.name] = (moments.mean, moments.mean if moments.intended is None else moments.intended)
        if planned[group.name].bits < 8:
            planned[group.name], low_bit[group.name] = _scaled(node, planned[group.name], moments)
        if moments.second is not None:
            if name in readers and name not in smoothing:
                smoothing[name] = () if name in tied else _smoothing(readers[name], moments)
            if group.weight in shared or (group.table is not None and planned[group.name].bits == 8):
                continue  # rounded to nearest it is the same for all who read it, and stored once
            for form in _forms(node, planned[group.name], moments, smoothing.get(name, ()), plan):
                rounded[group.name, form.params.scale.tobytes()] = _second_order(node, form)
    rounder.smoothing = {name: factors for name, factors in smoothing.items() if factors}
    return rounder


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """A weight that some plan may store: ``weight`` [groups, outputs, K] and the moments of its inputs."""

    weight: Floats
    second: Floats
    params: QuantParams
    reduced_range: tuple[bool, ...]
    limit: int


def _forms(
    node: ir.Node,
    group_plan: GroupPlan,
    moments: InputMoments,
    factors: tuple[float, ...],
    plan: QuantPlan,
) -> Iterator[_Form]:
    """As planned, and as dynamic products have it."""
    weight, few = weight_of(node), group_plan.bits < 8
    limit = _most(group_plan.bits) if few else weight_limit(plan.weight_scheme)
    assert moments.second is not None
    assert group_plan.weight is not None
    # Of eight bits so little is left to make up for that doubt gains nothing (docs/decisions/rounding.md).
    doubted = few or moments.drift is not None
    second = trusted(moments.second, moments.count) if doubted else moments.second
    meant = _meant(node, moments)
    yield _Form(meant, second, group_plan.weight, group_plan.reduced_range, limit)
    if few or node.op_type not in ("MatMul", "Gemm"):
        return
    if factors:
        scale = np.asarray(factors, np.float32)
        params, reduced_range = _dynamic_params(node, smoothed(node, weight, factors), plan)
        yield _Form(meant * scale, second / np.outer(scale, scale), params, reduced_range, limit)
    elif plan.weight_scheme.saturates:
        yield _Form(meant, second, *_dynamic_params(node, weight, plan), limit)


def _meant(node: ir.Node, moments: InputMoments) -> Floats:
    """The weight [groups, outputs, K] that rounding shall come near to."""
    weight = to_groups(node, weight_of(node))
    return weight if codebook_scales_of(node) is not None else intended_weight(weight, moments)


def _scaled(node: ir.Node, group_plan: GroupPlan, moments: InputMoments) -> tuple[GroupPlan, LowBit]:
    """A group with fewer than eight bits, its scales chosen by the error that they leave."""
    assert group_plan.weight is not None
    most = _most(group_plan.bits)
    scale = scale_by_error(_meant(node, moments), moments.second, group_plan.weight, most)
    few = LowBit(group_plan.bits, scale)
    return replace(group_plan, weight=few.applied(group_plan.weight)), few


def _most(bits: int) -> int:
    """The largest stored magnitude."""
    return (1 << bits - 1) - 1


def _store(graph: ir.Graph, rounder: Rounder, planned: Mapping[str, GroupPlan]) -> None:
    """Put the stored weights and biases of groups that are rounded already into a part of the model."""
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
    """Parameters of a weight in the dynamic form, and which outputs have seven bits."""
    scheme = plan.weight_scheme
    reduced_range = reduced_range_outputs(node, weight, scheme) if scheme.saturates else ()
    return weight_params(node, weight, scheme, reduced_range), reduced_range


def _smoothing(readers: Sequence[ir.Node], moments: InputMoments) -> tuple[float, ...]:
    """Factors for the activation that ``readers`` share; none where smoothing does not pay."""
    if any(codebook_scales_of(node) is not None for node in readers):
        return ()  # factors would take the weights off their grid
    if any(value is not None and len(value.uses()) > 1 for value in (node.inputs[1] for node in readers)):
        return ()  # or make several of a weight that is shared
    weights = [to_groups(node, weight_of(node))[0] for node in readers]
    assert moments.second is not None
    mean_square = np.diagonal(moments.second[0])
    factors = smoothing_factors(weights, np.stack(moments.low), np.stack(moments.high), mean_square)
    return () if factors is None else tuple(factors.tolist())


def _measurable(group: FusionGroup, node: ir.Node) -> bool:
    return group.role is Role.HEAVY and has_rows(node) and bool(group.inputs)


def _second_order(node: ir.Node, form: _Form) -> npt.NDArray[np.integer]:
    """Stored integers, in the weight's own layout."""
    shape = form.weight.shape[:2]
    most = np.full(shape, form.limit, np.float32)
    if any(form.reduced_range):
        fewer = np.broadcast_to(np.asarray(form.reduced_range), (shape[0] * shape[1],)).reshape(shape)
        most = np.where(fewer, form.limit >> 1, most)
    integers = round_gptq(form.weight, form.second, _scales(node, form.params), most)
    return from_groups(node, integers.astype(form.params.type.dtype))
