"""Writes a plan as a ``.tflite`` file: fixes shapes, lowers operators, writes metadata."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgepack import __version__
from edgepack.errors import ExportError
from edgepack.export.tflite.convert import Io, convert
from edgepack.export.tflite.flatbuffer import serialize
from edgepack.export.tflite.layout import Order
from edgepack.export.tflite.planning import plan_tflite, tensors_for
from edgepack.export.tflite.shapes import fix_shapes
from edgepack.quantization.plan.types import Precision, QuantPlan
from edgepack.quantization.weights.rounding import Rounded

PREFIX = "edgepack."
LAYOUT = f"{PREFIX}layout"
"""Metadata entry: for each input and output the order of its ONNX axes in the file, as JSON."""


@dataclass(frozen=True, slots=True)
class TfliteSummary:
    """Facts of the written file."""

    operators: Mapping[str, int]
    """Counts of TFLite operators, most frequent first."""
    float_islands: tuple[tuple[str, str], ...]
    """Nodes that compute in float, with the reason."""
    transposes: int
    size_bytes: int
    inputs: Mapping[str, Order]
    """By input name the ONNX axes in the order of the file: ``(0, 2, 3, 1)`` is NCHW fed as NHWC."""
    outputs: Mapping[str, Order]


def export_tflite(
    model: ir.Model,
    plan: QuantPlan,
    weights: Mapping[str, Rounded],
    path: Path,
    *,
    io: Io,
    dims: Mapping[str, int],
    facts: Mapping[str, object],
) -> TfliteSummary:
    """Write ``path`` from the normalized float model, its plan and the rounded weights.

    Args:
        model: the normalized float model; it is not changed.
        plan: of :func:`plan_tflite` for this model.
        weights: stored integers and biases by group name.
        path: the file.
        io: whether inputs and outputs of int8 operators are float or int8.
        dims: sizes by the name of a dimension, or by its place (``x[3]``); the first dimension of an input is
            1 by default.
        facts: metadata entries, written as ``edgepack.<key>``.

    Raises:
        ExportError: a dimension without a size, an unsupported operator, or an error of the disk.
    """
    low, orders = convert(fix_shapes(model, dims), plan, weights, io)
    metadata = {LAYOUT: json.dumps(orders)} | {
        f"{PREFIX}{key}": fact if isinstance(fact, str) else json.dumps(fact, sort_keys=True)
        for key, fact in {"version": __version__, **facts}.items()
    }
    content = serialize(
        low.graph, f"edgepack {__version__}", {key: text.encode() for key, text in metadata.items()}
    )
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error}") from error
    operators = Counter(op.name for op in low.graph.operators)
    islands = {u.group.name: u.reason.text for u in plan.groups if u.precision is not Precision.STATIC}
    islands = {name: reason for name, reason in islands.items() if name in low.tasks} | low.islands
    return TfliteSummary(
        dict(operators.most_common()),
        tuple(islands.items()),
        operators["TRANSPOSE"],
        len(content),
        orders["inputs"],
        orders["outputs"],
    )


__all__ = ["LAYOUT", "Io", "TfliteSummary", "export_tflite", "plan_tflite", "tensors_for"]
