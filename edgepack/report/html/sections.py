"""The sections of the HTML report about whole models: verdict, steps, files, parity, candidates, origin."""

from collections.abc import Iterator, Sequence

from edgepack.report.formats import tflite_lines
from edgepack.report.html.charts import Bar, bars, dots
from edgepack.report.html.markup import Html, join, table, tag
from edgepack.report.html.words import (
    NONE,
    Section,
    change,
    closeness,
    duration,
    faster,
    level,
    metric_name,
    metric_of,
    section,
    signed,
    size,
    smaller,
)
from edgepack.report.tables import size_text, time_text
from edgepack.report.text import notes_of
from edgepack.results import EQUAL_DB, BuildReport, GateLine, Limit, Step, step_of


def verdict(report: BuildReport) -> Html:
    """Whether the gate is passed, the main figures, and the gate's limits."""
    mark, word = ("✓", "Pass") if report.passed else ("✗", "Gate failed")
    refused = [
        tag("p", tag("b", "Not built: "), f"{r.file}. {r.reason}", class_="warning") for r in report.refused
    ]
    title = tag("h1", tag("span", report.model), tag("small", f"for {report.target}"))
    badge = tag(
        "p", tag("span", mark, aria_hidden="true"), f" {word}", class_="pass" if report.passed else "fail"
    )
    return tag(
        "header",
        tag("div", title, badge, class_="top"),
        refused,
        tag("dl", _tiles(report), class_="tiles"),
        [tag("p", f"{note[0].upper()}{note[1:]}.", class_="lead") for note in notes_of(report)],
        _gate(report.gate),
    )


def _tiles(report: BuildReport) -> list[Html]:
    original, built = report.models[0], report.models[1]
    found = [
        ("Size", smaller(original.size_bytes, built.size_bytes),
         f"{size_text(original.size_bytes)} → {size_text(built.size_bytes)}"),
        ("Speed", faster(built.speedup),
         f"{time_text(original.latency_ms_p50)} → {time_text(built.latency_ms_p50)}"),
    ]  # fmt: skip
    before, after, name = metric_of(original), metric_of(built), metric_name(report.models)
    if before is not None and after is not None and name:
        found.append((name.capitalize(), f"{after:.4f}", f"{signed(after - before)} against the original"))
    if built.fidelity is not None:
        agreement = built.fidelity.agreement
        detail = "outputs against the original's"
        detail = detail if agreement is None else f"agreement {100 * agreement:.2f} %"
        found.append(("Fidelity", level(built.fidelity.sqnr_db), detail))
    return [
        tag("div", tag("dt", title), tag("dd", figure), tag("dd", detail, class_="told"))
        for title, figure, detail in found
    ]


def _gate(gate: Sequence[GateLine]) -> Html | None:
    if not gate:
        return tag("p", "No limits were set for this build.", class_="lead")

    def cell(line: GateLine) -> Html:
        mark, word = ("✓", "ok") if line.passed else ("✗", "fails")
        return tag("span", mark, " ", word, class_="good" if line.passed else "bad")

    rows = [
        (
            line.limit,
            _figure(line.bound),
            NONE
            if line.measured is None
            else "equal"
            if line.measured == EQUAL_DB
            else _figure(line.measured),
            cell(line),
        )
        for line in gate
    ]
    return table(
        ("Gate", "Limit", "Measured", "Verdict"), rows, label="The gate's limits", numbers=(1, 2), kind="gate"
    )


def _found(measured: float) -> str:
    return "equal" if measured == EQUAL_DB else _figure(measured)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def steps(report: BuildReport) -> Section:
    """The stage breakdown: bytes, accuracy and latency after each step, then the other formats."""
    rows = list(report.waterfall) or [step_of(m, m.name, m.packed_bytes) for m in report.models[:2]]
    names = [step.name for step in rows]
    rows += [step_of(m, m.name, m.packed_bytes) for m in report.models[2:] if m.name not in names]
    line, others = rows[: len(names)], rows[len(names) :]
    charts = [
        bars("Bytes on disk", list(_falling(line, others, "raw_bytes")), better="less is better"),
        bars("Latency, median", list(_falling(line, others, "latency_ms_p50")), better="less is better"),
    ]
    if any(s.resident_bytes is not None for s in rows):
        title = "Peak memory"
        charts.append(bars(title, list(_falling(line, others, "resident_bytes")), better="less is better"))
    if any(s.packed_bytes is not None for s in rows):
        title = "Bytes when packed (.epk)"
        charts.insert(1, bars(title, list(_falling(line, others, "packed_bytes")), better="less is better"))
    if any(s.metric is not None for s in rows):
        title = (metric_name(report.models) or "metric").capitalize()
        base = rows[0].metric
        found = [
            Bar(s.name, s.metric, NONE if s.metric is None else f"{s.metric:.4f}",
                note=_against(base, s.metric) if i else "", kind=_kind(i))
            for i, s in enumerate(rows)
        ]  # fmt: skip
        charts.append(dots(title, found, better="more is better", limit=_floor(report, base)))
    if any(s.sqnr_db is not None for s in rows[1:]):
        found = [
            Bar(
                s.name,
                s.sqnr_db,
                level(s.sqnr_db),
                note="" if s.agreement is None else f"{100 * s.agreement:.2f} %",
            )
            for s in rows[1:]
        ]
        charts.append(bars("Fidelity of the outputs", found, better="more is better"))
    notes = [tag("li", tag("b", s.name), ": ", "; ".join(s.notes)) for s in rows if s.notes]
    return section(
        "steps",
        "Stage breakdown",
        tag("div", charts, class_="grid-2"),
        tag("ul", notes) if notes else None,
        lead="The original, the model after each pass, the quantized model, then its other formats. The pale "
        "end of a bar is the reduction by the step.",
    )


