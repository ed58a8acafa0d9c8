"""The stage breakdown: figures of each step from the original to the built model."""

from collections.abc import Mapping
from pathlib import Path

from edgepack.benchmark.bench import Latency
from edgepack.evaluation.check import Baseline, check
from edgepack.ir.files import model_bytes
from edgepack.pack.epk import SUFFIX, Packed, pack
from edgepack.results import Fidelity, ModelFigures, Step, step_of

QUANTIZED = "quantized"


def check_steps(files: Mapping[str, Path], reference: Baseline) -> dict[str, Fidelity]:
    """Fidelity of the model after each pass.

    Raises:
        ExportError: a model fails where the original does not.
    """
    return {name: check(path, reference) for name, path in files.items()}


def pack_steps(original: Path, files: Mapping[str, Path], scratch: Path, *, large: bool) -> dict[str, Packed]:
    """The original and the model after each pass, packed; empty without passes or for a ``large`` model.

    Raises:
        ExportError: a file cannot be written.
    """
    if large or not files:
        return {}
    models = {"original": original, **files}
    return {name: pack(path, scratch / f"step_{name}{SUFFIX}", check=False) for name, path in models.items()}


def stage_breakdown(
    models: tuple[ModelFigures, ...],
    files: Mapping[str, Path],
    notes: Mapping[str, tuple[str, ...]],
    fidelity: Mapping[str, Fidelity],
    packed: Mapping[str, Packed],
    latencies: Mapping[str, Latency],
) -> tuple[Step, ...]:
    """The steps in order: the original, the model after each pass, the ``.onnx`` of the package."""
    original, built = models[0], models[1]

    def between(name: str, path: Path) -> Step:
        found, latency = fidelity[name], latencies[name]
        return Step(
            name=name,
            raw_bytes=model_bytes(path),
            packed_bytes=packed[name].packed_bytes if name in packed else None,
            resident_bytes=latency.peak_memory_bytes,
            latency_ms_p50=latency.p50_ms,
            speedup=latency.speedup,
            sqnr_db=found.sqnr_db,
            agreement=found.agreement,
            metric=found.metric,
            notes=notes.get(name, ()),
        )

    first = step_of(original, "original", packed["original"].packed_bytes if packed else None)
    return (first, *(between(n, p) for n, p in files.items()), step_of(built, QUANTIZED, built.packed_bytes))
