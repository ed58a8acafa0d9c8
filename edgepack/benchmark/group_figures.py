"""Time and fidelity of each fusion group of a built model, against the float model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepack.benchmark.profile import match_groups, profile_ops
from edgepack.calibration.run import stream_activations
from edgepack.config.target import Target
from edgepack.data.samples import Samples
from edgepack.ir.arrays import Array
from edgepack.ir.files import save_model
from edgepack.ir.model import constant_tensor
from edgepack.ir.numerics import ratio_db
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.types import QuantPlan
from edgepack.results import GroupRow, finite
from edgepack.runtime.host import ExactRuntime, for_accuracy

PROFILED_RUNS = 20


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """Figures by group name; a group that the runtime fused into another has no time."""

    float_us: Mapping[str, float]
    built_us: Mapping[str, float]
    sqnr_db: Mapping[str, float]
    """``inf`` for equal outputs."""
    conversions_us: float
    """Time of the built model in QuantizeLinear, DequantizeLinear and layout changes."""


NOTHING_MEASURED = GroupFigures({}, {}, {}, 0.0)


def measure_groups(
    model: ir.Model, built: Path, plan: QuantPlan, samples: Samples, target: Target, folder: Path
) -> GroupFigures:
    """Time and compare each group of ``plan`` in the float ``model`` and in the quantized file ``built``.

    Raises:
        EdgepackError: see :func:`edgepack.benchmark.profile.profile_ops` and
            :func:`edgepack.calibration.run.stream_activations`.
    """
    runtime = target.runtime
    exact = isinstance(for_accuracy(target), ExactRuntime)
    groups = [u.group for u in plan.groups]
    feeds = [sample.feeds for sample in samples]
    plain = folder / "float.onnx"
    save_model(model, plain)
    before = match_groups(groups, profile_ops(plain, runtime, feeds, runs=PROFILED_RUNS))
    after = match_groups(groups, profile_ops(built, runtime, feeds, runs=PROFILED_RUNS))
    errors = group_errors(model, ir.load(built), groups, samples, threads=runtime.threads, exact=exact)
    return GroupFigures(before.us, after.us, errors, after.overhead_us)


def group_errors(
    model: ir.Model,
    built: ir.Model,
    groups: Sequence[FusionGroup],
    samples: Samples,
    *,
    threads: int,
    exact: bool = False,
) -> dict[str, float]:
    """SQNR in dB of the first output of each group, as its consumers get it; ``inf`` for equal outputs.

    It includes the errors of earlier groups, so it falls along the network; a noisy group causes a sudden
    drop. Groups whose output has no counterpart in ``built``, or is not float, are left out.

    ``exact``: int8 matrix products of ``built`` do not saturate, see :mod:`edgepack.runtime.host`.
    """
    found = _counterparts(built)
    own = {v.name for node in model.graph for v in node.outputs}
    pairs = {
        u.name: (u.outputs[0], found[u.outputs[0]]) for u in groups if u.outputs and u.outputs[0] in found
    }
    pairs = {name: pair for name, pair in pairs.items() if pair[0] in own}
    signal, noise = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    left = stream_activations(model, samples, list({a for a, _ in pairs.values()}), threads=threads)
    right = stream_activations(
        built, samples, list({b for _, b in pairs.values()}), threads=threads, exact=exact
    )
    for (_, float_values), (_, built_values) in zip(left, right, strict=True):
        for name, (a, b) in pairs.items():
            _add(signal, noise, name, float_values[a], built_values[b])
    return {name: ratio_db(signal[name], noise[name]) for name in pairs if signal[name] or noise[name]}


def _add(signal: dict[str, float], noise: dict[str, float], name: str, a: Array, b: Array) -> None:
    if a.shape != b.shape or not (a.dtype.kind == b.dtype.kind == "f"):
        return
    clean = np.isfinite(a) & np.isfinite(b)  # e.g. an attention mask of minus infinity
    wide = np.where(clean, a, 0).astype(np.float64)
    signal[name] += float((wide**2).sum())
    noise[name] += float(((wide - np.where(clean, b, 0)) ** 2).sum())


def _counterparts(built: ir.Model) -> dict[str, str]:
    """By a value's name the name that its consumers get: the value's, or that of its dequantized value."""
    names = {}
    for node in built.graph:
        for value in node.outputs:
            if value.name:
                names[value.name] = _restored(value).name or value.name
    return names


def _restored(value: ir.Value) -> ir.Value:
    for store in value.consumers():
        if store.op_type != "QuantizeLinear" or store.inputs[0] is not value:
            continue
        for restore in store.outputs[0].consumers():
            # A DequantizeLinear with one scale per channel belongs to a float group.
            scale = constant_tensor(restore.inputs[1]) if restore.op_type == "DequantizeLinear" else None
            if scale is not None and scale.size == 1:
                return restore.outputs[0]
    return value


def group_rows(plan: QuantPlan, model: ir.Model, figures: GroupFigures) -> tuple[GroupRow, ...]:
    """The rows of the report, in topological order."""
    sizes = {
        v.name: v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None
    }
    return tuple(
        GroupRow(
            name=u.group.name,
            op_type=u.group.op_type,
            method=str(u.precision),
            reason=u.reason.text,
            cause=u.reason.cause,
            summary=u.reason.summary or u.reason.text,
            parameters=sum(sizes.get(n or "", 0) for n in (u.group.weight, u.group.bias, *u.group.constants)),
            sqnr_db=_rounded(finite(figures.sqnr_db.get(u.group.name)), 2),
            float_us=_rounded(figures.float_us.get(u.group.name), 2),
            built_us=_rounded(figures.built_us.get(u.group.name), 2),
        )
        for u in plan.groups
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
