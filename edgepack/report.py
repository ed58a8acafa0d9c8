"""What a build says about itself: one typed object, written as JSON and as a page of text."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of the line: how long it took and what it has to say."""

    name: str
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close a model's outputs are to the original's, over the evaluation samples."""

    samples: int
    sqnr_db: float | None
    """``None`` when the outputs are equal."""
    agreement: float | None
    """Share of equal argmax over the last axis of the first output; ``None`` where that has no meaning."""
    metric: float | None
    metric_name: str | None


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Everything measured of one model file."""

    name: str
    file: str
    size_bytes: int
    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_min: float
    speedup: float
    """Median over rounds of the original's latency by this one's."""
    cold_start_ms: float
    peak_memory_bytes: int
    fidelity: Fidelity | None


@dataclass(frozen=True, slots=True)
class UnitRow:
    """One unit in the report."""

    name: str
    op_type: str
    method: str
    reason: str
    parameters: int
    sqnr_db: float | None = None
    """Fidelity of the unit's output in the built model to the original's."""
    float_us: float | None = None
    built_us: float | None = None


@dataclass(frozen=True, slots=True)
class GateLine:
    """One limit of the gate and what was measured."""

    limit: str
    bound: float
    measured: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form of the whole model that was built and measured before one was chosen."""

    name: str
    size_bytes: int
    speedup: float
    sqnr_db: float | None
    metric: float | None
    chosen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The whole build."""

    edgepack_version: str
    model: str
    target: str
    command: str
    passed: bool
    models: tuple[ModelFigures, ...]
    """The original first."""
    gate: tuple[GateLine, ...]
    candidates: tuple[Candidate, ...]
    units: tuple[UnitRow, ...]
    runtime: Mapping[str, Any]
    """What the runtime made of the built model: fused integer kernels, leftover Q/DQ, float operators."""
    stages: tuple[StageReport, ...]
    environment: Mapping[str, Any]
    fingerprints: Mapping[str, str]

    def to_json(self) -> str:
        """The report as JSON; infinities and NaN never occur in it (RFC 8259)."""
        return json.dumps(asdict(self), indent=1, default=str, allow_nan=False) + "\n"


def finite(value: float | None) -> float | None:
    """``value``, or ``None`` where it is infinite or NaN and JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def size_text(size_bytes: float) -> str:
    """Bytes as a person reads them, decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def time_text(ms: float) -> str:
    """Milliseconds as a person reads them."""
    return f"{ms:.2f} ms" if ms >= 1 else f"{ms * 1e3:.1f} µs"


def text(report: BuildReport) -> str:
    """The page that a person reads in ten seconds: verdict, figures, what stayed float and why, gate."""
    verdict = "PASS" if report.passed else "GATE FAILED"
    lines = [f"{verdict}  {report.model} for {report.target}  (edgepack {report.edgepack_version})", ""]
    lines += _figures(report.models)
    lines += ["", *_forms(report.units), *_runtime(report.runtime)]
    lines += _candidates(report.candidates)
    if report.gate:
        lines += ["", "gate"]
        for line in report.gate:
            shown = "not measured" if line.measured is None else f"{line.measured:.4g}"
            lines.append(
                f"  {'ok  ' if line.passed else 'FAIL'}  {line.limit} {line.bound:.4g}: measured {shown}"
            )
    environment = report.environment
    lines += [
        "",
        f"measured on {environment.get('cpu', 'unknown CPU')}, {environment.get('threads', 1)} thread(s), "
        f"onnxruntime {environment.get('onnxruntime', '?')}; times compare within this run only",
    ]
    return "\n".join(lines) + "\n"


def _figures(models: Sequence[ModelFigures]) -> list[str]:
    original = models[0]
    rows = [("", *(m.name for m in models))]
    rows.append(
        (
            "size",
            *(
                size_text(m.size_bytes)
                + ("" if m is original else f"  ({original.size_bytes / m.size_bytes:.2f}× smaller)")
                for m in models
            ),
        )
    )
    rows.append(
        (
            "latency p50",
            *(
                time_text(m.latency_ms_p50) + ("" if m is original else f"  ({m.speedup:.2f}× as fast)")
                for m in models
            ),
        )
    )
    rows.append(("latency p90", *(time_text(m.latency_ms_p90) for m in models)))
    rows.append(("cold start", *(time_text(m.cold_start_ms) for m in models)))
    rows.append(("peak memory", *(size_text(m.peak_memory_bytes) for m in models)))
    if any(m.fidelity is not None for m in models):
        name = next((m.fidelity.metric_name for m in models if m.fidelity and m.fidelity.metric_name), None)
        if name:
            rows.append((name, *(_metric(m, original) for m in models)))
        rows.append(("fidelity", *(_fidelity(m, original) for m in models)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(models) + 1)]
    return [
        "  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _metric(model: ModelFigures, original: ModelFigures) -> str:
    value = model.fidelity.metric if model.fidelity else None
    if value is None:
        return "-"
    base = original.fidelity.metric if original.fidelity else None
    change = "" if model is original or base is None else f"  ({(value - base) * 100:+.2f} points)"
    return f"{value:.4f}{change}"


def _fidelity(model: ModelFigures, original: ModelFigures) -> str:
    if model is original or model.fidelity is None:
        return "-"
    level = "equal" if model.fidelity.sqnr_db is None else f"{model.fidelity.sqnr_db:.1f} dB"
    agreement = model.fidelity.agreement
    return level + ("" if agreement is None else f", agreement {agreement:.4f}")


def _forms(units: Sequence[UnitRow]) -> list[str]:
    """How many of the operators with weights or products are integer, and why the others are not."""
    lines = []
    by_method = Counter((u.method, u.op_type) for u in units if u.method != "float")
    for method in dict.fromkeys(m for m, _ in by_method):
        total = Counter(u.op_type for u in units)
        parts = [f"{n} of {total[op]} {op}" for (m, op), n in by_method.items() if m == method]
        lines.append(f"{method.replace('_', ' ')}: {', '.join(parts)}")
    floats = Counter((u.reason, u.op_type) for u in units if u.method == "float")
    if floats:
        lines.append("float:")
        grouped: dict[str, list[str]] = {}
        for (reason, op), n in floats.most_common():
            grouped.setdefault(_short(reason), []).append(f"{n} {op}")
        shown = list(grouped.items())[:8]
        lines += [f"  {', '.join(ops[:6])}: {reason}" for reason, ops in shown]
        if len(grouped) > len(shown):
            lines.append(f"  and {len(grouped) - len(shown)} more reasons in report.json")
    return lines


def _short(reason: str) -> str:
    """Reasons that differ in a tensor's name alone are one line."""
    return "an input is float" if reason.startswith("its input ") else reason


def _runtime(runtime: Mapping[str, Any]) -> list[str]:
    if not runtime:
        return []
    kernels = sum(runtime.get("integer_kernels", {}).values())
    left = runtime.get("leftover_quantize", 0) + runtime.get("leftover_dequantize", 0)
    return [f"the runtime fused {kernels} integer kernels and left {left} Q/DQ conversions"]


def _candidates(candidates: Sequence[Candidate]) -> list[str]:
    if len(candidates) < 2:
        return []
    lines = ["", "tried"]
    for c in candidates:
        level = "equal" if c.sqnr_db is None else f"{c.sqnr_db:.1f} dB"
        lines.append(
            f"  {'→' if c.chosen else ' '} {c.name.ljust(24)} {size_text(c.size_bytes).rjust(9)}  "
            f"{c.speedup:.2f}× as fast  {level}{'' if not c.reason else '  ' + c.reason}"
        )
    return lines