def _against(base: float | None, metric: float | None) -> str:
    return "" if base is None or metric is None else signed(metric - base)


def _kind(place: int) -> str:
    return "" if place else "original"


def _falling(line: Sequence[Step], others: Sequence[Step], field: str) -> Iterator[Bar]:
    """Bars of one figure: each step against the step before, other formats against the original."""
    written = duration if field == "latency_ms_p50" else size
    first = getattr(line[0], field)
    for i, step in enumerate([*line, *others]):
        value = getattr(step, field)
        before = None if i == 0 else getattr(line[i - 1], field) if i < len(line) else first
        note = "" if i == 0 or value is None or first is None else change(first, value)
        yield Bar(step.name, value, written(value), before, note, _kind(i))


def _floor(report: BuildReport, base: float | None) -> float | None:
    """The least metric that the gate allows."""
    drop = next((line.bound for line in report.gate if line.limit is Limit.METRIC_DROP), None)
    return None if drop is None or base is None else base - drop


def formats(report: BuildReport) -> Section:
    """All figures of all files."""
    models, name = report.models, metric_name(report.models)
    head = ["File", "Size", "Packed", "p50", "p90", "Min", "Speed", "Cold start", "Peak memory", "Fidelity"]
    rows = []
    for m in models:
        row: list[str] = [
            tag("span", m.name, tag("small", m.file, class_="block")),
            size_text(m.size_bytes), size(m.packed_bytes),
            time_text(m.latency_ms_p50), time_text(m.latency_ms_p90), time_text(m.latency_ms_min),
            faster(m.speedup), duration(m.cold_start_ms), size(m.peak_memory_bytes),
            NONE if m is models[0] or m.fidelity is None else closeness(m.fidelity),
        ]  # fmt: skip
        value = metric_of(m)
        rows.append([*row, *([NONE if value is None else f"{value:.4f}"] if name else [])])
    details = tflite_lines(report.runtime.get("tflite", {}))
    return section(
        "formats",
        "Files and figures",
        table(
            [*head, *([name.capitalize()] if name else [])],
            rows,
            label="Figures of all files",
            numbers=range(1, 11),
        ),
        tag("pre", "\n".join(details), tabindex="0") if details else None,
        lead="All files were timed in one run, interleaved. Fidelity is the signal-to-quantization-noise "
        "ratio (SQNR) of the outputs against the original's, then the agreement.",
    )


def parity(report: BuildReport) -> Section | None:
    """Fidelity of the outputs of each file against the others'."""
    models = report.models
    if not report.parity:
        return None
    found = {(p.name, p.against): (p.sqnr_db, closeness(p)) for p in report.parity}
    found |= {
        (m.name, models[0].name): (m.fidelity.sqnr_db, closeness(m.fidelity))
        for m in models[1:]
        if m.fidelity
    }

    def cell(name: str, against: str) -> Html | str:
        if (name, against) not in found:
            return ""
        sqnr_db, written = found[name, against]
        strength = 4 if sqnr_db is None else sum(sqnr_db >= least for least in (10, 20, 30, 40))
        return tag("span", written, class_=f"heat heat-{strength}")

    rows = [(m.name, *(cell(m.name, other.name) for other in models[:-1])) for m in models[1:]]
    return section(
        "parity",
        "Parity of the runtimes",
        tag(
            "div",
            table(("File", *(f"against {m.name}" for m in models[:-1])), rows, label="Parity", kind="parity"),
            data_chart="Parity",
        ),
        lead="Each file against the original and the files before it, on the same evaluation samples: SQNR, "
        "then agreement.",
    )


def candidates(report: BuildReport) -> Section | None:
    """The candidates that were measured."""
    if len(report.candidates) < 2:
        return None
    rows = [
        (
            tag("span", c.name, tag("small", "→ chosen", class_="block") if c.chosen else None),
            NONE if c.size_bytes is None else size_text(c.size_bytes),
            NONE if c.speedup is None else faster(c.speedup), NONE if c.speedup is None else level(c.sqnr_db),
            NONE if c.metric is None else f"{c.metric:.4f}", c.reason,
        )
        for c in report.candidates
    ]  # fmt: skip
    return section(
        "candidates",
        "Candidates",
        table(
            ("Candidate", "Size", "Speed", "Fidelity", "Metric", "Reason against"),
            rows,
            label="Candidates",
            numbers=(1, 2, 3, 4),
        ),
        lead="Candidates for the quantized model, measured on a few calibration samples.",
    )


def origin(report: BuildReport) -> Section:
    """The command, the machine, the time of each stage, and the fingerprints of the inputs."""
    environment = {key.replace("_", " "): value for key, value in report.environment.items()}
    stages = [
        Bar(s.name, s.seconds, f"{s.seconds:.1f} s", note="; ".join(s.notes), kind="stage")
        for s in report.stages
    ]
    facts = [("command", tag("code", report.command)), *environment.items()]
    facts += [(f"{name} digest", tag("code", digest)) for name, digest in report.fingerprints.items()]
    return section(
        "origin",
        "Build",
        tag("div", bars("Time of each stage", stages, better=""), class_="stages"),
        tag("dl", [join(tag("dt", str(k)), tag("dd", _fact(v))) for k, v in facts], class_="facts"),
        lead="Times are comparable within this run only.",
    )


def _fact(value: object) -> str:
    if isinstance(value, Html):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
