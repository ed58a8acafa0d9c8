"""The report of a build as text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.report.devices import device_lines
from edgepack.report.formats import busy, first_of, host_only, tflite_lines
from edgepack.report.stage_breakdown import stage_breakdown_lines
from edgepack.report.tables import or_dash, size_text, table, time_text
from edgepack.results import (
    EQUAL_DB,
    BuildReport,
    Candidate,
    Fidelity,
    GateLine,
    GroupRow,
    ModelFigures,
    Parity,
    Refusal,
    SensitivityRow,
)

MOST_REASONS = 8
SHOWN_GROUPS = 3
SHOWN_SENSITIVE = 5
SHOWN_FAILED = 3
"""How many candidates are shown that change single groups and that the runtime does not run."""
WORTH_SHOWING = 0.02
"""Loss of time against float from which a group is shown, as a share of the time of all groups."""


def text(report: BuildReport) -> str:
    """The report as text: verdict, figures, the precision of operators and why some are float, gate."""
    lines = [_headline(report), *_refused(report.refused), ""]
    lines += _figures(report.models)
    lines += stage_breakdown_lines(report.waterfall)
    lines += _parity(report)
    groups = [*_precisions(report.units), *_runtime(report.runtime), *_weak_points(report.units)]
    lines += ["", *groups] if groups else []
    lines += _sensitivity(report.sensitivity)
    lines += _candidates(report.candidates)
    lines += device_lines(report.devices)
    lines += _gate(report.gate)
    environment = report.environment
    lines += [
        "",
        f"measured on {environment.get('cpu', 'unknown CPU')}, {environment.get('threads', 1)} thread(s), "
        f"onnxruntime {environment.get('onnxruntime', '?')}"
        + (f", {environment['litert']}" if "tflite" in report.runtime else "")
        + "; times are comparable within this run only",
    ]
    return "\n".join([*lines, *notes_of(report)]) + "\n"


def notes_of(report: BuildReport) -> list[str]:
    """Notes for readers of the figures."""
    latencies = [(m.latency_ms_p50, m.latency_ms_p90) for m in report.models]
    return [note for note in (*report.notes, busy(latencies), host_only(report.runtime)) if note]


def _headline(report: BuildReport) -> str:
    original, built = report.models[0], report.models[1]
    parts = [_smaller(built, original), f"{built.speedup:.2f}× as fast"]
    name = built.fidelity.metric_name if built.fidelity else None
    parts.append(f"{name} {_metric(built, original)}" if name else f"fidelity {_level(built)}")
    verdict = "PASS" if report.passed else "GATE FAILED"
    return f"{verdict}  {report.model} for {report.target}: {', '.join(parts)}"


def _refused(refused: Sequence[Refusal]) -> list[str]:
    return [f"NOT BUILT  {refusal.file}: {refusal.reason}" for refusal in refused]


def _parity(report: BuildReport) -> list[str]:
    """Fidelity of each artifact against the original and earlier artifacts, and the metric."""
    original, built = report.models[0], report.models[1:]
    if not report.parity:
        return []
    cells = {(p.name, p.against): _closeness(p) for p in report.parity}
    cells |= {(m.name, original.name): _closeness(m.fidelity) for m in built if m.fidelity is not None}
    others = [m.name for m in report.models[:-1]]
    metric = next((m.fidelity.metric_name for m in built if m.fidelity and m.fidelity.metric_name), None)
    rows = [["parity", *(f"against {name}" for name in others), *([metric] if metric else [])]]
    for m in built:
        row = [m.name, *(cells.get((m.name, other), "") for other in others)]
        rows.append([*row, _metric(m, original)] if metric else row)
    return ["", *table(rows)]


def _closeness(found: Fidelity | Parity) -> str:
    level = "equal" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"
    return level + ("" if found.agreement is None else f", {found.agreement:.4f}")


def _smaller(model: ModelFigures, original: ModelFigures) -> str:
    ratio = original.size_bytes / model.size_bytes
    return f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"


def _figures(models: Sequence[ModelFigures]) -> list[str]:
    original = models[0]
    rows = [("", *(m.name for m in models))]
    rows.append(
        ("size", *(_with(size_text(m.size_bytes), _smaller(m, original), m, original) for m in models))
    )
    if any(m.packed_bytes for m in models):
        packed = [size_text(m.packed_bytes) if m.packed_bytes else "-" for m in models]
        rows.append(("packed", *packed))
    speed = [f"{m.speedup:.2f}× as fast" for m in models]
    p50 = [time_text(m.latency_ms_p50) for m in models]
    rows.append(("latency p50", *(_with(p50[i], speed[i], m, original) for i, m in enumerate(models))))
    rows.append(("latency p90", *(time_text(m.latency_ms_p90) for m in models)))
    rows.append(("cold start", *(or_dash(time_text, m.cold_start_ms) for m in models)))
    rows.append(("peak memory", *(or_dash(size_text, m.peak_memory_bytes) for m in models)))
    if any(m.fidelity is not None for m in models):
        name = next((m.fidelity.metric_name for m in models if m.fidelity and m.fidelity.metric_name), None)
        if name:
            rows.append((name, *(_metric(m, original) for m in models)))
        if len(models) < 3:  # else the table of parity has it
            rows.append(("fidelity", *("-" if m is original else _fidelity(m) for m in models)))
        rows.append(("centred fidelity", *("-" if m is original else _centred(m) for m in models)))
    return table(rows)


def _with(figure: str, relation: str, model: ModelFigures, original: ModelFigures) -> str:
    return figure if model is original else f"{figure}  ({relation})"


def _metric(model: ModelFigures, original: ModelFigures) -> str:
    value = model.fidelity.metric if model.fidelity else None
    if value is None:
        return "-"
    base = original.fidelity.metric if original.fidelity else None
    return f"{value:.4f}" if base is None else _with(f"{value:.4f}", f"{value - base:+.4f}", model, original)


def _level(model: ModelFigures) -> str:
    if model.fidelity is None:
        return "not measured"
    return "equal" if model.fidelity.sqnr_db is None else f"{model.fidelity.sqnr_db:.1f} dB"


def _centred(model: ModelFigures) -> str:
    found = model.fidelity
    if found is None or found.sqnr_db is None or found.centred_sqnr_db is None:
        return _level(model)
    return f"{found.centred_sqnr_db:.1f} dB"


def _fidelity(model: ModelFigures) -> str:
    agreement = model.fidelity.agreement if model.fidelity else None
    return _level(model) + ("" if agreement is None else f", agreement {agreement:.4f}")


def _precisions(groups: Sequence[GroupRow]) -> list[str]:
    """How many operators of each type have which precision, and why some are float."""
    lines = []
    total = Counter(u.op_type for u in groups)
    by_method = Counter((u.method, u.op_type) for u in groups if u.method != "float")
    for method, _ in Counter(u.method for u in groups if u.method != "float").most_common():
        parts = [f"{n} of {total[op]} {op}" for (m, op), n in by_method.most_common() if m == method]
        lines.append(f"{method.replace('_', ' ')}: {first_of(parts, 8, 'more')}")
    grouped: dict[str, list[str]] = {}
    for (reason, op), n in Counter(
        (u.summary or u.reason, u.op_type) for u in groups if u.method == "float"
    ).most_common():
        grouped.setdefault(reason, []).append(f"{n} {op}")
    if grouped:
        lines.append("float:")
        shown = list(grouped.items())[:MOST_REASONS]
        lines += [f"  {first_of(ops, 6, 'more')}: {reason}" for reason, ops in shown]
        if len(grouped) > len(shown):
            lines.append(f"  and {len(grouped) - len(shown)} more reasons in report.json")
    return lines


def _runtime(runtime: Mapping[str, Any]) -> list[str]:
    if not runtime:
        return []
    kernels = sum(runtime.get("integer_kernels", {}).values())
    left = runtime.get("leftover_quantize", 0) + runtime.get("leftover_dequantize", 0)
    spent = runtime.get("conversions_us", 0.0)
    cost = f" ({time_text(spent / 1e3)} per run)" if spent else ""
    return [
        f"the runtime runs {kernels} int8 kernel{'' if kernels == 1 else 's'}, with {left} "
        f"conversion{'' if left == 1 else 's'} between int8 and float{cost}",
        *tflite_lines(runtime.get("tflite", {})),
    ]


def _weak_points(groups: Sequence[GroupRow]) -> list[str]:
    """Groups that are not float: those with the lowest fidelity, and those that lost the most time."""
    changed = [u for u in groups if u.method != "float"]
    least = math.fsum(u.float_us or 0.0 for u in groups) * WORTH_SHOWING
    faint = sorted((u for u in changed if u.sqnr_db is not None), key=lambda u: u.sqnr_db or 0.0)[
        :SHOWN_GROUPS
    ]
    slow = sorted((u for u in changed if _lost_us(u) > least), key=_lost_us, reverse=True)[:SHOWN_GROUPS]
    rows = [
        (
            u.name,
            u.op_type,
            "" if u.sqnr_db is None else f"{u.sqnr_db:.1f} dB",
            "" if u.built_us is None or u.float_us is None else f"{u.float_us:.0f} → {u.built_us:.0f} µs",
        )
        for u in dict.fromkeys([*faint, *slow])
    ]
    heading = "groups with the lowest fidelity" + (", and those slower than in float" if slow else "")
    return ["", heading, *table(rows, right=(2, 3))] if rows else []


def _sensitivity(rows: Sequence[SensitivityRow]) -> list[str]:
    """The groups that add the most noise, measured alone."""
    noisy = sorted((r for r in rows if r.sqnr_db is not None), key=lambda r: r.sqnr_db or 0.0)
    shown = [
        (
            r.name,
            r.op_type,
            f"{r.sqnr_db:.1f} dB as {r.method}",
            ", ".join(f"{method} {us:.0f} µs" for method, us in r.us.items()),
        )
        for r in noisy[:SHOWN_SENSITIVE]
    ]
    heading = "groups that add the most noise, measured alone"
    return ["", heading, *table(shown, right=(2,))] if shown else []


def _lost_us(group: GroupRow) -> float:
    return 0.0 if group.built_us is None or group.float_us is None else group.built_us - group.float_us


def _candidates(candidates: Sequence[Candidate]) -> list[str]:
    if len(candidates) < 2:
        return []
    failed = [c for c in candidates if c.of_units and c.speedup is None][:SHOWN_FAILED]
    shown = [*(c for c in candidates if c.chosen or not c.of_units), *failed]
    rows = [
        (
            "→" if c.chosen else " ",
            c.name,
            "-" if c.size_bytes is None else size_text(c.size_bytes),
            "-" if c.speedup is None else f"{c.speedup:.2f}× as fast",
            "-" if c.speedup is None else "equal" if c.sqnr_db is None else f"{c.sqnr_db:.1f} dB",
            c.reason,
        )
        for c in shown
    ]
    more = len(candidates) - len(shown)
    rest = [f"  and {more} that change single groups, in report.json"] if more else []
    return ["", "candidates", *table(rows, right=(2, 3, 4)), *rest]


def _measured(line: GateLine) -> str:
    if line.measured is None:
        return "not measured"
    return "outputs are equal" if line.measured == EQUAL_DB else f"measured {_figure(line.measured)}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _gate(gate: Sequence[GateLine]) -> list[str]:
    if not gate:
        return []
    rows = [
        (
            "ok" if line.passed else "FAIL",
            f"{line.limit} {_figure(line.bound)}",
            _measured(line),
        )
        for line in gate
    ]
    return ["", "gate", *table(rows)]
