"""Writes the models of a package, in all formats of the target, from one set of ranges."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.benchmark.bench import Latency
from edgepack.config.target import Format, Target
from edgepack.errors import ConfigError, EdgepackError, ExportError, ModelError
from edgepack.export.inputs import ExportInputs
from edgepack.export.onnx import export_onnx
from edgepack.export.ort import export_ort
from edgepack.export.tflite_artifact import write_tflite
from edgepack.graph.compact import names_of
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import model_bytes
from edgepack.pack.epk import Packed
from edgepack.results import Fidelity, ModelFigures, Refusal
from edgepack.runtime.litert import litert

FILES: Mapping[Format, str] = {
    "onnx": "model.onnx",
    "ort": "model.ort",
    "tflite": "model.tflite",
    "epk": "model.epk",
}
"""The file of each format."""
COMPANIONS: Mapping[str, str] = {"model.ort": "model.required_operators.config"}
"""Companion files, by artifact."""


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Written files by format, the ``.onnx`` first, and formats that could not be written."""

    files: Mapping[str, Path]
    refused: tuple[Refusal, ...]
    tflite: Mapping[str, Any] | None
    """Facts of the ``.tflite``; see :func:`edgepack.export.tflite_artifact.write_tflite`."""


def require_runtimes(target: Target) -> None:
    """Check that the runtimes of the target's formats are installed.

    Raises:
        ConfigError: the runtime of a format that is not optional is missing.
    """
    if "tflite" in target.formats and "tflite" not in target.optional:
        litert()


def write_artifacts(inputs: ExportInputs, target: Target, feeds: Sequence[Feeds], package: Path) -> Artifacts:
    """Write the models of the target's formats; each but the ``.onnx`` is compared with it on ``feeds``.

    A format that is optional for the target may be left out, with the reason.

    Raises:
        ConfigError, ExportError, ModelError: a format that is not optional cannot be written or run.
    """
    files: dict[str, Path] = {"onnx": package / FILES["onnx"]}
    facts = inputs.facts_of(inputs.choice.plan)
    kept_names = names_of(inputs.model, constants=inputs.keep_names)
    export_onnx(inputs.choice.model, files["onnx"], facts, kept_names)
    refused, tflite = [], None
    for name in (f for f in target.formats if f not in ("onnx", "epk")):
        path = package / FILES[name]
        try:
            if name == "ort":
                export_ort(files["onnx"], path, target.runtime, feeds)
            else:
                tflite = write_tflite(inputs, target, files["onnx"], path, feeds)
            files[name] = path
        except (ConfigError, ExportError, ModelError) as error:
            if name not in target.optional:
                raise
            path.unlink(missing_ok=True)
            refused.append(Refusal(name, path.name, _without(error, package)))
    return Artifacts(files, tuple(refused), tflite)


def _without(error: EdgepackError, package: Path) -> str:
    """The message without the path of the temporary package."""
    return str(error).replace(f"{package}/", "")


def outdated(output: Path, package: Path) -> list[Path]:
    """Files in ``output`` that an earlier build wrote, by its report, and this ``package`` does not have."""
    try:
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        lines = report["models"][1:]
        written = {line["file"] for line in lines} | {line.get("packed_file") for line in lines}
        written &= set(FILES.values())
    except (OSError, ValueError, LookupError, TypeError):
        return []  # no report, or not one of edgepack
    names = written | {COMPANIONS[name] for name in written if name in COMPANIONS}
    return [output / name for name in sorted(names) if not (package / name).exists()]


def figures_of(
    original: Path,
    files: Mapping[str, Path],
    latencies: Mapping[str, Latency],
    fidelity: Mapping[str, Fidelity],
    packed: Mapping[str, Packed],
) -> tuple[ModelFigures, ...]:
    """All figures of each file, the original first."""
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
