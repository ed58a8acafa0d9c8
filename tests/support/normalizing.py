"""Checks that hold for the normalization of every model."""

import onnx
import onnx_ir as ir
from support.onnx_models import Array, difference, run

from edgepack.graph.normalize import normalize
from edgepack.graph.notes import NormalizeNotes
from edgepack.ir.fingerprint import fingerprint

TOLERANCE = 2e-6


def check(
    model: ir.Model, feeds: dict[str, Array], *, min_opset: int = 13, tolerance: float = TOLERANCE
) -> tuple[ir.Model, NormalizeNotes]:
    """Normalize and compare outputs with the original's; also: deterministic, idempotent, valid, pure."""
    before, signature = fingerprint(model), _signature(model)
    normal, notes = normalize(model, min_opset=min_opset, max_opset=21)
    assert fingerprint(model) == before
    assert _signature(normal) == signature
    onnx.checker.check_model(ir.to_proto(normal), full_check=True)
    assert difference(run(model, feeds, optimize=False), run(normal, feeds)) <= tolerance
    again, _ = normalize(model, min_opset=min_opset, max_opset=21)
    assert fingerprint(again) == fingerprint(normal)
    twice, notes_twice = normalize(normal, min_opset=min_opset, max_opset=21)
    assert fingerprint(twice) == fingerprint(normal), notes_twice
    return normal, notes


def _signature(model: ir.Model) -> list[tuple[str | None, object]]:
    fed = [v for v in model.graph.inputs if not v.is_initializer()]
    return [(v.name, v.dtype) for v in (*fed, *model.graph.outputs)]


def refusals(notes: NormalizeNotes) -> dict[str, str]:
    return {r.rule: r.reason for r in notes.refused}
