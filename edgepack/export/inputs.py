"""What all files of a package are made of."""

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
"""The shapes that each input was fed with."""


@dataclass(frozen=True, slots=True, eq=False)
class ExportInputs:
    """What all files of a package are made of."""

    original: Path
    model: ir.Model
    """Float, normalized."""
    choice: Choice
    """The form of the ``.onnx`` and the ``.ort``."""
    fixed: Precisions
    """What the recipe decided, by group; the ``.tflite`` keeps it too."""
    table: RangeTable
    rounding: Rounding
    shapes: Shapes
    """Of the evaluation samples."""
    facts: Mapping[str, object]
    """What made the package: metadata of the files that can hold it."""
    accurate: Callable[[Path], bool]
    """Whether a file keeps, on the evaluation data, the accuracy that the gate asks for."""
    keep_names: bool = False
    """Whether constants of the ``.onnx`` keep their names."""

    def facts_of(self, plan: QuantPlan) -> dict[str, object]:
        """The facts, with the ranges that ``plan`` uses."""
        used = {name: r for name, r in self.table.ranges.items() if name in plan.activations}
        ranges = {name: [_short(r.low), _short(r.high)] for name, r in used.items()}
        return {**self.facts, "ranges": ranges}


def digest_of(content: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(content.encode()).hexdigest()


def facts_of(target: str, digests: Mapping[str, str], table: RangeTable) -> dict[str, object]:
    """What made the package, for the metadata of its files."""
    return {
        "target": target,
        **{f"{name}_digest": digest for name, digest in digests.items()},
        "samples_digest": table.samples_fingerprint,
        "model_digest": table.model_fingerprint,
    }


def _short(bound: float) -> float:
    """Six digits: what a file tells of a range; all digits are in ranges.json, which is reused."""
    return float(f"{bound:.6g}")
