"""Which outputs saturate on x86 without VNNI: computed from stored weights and calibration inputs.

By weights alone nearly every layer could saturate. The peaks of its input channels rule most sums out; of the
rest, only those count that come near the limit on calibration samples.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.calibration.run import stream_activations
from edgepack.config.target import Target
from edgepack.data.samples import Samples
from edgepack.ir.numerics import quantize
from edgepack.ir.scheme import QuantParams, QuantType
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.types import GroupPlan, Precision, QuantPlan, Request
from edgepack.quantization.weights.matrix import to_groups, weight_of
from edgepack.quantization.weights.moments import weight_inputs
from edgepack.quantization.weights.pair_saturation import (
    LARGEST_PAIR,
    PAIRED_OPS,
    STEP,
    Integers,
    pair_sums,
    weight_pairs,
)

Stored = npt.NDArray[np.int64]
ReducedRange = Mapping[str, tuple[bool, ...]]
"""By group name, which outputs need seven-bit weights; groups that do not saturate are left out."""

MARGIN = 1.1
"""Only some positions are sampled; a sum may be this much larger at others."""


@dataclass(slots=True, eq=False)
class _Suspects:
    """Sums of one group that could exceed the limit, and their largest magnitudes on samples."""

    node: ir.Node
    params: QuantParams
    weights: Stored
    """[suspects, 2]"""
    columns: Stored
    """[suspects, 2] in the input of ``groups``"""
    groups: Stored
    outputs: Stored
    """Output channel of each."""
    channels: int
    largest: Stored

    def update(self, x: npt.NDArray[np.floating], rng: np.random.Generator) -> None:
        """Add the input of one sample."""
        inputs = _stored(weight_inputs(self.node, x, rng), self.params)
        inputs = np.pad(inputs, ((0, 0), (0, 1), (0, 0)))
        pair = inputs[self.groups[:, None], self.columns]  # [suspects, 2, positions]
        sums = np.abs(np.einsum("sip,si->sp", pair, self.weights))
        self.largest = np.maximum(self.largest, sums.max(-1, initial=0))


def outputs_that_saturate(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    ranges: Mapping[str, Range],
    target: Target,
    samples: Samples,
    *,
    seed: int,
) -> dict[str, tuple[bool, ...]]:
    """The outputs of static groups, by group name, whose sums saturate on ``samples`` or nearly.

    Raises:
        CalibrationError: the model fails on a sample, or a range was not measured.
    """
    threads = os.cpu_count() or 1  # of the host: the result does not depend on it
    nodes = {n.name: n for n in model.graph}
    plan = make_plan(model, groups, ranges, target, {u.name: Request(Precision.STATIC) for u in groups})
    static = [
        u
        for u in plan.of(Precision.STATIC)
        if u.weight is not None
        and u.group.op_type in PAIRED_OPS
        and plan.activations[u.group.inputs[0]].type is QuantType.UINT8
    ]
    peaks = _peaks(model, static, samples, threads=threads)
    suspects = {
        u.group.name: _suspects(
            nodes[u.group.name], u, plan.activations[u.group.inputs[0]], peaks[u.group.name]
        )
        for u in static
        if u.group.name in peaks
    }
    rng = np.random.default_rng(seed)
    open_groups = [
        u.group for u in static if u.group.name in suspects and len(suspects[u.group.name].outputs)
    ]
    names = list(dict.fromkeys(u.inputs[0] for u in open_groups))
    for _, arrays in stream_activations(model, samples, names, threads=threads):
        for group in open_groups:
            suspects[group.name].update(arrays[group.inputs[0]], rng)
    found = {}
    for name, suspect in suspects.items():
        beyond = np.zeros(suspect.channels, np.bool_)
        beyond[suspect.outputs[suspect.largest * MARGIN > LARGEST_PAIR]] = True
        if beyond.any():
            found[name] = tuple(beyond.tolist())
    return found


def _peaks(
    model: ir.Model, groups: Sequence[GroupPlan], samples: Samples, *, threads: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The largest value of each input channel, by group name: axis 1 for convolutions, else the last."""
    sources = {u.group.name: (u.group.inputs[0], u.group.op_type == "Conv") for u in groups}
    peaks: dict[tuple[str, bool], npt.NDArray[np.float32]] = {}
    names = list(dict.fromkeys(name for name, _ in sources.values()))
    for _, arrays in stream_activations(model, samples, names, threads=threads):
        for key in sorted(set(sources.values())):
            array = arrays[key[0]]
            if array.size:
                axis = 1 if key[1] else array.ndim - 1
                peak = array.max(axis=tuple(i for i in range(array.ndim) if i != axis)).astype(np.float32)
                peaks[key] = np.maximum(peaks.get(key, peak), peak)
    return {name: peaks[key] for name, key in sources.items() if key in peaks}


def _suspects(
    node: ir.Node, group_plan: GroupPlan, params: QuantParams, peak: npt.NDArray[np.float32]
) -> _Suspects:
    assert group_plan.weight is not None
    weight = weight_of(node)
    rows: Integers = to_groups(node, quantize(weight, group_plan.weight)).astype(np.int64)
    groups, outputs, columns = rows.shape
    # Padding has the value of the zero point, so no peak is below it.
    by_channel = np.maximum(_stored(peak, params), int(params.zero_point)).reshape(groups, -1)
    pairs = weight_pairs(node, weight, group_plan.added_channels)
    sums = pair_sums(rows, np.repeat(by_channel, columns // by_channel.shape[1], axis=1), pairs, STEP)
    group, output, pair = np.nonzero(sums > LARGEST_PAIR)
    padded = np.pad(rows, ((0, 0), (0, 0), (0, 1)))
    chosen = padded[group[:, None], output[:, None], pairs[pair]]
    return _Suspects(
        node=node,
        params=params,
        weights=chosen,
        columns=pairs[pair],
        groups=group,
        outputs=group * outputs + output,
        channels=groups * outputs,
        largest=np.zeros(len(group), np.int64),
    )


def _stored(x: npt.NDArray[np.float32], params: QuantParams) -> Stored:
    return quantize(x, params).astype(np.int64)


def reduced_range_notes(plan: QuantPlan) -> list[str]:
    """Notes for the report on seven-bit weights in ``plan``."""
    counts = [sum(u.reduced_range) for u in plan.groups if u.reduced_range]
    line = f"{sum(counts)} outputs of {len(counts)} groups have 7-bit weights: 8 would saturate"
    return [line] if counts else []
