"""The files of a package, in every format of the target, from one set of ranges."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepack.calibrate.ranges import RangeTable
from edgepack.choose import Choice
from edgepack.errors import ConfigError, EdgepackError, ExportError, ModelError
from edgepack.export.compact import names_of
from edgepack.export.onnx import export_onnx
from edgepack.export.ort import export_ort
from edgepack.export.tflite import export_tflite, plan_tflite
from edgepack.export.tflite.planning import tflite_of
from edgepack.feeds import Feeds, InputSpec
from edgepack.measure.bench import Latency
from edgepack.measure.check import compare_outputs
from edgepack.measure.litert import Port, litert, open_tflite
from edgepack.measure.runner import open_model
from edgepack.model import input_specs, model_bytes
from edgepack.pack.epk import Packed
from edgepack.quantize.plan import Method, QuantPlan
from edgepack.quantize.rounding import Rounding
from edgepack.report import Fidelity, ModelFigures
from edgepack.report_formats import Refusal
from edgepack.search import TOO_NOISY
from edgepack.target import Format, Target
from edgepack.trials import Methods

FILES: Mapping[Format, str] = {
    "onnx": "model.onnx",
    "ort": "model.ort",
    "tflite": "model.tflite",
    "epk": "model.epk",
}
"""The file of each format."""
COMPANIONS: Mapping[str, str] = {"model.ort": "model.required_operators.config"}
"""What is written beside a file."""
LEAST_SQNR_DB = 3.0
"""Of a .tflite to the .onnx on a few samples: with less, half of the signal is noise, and the file holds
another model than the one that was asked for."""

Shapes = Mapping[str, frozenset[tuple[int, ...]]]
"""The shapes that each input was fed with."""


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What all files of a package are made of."""

    model: ir.Model
    """Float, normalized."""
    choice: Choice
    """The form of the ``.onnx`` and the ``.ort``."""
    fixed: Methods
    """What the recipe decided, by unit; the ``.tflite`` keeps it too."""
    table: RangeTable
    rounding: Rounding
    shapes: Shapes
    """Of the evaluation samples."""
    facts: Mapping[str, object]
    """What made the package: metadata of the files that can hold it."""

    def facts_of(self, plan: QuantPlan) -> dict[str, object]:
        """The facts, with the ranges that ``plan`` uses."""
        used = {name: r for name, r in self.table.ranges.items() if name in plan.activations}
        ranges = {name: [_short(r.low), _short(r.high)] for name, r in used.items()}
        return {**self.facts, "ranges": ranges}


@dataclass(frozen=True, slots=True)
class Artifacts:
    """What was written, by format and the ``.onnx`` first, and what could not be."""

    files: Mapping[str, Path]
    refused: tuple[Refusal, ...]
    tflite: Mapping[str, Any] | None
    """What there is to say of the ``.tflite``; see :func:`_tflite`."""


def require_runtimes(target: Target) -> None:
    """Refuse before anything is measured what could not be checked at the end.

    Raises:
        ConfigError: a format must be written and nothing here runs it.
    """
    if "tflite" in target.formats and "tflite" not in target.optional:
        litert()


def write_artifacts(material: Material, target: Target, feeds: Sequence[Feeds], package: Path) -> Artifacts:
    """Write the models of the target's formats; each but the ``.onnx`` is compared with it on ``feeds``.

    A format that is optional for the target may be left out, with the reason.

    Raises:
        ConfigError, ExportError, ModelError: a format that is not optional cannot be written or run.
    """
    files: dict[str, Path] = {"onnx": package / FILES["onnx"]}
    facts = material.facts_of(material.choice.plan)
    export_onnx(material.choice.model, files["onnx"], facts, names_of(material.model))
    refused, told = [], None
    for name in (f for f in target.formats if f not in ("onnx", "epk")):
        path = package / FILES[name]
        try:
            if name == "ort":
                export_ort(files["onnx"], path, target.runtime, feeds)
            else:
                told = _tflite(material, target, files["onnx"], path, feeds)
            files[name] = path
        except (ConfigError, ExportError, ModelError) as error:
            if name not in target.optional:
                raise
            path.unlink(missing_ok=True)
            refused.append(Refusal(name, path.name, _without(error, package)))
    return Artifacts(files, tuple(refused), told)


def _short(bound: float) -> float:
    """Six digits: what a file tells of a range; all digits are in ranges.json, which is reused."""
    return float(f"{bound:.6g}")


