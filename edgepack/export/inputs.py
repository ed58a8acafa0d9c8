"""The inputs of the export, and the metadata of the files."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgepack.calibration.ranges import RangeTable
from edgepack.quantization.plan.types import Precisions, QuantPlan
from edgepack.quantization.weights.rounding import Rounding
from edgepack.selection.choose import Choice

Shapes = Mapping[str, frozenset[tuple[int, ...]]]
"""The shapes of the samples, by input."""


@dataclass(frozen=True, slots=True, eq=False)
class ExportInputs:
    """The inputs of the export of all formats."""

    original: Path
    model: ir.Model
    """Float, normalized."""
    choice: Choice
    """The chosen candidate, for the ``.onnx`` and the ``.ort``."""
    fixed: Precisions
    """Precisions that the recipe sets, by group; they hold for the ``.tflite`` too."""
    table: RangeTable
    rounding: Rounding
    shapes: Shapes
    """Of the evaluation samples."""
    facts: Mapping[str, object]
    """The origin of the package, for the metadata of formats that have some."""
    accurate: Callable[[Path], bool]
    """Whether a file keeps the gate's limits of accuracy on the evaluation data."""
    keep_names: bool = False
    """Whether initializers of the ``.onnx`` keep their names."""

    def facts_of(self, plan: QuantPlan) -> dict[str, object]:
        """The facts, with the ranges that ``plan`` uses."""
        used = {name: r for name, r in self.table.ranges.items() if name in plan.activations}
        ranges = {name: [_short(r.low), _short(r.high)] for name, r in used.items()}
        return {**self.facts, "ranges": ranges}


def digest_of(content: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(content.encode()).hexdigest()


def facts_of(target: str, digests: Mapping[str, str], table: RangeTable) -> dict[str, object]:
    """The origin of the package, for the metadata of its files."""
    return {
        "target": target,
        **{f"{name}_digest": digest for name, digest in digests.items()},
        "samples_digest": table.samples_fingerprint,
        "model_digest": table.model_fingerprint,
    }


def _short(bound: float) -> float:
    """A bound with six digits for the metadata; ``ranges.json`` has all digits."""
    return float(f"{bound:.6g}")
