"""Inspection of a model without data: its contents, and its plan for a target."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.config.target import Target
from edgepack.graph.normalize import normalize
from edgepack.graph.opset import opset_of
from edgepack.graph.prepare import prepare
from edgepack.ir.files import load_model, model_bytes, require_float
from edgepack.ir.inputs import input_specs
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import Precision, Request
from edgepack.report.tables import size_text


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts of a model file."""

    file: str
    size_bytes: int
    opset: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    parameters: int
    """Elements of the initializers after normalization."""
    operators: dict[str, int]
    operators_normalized: dict[str, int]
    refused: tuple[str, ...]
    """Nodes that normalization did not change, with the reason."""
    notes: tuple[str, ...] = ()
    """What was in half precision before normalization."""
    planned: tuple[dict[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_model(path: Path, target: Target | None) -> Inspection:
    """The contents of a model file, before and after normalization; with a target its plan too.

    Raises:
        ModelError: the file is not a model.
    """
    model = load_model(path)
    normalized, notes = normalize(
        model,
        min_opset=target.min_opset if target else 13,
        max_opset=target.max_opset if target else max(opset_of(model), 23),
    )
    constants = [v.const_value for v in normalized.graph.initializers.values() if v.const_value is not None]
    return Inspection(
        file=str(path),
        size_bytes=model_bytes(path),
        opset=notes.opset_before,
        inputs={s.name: f"{s.dtype} {_shape(s.shape)}" for s in input_specs(model)},
        outputs={str(v.name): _kind(v) for v in model.graph.outputs},
        parameters=sum(c.size for c in constants),
        operators=dict(Counter(n.op_type for n in model.graph).most_common()),
        operators_normalized=dict(Counter(n.op_type for n in normalized.graph).most_common()),
        refused=tuple(f"{r.rule} at {r.node}: {r.reason}" for r in notes.refused),
        notes=notes.half_precision.lines(),
        planned=tuple(plan_rows(path, target)) if target else (),
    )


def plan_rows(path: Path, target: Target) -> list[dict[str, str]]:
    """The static int8 plan for ``target``, a row for each group; needs no ranges.

    Raises:
        ModelError: the file is not a float model.
    """
    model = load_model(path)
    require_float(model, path)
    normalized, _ = prepare(model, target)
    groups = find_fusion_groups(normalized, target.kernels)
    # Which groups can run in int8 does not depend on the ranges, only their scales do.
    unit_range = Range(-1.0, 1.0, -1.0, 1.0)
    ranges = dict.fromkeys(tensors_to_observe(groups), unit_range)
    plan = make_plan(normalized, groups, ranges, target, {u.name: Request(Precision.STATIC) for u in groups})
    return [
        {"node": u.group.name, "op_type": u.group.op_type, "form": str(u.precision), "reason": u.reason.text}
        for u in plan.groups
    ]


def inspection_text(found: Inspection) -> str:
    """The facts as text."""
    lines = [
        f"{found.file}: {size_text(found.size_bytes)}, opset {found.opset}",
        *(f"  in   {name}: {kind}" for name, kind in found.inputs.items()),
        *(f"  out  {name}: {kind}" for name, kind in found.outputs.items()),
        f"operators: {_counts(found.operators)}",
        f"normalized: {_counts(found.operators_normalized)}, with {found.parameters:,} parameters",
    ]
    lines += found.notes
    lines += [f"not changed: {refusal}" for refusal in found.refused[:10]]
    if found.planned:
        lines += ["", plan_text(list(found.planned)).rstrip()]
    return "\n".join(lines) + "\n"


def plan_text(rows: list[dict[str, str]]) -> str:
    """The plan as a table."""
    if not rows:
        return "the model has no nodes\n"
    columns = ("form", "op_type", "node", "reason")
    widths = {c: min(max(len(r[c]) for r in rows), 48) for c in columns}
    lines = ["  ".join(row[c].ljust(widths[c]) for c in columns).rstrip() for row in rows]
    precisions = Counter(row["form"] for row in rows)
    return "\n".join([*lines, "", ", ".join(f"{n} {name}" for name, n in precisions.items()), ""])


def _kind(value: ir.Value) -> str:
    dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return f"{'?' if value.dtype is None else value.dtype.numpy()} {_shape(dims)}"


def _counts(operators: dict[str, int]) -> str:
    return ", ".join(f"{n} {op}" for op, n in operators.items())


def _shape(shape: tuple[int | str | None, ...] | None) -> str:
    return (
        "of unknown rank"
        if shape is None
        else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
    )
