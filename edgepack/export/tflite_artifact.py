"""The ``.tflite`` of a package: written, run, and repaired where it is not accurate."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgepack.config.target import Target
from edgepack.errors import ExportError
from edgepack.evaluation.check import compare_outputs
from edgepack.export.inputs import ExportInputs, Shapes
from edgepack.export.tflite.export import TfliteSummary, export_tflite, plan_tflite
from edgepack.export.tflite.planning import tflite_of
from edgepack.export.tflite_repair import repair
from edgepack.ir.arrays import Feeds
from edgepack.ir.inputs import InputSpec, input_specs
from edgepack.quantization.groups import Role
from edgepack.quantization.plan.types import Precision, Precisions, QuantPlan, Request
from edgepack.results import Cause
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.litert import Port, litert, open_tflite
from edgepack.runtime.runner import Outputs, open_model
from edgepack.selection.search import REPAIR_SECONDS

LEAST_SQNR_DB = 3.0
"""Least SQNR of the .tflite against the .onnx on a few samples; with less, more than half of the signal is
noise."""


@dataclass(slots=True, eq=False)
class _File:
    """The file in its last version, with its plan."""

    inputs: ExportInputs
    target: Target
    path: Path
    fixed: Precisions
    dims: Mapping[str, int]
    plan: QuantPlan = field(init=False)
    summary: TfliteSummary = field(init=False)

    def write(self, changed: Precisions) -> None:
        """Write it with some groups in other precisions; those in ``fixed`` stay."""
        made = self.inputs
        self.plan = plan_tflite(made.model, made.table.ranges, self.target, {**changed, **self.fixed})
        self.summary = export_tflite(
            made.model,
            self.plan,
            made.rounding(self.plan),
            self.path,
            io=tflite_of(self.target).io,
            dims=self.dims,
            facts=made.facts_of(self.plan),
        )

    def noise_db(self, reference: Sequence[Outputs], feeds: Sequence[Feeds]) -> float:
        """SQNR of its outputs against ``reference``."""
        return compare_outputs(reference, open_tflite(self.path, self.target.runtime.threads), feeds).sqnr_db


def write_tflite(
    inputs: ExportInputs, target: Target, onnx: Path, path: Path, feeds: Sequence[Feeds]
) -> dict[str, Any]:
    """Write the ``.tflite`` and run it on ``feeds``; gives its facts for the report.

    Where full int8 misses the gate's limits of accuracy, the noisiest groups compute in float.

    Raises:
        ConfigError: LiteRT is not installed.
        ExportError: a node cannot be written, or the outputs are unlike those of the ``.onnx``, or the format
            is optional and not accurate enough.
        ModelError: the runtime refuses the file.
    """
    litert()
    if fewer := sorted(u.group.name for u in inputs.choice.plan.groups if u.bits < 8):
        raise ExportError(
            f"{path}: has 8-bit weights only, and the recipe sets fewer bits for {fewer[0]!r} "
            f"({len(fewer)} groups in all): leave out `weight_bits` and `bits`, or the format"
        )
    dims = fixed_sizes(input_specs(inputs.model), tflite_of(target).dims, inputs.shapes)
    file = _File(inputs, target, path, {**_too_noisy(inputs), **inputs.fixed}, dims)
    file.write({})
    _make_accurate(file, onnx, feeds)
    runner = open_tflite(path, target.runtime.threads)
    return {
        "inputs": [_described(port) for port in runner.entries],
        "outputs": [_described(port) for port in runner.results],
        "operators": dict(file.summary.operators),
        "transposes": file.summary.transposes,
        "float_islands": [list(island) for island in file.summary.float_islands],
        "xnnpack": asdict(runner.delegation()),
    }


def _make_accurate(file: _File, onnx: Path, feeds: Sequence[Feeds]) -> None:
    """Repair the file where it misses the gate's limits of accuracy and the ``.onnx`` does not.

    Where the ``.onnx`` misses them too, the passes lost the accuracy, and no precision restores it.

    Raises:
        ExportError: its outputs are unlike those of the ``.onnx``, or it is optional and cannot be repaired.
    """
    runtime, made = for_accuracy(file.target), file.inputs
    original, built = (
        [runner.run(feed) for feed in feeds]
        for runner in (open_model(made.original, runtime), open_model(onnx, runtime))
    )

    onnx_is_accurate = cache(lambda: made.accurate(onnx))

    def accurate() -> bool:
        if file.noise_db(built, feeds) < LEAST_SQNR_DB:
            return False
        return made.accurate(file.path) or not onnx_is_accurate()

    if accurate():
        return
    groups = [u.group.name for u in file.plan.of(Precision.STATIC) if u.group.role is Role.HEAVY]
    count = repair(groups, file.write, lambda: -file.noise_db(original, feeds), accurate, REPAIR_SECONDS)
    if count is not None:
        return
    if (found_db := file.noise_db(built, feeds)) < LEAST_SQNR_DB:
        raise ExportError(
            f"{file.path}: its outputs have an SQNR of {found_db:.1f} dB against those of {onnx.name} on "
            f"{len(feeds)} samples: int8 is too coarse for this model; keep its sensitive groups in float "
            "with `quantize: {overrides: ...}`"
        )
    if "tflite" in file.target.optional:
        raise ExportError(
            f"{file.path}: loses more accuracy than the gate allows, also with its noisiest groups in float; "
            "keep others in float with `quantize: {overrides: ...}`; a copy of the target without "
            "`optional: [tflite]` ships the file all the same"
        )


def _too_noisy(inputs: ExportInputs) -> Precisions:
    """Groups that are float in the ``.onnx`` since int8 was too noisy; they are float here too."""
    groups = inputs.choice.plan.groups
    return {
        u.group.name: Request(Precision.FLOAT, u.reason) for u in groups if u.reason.cause is Cause.NOISIER
    }


def _described(port: Port) -> dict[str, Any]:
    """An input or output of the file, for applications."""
    described: dict[str, Any] = {
        "name": port.name,
        "type": port.dtype.name,
        "shape": [port.shape[axis] for axis in port.order],
        "axes": list(port.order),
    }
    if port.params is not None:
        described |= {"scale": float(port.params.scale), "zero_point": int(port.params.zero_point)}
    return described


def fixed_sizes(inputs: Sequence[InputSpec], given: Mapping[str, int], shapes: Shapes) -> dict[str, int]:
    """The size of each symbolic dimension, by place (``x[3]``): as ``given``, or that of all samples.

    Raises:
        ExportError: the samples differ in a dimension without a given size.
    """
    sizes = dict(given)
    for spec in inputs:
        for axis, size in enumerate(spec.shape or ()):
            place = f"{spec.name}[{axis}]"
            if isinstance(size, int) or place in given or size in given:
                continue
            found = sorted({shape[axis] for shape in shapes[spec.name]})
            if len(found) > 1:
                raise ExportError(
                    f"input {spec.name!r}: axis {axis} has sizes from {found[0]} to {found[-1]} in the "
                    f"samples, and a .tflite has one: give it as `tflite: {{dims: {{'{size or place}': "
                    "SIZE}}`, and samples of that size (of images by `width:` and `fit: pad`)"
                )
            sizes[place] = found[0]
    return sizes