def _without(error: EdgepackError, package: Path) -> str:
    """The message, without the place of a package that is not where it will be."""
    return str(error).replace(f"{package}/", "")


def _tflite(
    material: Material, target: Target, onnx: Path, path: Path, feeds: Sequence[Feeds]
) -> dict[str, Any]:
    """Write the ``.tflite`` and run it on ``feeds``; what it holds, and how its runtime runs it.

    Raises:
        ConfigError: nothing here runs it.
        ExportError: a node has no form, or the outputs have nothing to do with those of the ``.onnx``.
        ModelError: the runtime refuses the file.
    """
    litert()
    if fewer := sorted(u.unit.name for u in material.choice.plan.units if u.bits < 8):
        raise ExportError(
            f"{path}: is written with weights of 8 bits, and {fewer[0]!r} was asked for with fewer "
            f"({len(fewer)} such in all): leave out `weight_bits` and `bits`, or the format"
        )
    settings = tflite_of(target)
    dims = fixed_sizes(input_specs(material.model), settings.dims, material.shapes)
    plan = plan_tflite(
        material.model, material.table.ranges, target, {**_too_noisy(material), **material.fixed}
    )
    summary = export_tflite(
        material.model,
        plan,
        material.rounding(plan),
        path,
        io=settings.io,
        dims=dims,
        facts=material.facts_of(plan),
    )
    runner, reference = open_tflite(path, target.runtime.threads), open_model(onnx, target.runtime)
    compared = compare_outputs([reference.run(feed) for feed in feeds], runner, feeds)
    if compared.sqnr_db < LEAST_SQNR_DB:
        raise ExportError(
            f"{path}: its outputs are {compared.sqnr_db:.1f} dB from those of {onnx.name} on {len(feeds)} "
            "samples: int8 throughout does not hold this model; keep the units that need it in float with "
            "`quantize: {overrides: ...}`"
        )
    return {
        "inputs": [_described(port) for port in runner.entries],
        "outputs": [_described(port) for port in runner.results],
        "operators": dict(summary.operators),
        "transposes": summary.transposes,
        "float_islands": [list(island) for island in summary.float_islands],
        "xnnpack": asdict(runner.delegation()),
    }


def _too_noisy(material: Material) -> Methods:
    """Units that the ``.onnx`` could not compute on integers without losing too much: no more can this."""
    units = material.choice.plan.units
    return {u.unit.name: (Method.FLOAT, u.reason) for u in units if u.reason.startswith(TOO_NOISY)}


def _described(port: Port) -> dict[str, Any]:
    """An input or output as an application must feed or read it."""
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
    """The size of each open dimension, as ``given`` or as all samples have it, by place (``x[3]``).

    Raises:
        ExportError: the samples differ in a dimension that no size is given for.
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


def outdated(output: Path, package: Path) -> list[Path]:
    """Files in ``output`` that an earlier build wrote, by its report, and this ``package`` does not have."""
    try:
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        lines = report["models"][1:]
        written = {line["file"] for line in lines} | {line.get("packed_file") for line in lines}
        written &= set(FILES.values())
    except (OSError, ValueError, LookupError, TypeError):
        return []  # no report, or none of ours
    names = written | {COMPANIONS[name] for name in written if name in COMPANIONS}
    return [output / name for name in sorted(names) if not (package / name).exists()]


def figures_of(
    original: Path,
    files: Mapping[str, Path],
    latencies: Mapping[str, Latency],
    fidelity: Mapping[str, Fidelity],
    packed: Mapping[str, Packed],
) -> tuple[ModelFigures, ...]:
    """Everything measured, a line for each file, the original first."""
    return tuple(
        ModelFigures(
            name=name,
            file=path.name,
            size_bytes=model_bytes(path) if path.suffix == ".onnx" else path.stat().st_size,
            latency_ms_p50=latencies[name].p50_ms,
            latency_ms_p90=latencies[name].p90_ms,
            latency_ms_min=latencies[name].min_ms,
            speedup=latencies[name].speedup,
            cold_start_ms=latencies[name].cold_start_ms,
            peak_memory_bytes=latencies[name].peak_memory_bytes,
            fidelity=fidelity.get(name),
            packed_bytes=packed[name].packed_bytes if name in packed else None,
            packed_file=FILES["epk"] if name in packed and packed[name].path.parent == path.parent else None,
        )
        for name, path in {"original": original, **files}.items()
    )
