"""The sections of the HTML report about single fusion groups: error over time, precisions, ranges."""

import json
import math
from collections import Counter
from collections.abc import Sequence

from edgepack.calibration.ranges import Range, RangeTable
from edgepack.report.html.charts import Bar, Point, bars, legend, scatter
from edgepack.report.html.markup import Html, join, table, tag
from edgepack.report.html.words import NONE, Section, level, microseconds, section
from edgepack.results import BuildReport, GroupRow

MOST_HISTOGRAM_BYTES = 2_500_000
"""Most bytes of histograms: a report stays below 6 MB. The tensors that clip the most come first."""
SHOWN_IN_REASON = 12


def error_and_time(report: BuildReport) -> Section | None:
    """Each group's fidelity over its time, and the table of all groups."""
    if not report.units:
        return None
    drawn = [u for u in report.units if u.sqnr_db is not None and u.built_us]
    points = [Point(u.built_us or 0.0, u.sqnr_db or 0.0, u.method, _tip(u)) for u in drawn]
    left = len(report.units) - len(drawn)
    missing = (
        f"{left} of {len(report.units)} groups are not drawn: no measured time, or equal outputs."
        if left
        else ""
    )
    title = "Fidelity of each group over its time"
    return section(
        "layers",
        "Fusion groups: error and time",
        legend(sorted({p.kind for p in points})) if points else None,
        scatter(title, points, "microseconds per run (logarithmic)", "dB") if points else None,
        tag("p", missing, class_="lead") if missing and points else None,
        tag("details", tag("summary", f"All {len(report.units)} groups"), _group_table(report)),
        lead="A fusion group is a set of nodes that the runtime runs as one kernel. Groups at the lower "
        "right have the most error and time: another precision gains most there."
        if points
        else "The groups of this build were not measured one by one.",
    )


def _tip(group: GroupRow) -> str:
    times = f"{microseconds(group.float_us)} → {microseconds(group.built_us)} µs"
    return f"{group.name}\n{group.op_type}, {group.method.replace('_', ' ')}\n{level(group.sqnr_db)}, {times}"


def _group_table(report: BuildReport) -> Html:
    alone = {row.name: row for row in report.sensitivity}
    head = [
        "Group",
        "Operator",
        "Precision",
        "Parameters",
        "dB",
        "float µs",
        "built µs",
        *(["alone, dB"] if alone else []),
        "Reason",
    ]
    rows = []
    for u in report.units:
        row = [
            u.name, u.op_type, u.method.replace("_", " "), f"{u.parameters:,}",
            NONE if u.sqnr_db is None else f"{u.sqnr_db:.1f}",
            microseconds(u.float_us), microseconds(u.built_us),
        ]  # fmt: skip
        if alone:
            found = alone.get(u.name)
            row.append(NONE if found is None else level(found.sqnr_db))
        rows.append([*row, u.reason])
    finder = tag(
        "input", type="search", placeholder="name, operator, precision or reason", data_filter="units"
    )
    search = tag("label", "Find ", finder, class_="find")
    return join(
        search, table(head, rows, label="Groups", numbers=range(3, 8 if alone else 7), kind="units sortable")
    )


def precisions(report: BuildReport) -> Section | None:
    """How many groups have which precision, and why some are float."""
    if not report.units:
        return None
    by_precision = Counter(u.method for u in report.units)
    weights = Counter[str]()
    times: Counter[str] = Counter()
    for u in report.units:
        weights[u.method] += u.parameters
        times[u.method] += u.built_us or 0.0  # type: ignore[assignment]  # a Counter adds floats, too
    names = [name for name, _ in by_precision.most_common()]
    charts = [
        _shares("Groups", names, by_precision, "groups"),
        _shares("Parameters", names, weights, "parameters"),
        _shares("Time", names, times, "µs"),
    ]
    grouped: dict[str, list[GroupRow]] = {}
    for u in report.units:
        if u.method == "float":
            grouped.setdefault(u.summary or u.reason, []).append(u)
    ordered = sorted(grouped.items(), key=lambda item: -len(item[1]))
    return section(
        "float",
        "Precision of groups, and why some are float",
        tag("div", [c for c in charts if c], class_="grid-3"),
        [_reason(reason, groups) for reason, groups in ordered] or tag("p", "No group is float."),
        lead="The groups that are float, by reason.",
    )


def _shares(title: str, names: Sequence[str], amounts: "Counter[str]", unit: str) -> Html | None:
    total = sum(amounts.values())
    if not total:
        return None
    rows = [
        Bar(name.replace("_", " "), float(amounts[name]), f"{100 * amounts[name] / total:.1f} %",
            note=f"{amounts[name]:,.0f} {unit}", kind=name)
        for name in names
    ]  # fmt: skip
    return bars(title, rows, better="by precision")


def _reason(reason: str, groups: Sequence[GroupRow]) -> Html:
    counted = ", ".join(f"{n} {op}" for op, n in Counter(u.op_type for u in groups).most_common())
    named = [u.name for u in groups[:SHOWN_IN_REASON]]
    more = len(groups) - len(named)
    return tag(
        "details",
        tag("summary", tag("b", counted), f" {reason or 'no reason given'}"),
        tag(
            "ul",
            [tag("li", tag("code", name)) for name in named],
            tag("li", f"and {more} more") if more else None,
        ),
        class_="reason",
    )


def ranges(table: RangeTable | None) -> Section | None:
    """Histograms with the chosen range, one tensor at a time; drawn by ``page.js``."""
    drawn = _drawn(table)
    if table is None or not drawn:
        return None
    options = [tag("option", name, value=str(i)) for i, name in enumerate(drawn)]
    left = len(table.ranges) - len(drawn)
    without = f" {left} of {len(table.ranges)} tensors have no histogram here." if left else ""
    return section(
        "ranges",
        "Ranges of tensors",
        tag(
            "div",
            tag("label", "Tensor ", tag("select", options, id="tensor"), class_="find"),
            tag("button", "‹", type="button", data_step="-1", aria_label="previous tensor"),
            tag("button", "›", type="button", data_step="1", aria_label="next tensor"),
            class_="chooser",
        ),
        tag("figure", id="histogram", class_="chart", data_chart="Histogram"),
        tag("dl", id="range-facts", class_="facts", aria_live="polite"),
        tag("noscript", tag("p", "Histograms need JavaScript.")),
        tag(
            "script",
            _json([_entry(name, r) for name, r in drawn.items()]),
            type="application/json",
            id="range-data",
        ),
        lead=f"Histograms of {table.samples} calibration samples, and the ranges that observer "
        f"{table.observer} chose: values in the shaded parts are clipped. Tensors whose range is clipped the "
        f"most come first.{without}",
    )


def _drawn(table: RangeTable | None) -> dict[str, Range]:
    """The tensors to show, those whose range is clipped the most first, up to the limit of bytes."""
    if table is None:
        return {}
    found = [(name, r) for name, r in table.ranges.items() if r.histogram is not None]
    room, drawn = MOST_HISTOGRAM_BYTES, {}
    for name, r in sorted(found, key=lambda item: (-_lost(item[1]), item[0])):
        room -= len(json.dumps(_entry(name, r)))
        if room < 0:
            break
        drawn[name] = r
    return drawn


def _lost(r: Range) -> float:
    """Share of the observed range that is clipped."""
    span = r.maximum - r.minimum
    return (max(r.low - r.minimum, 0.0) + max(r.maximum - r.high, 0.0)) / span if span > 0 else 0.0


def _entry(name: str, r: Range) -> dict[str, object]:
    assert r.histogram is not None
    width = math.ldexp(1.0, r.histogram.exponent)
    return {
        "name": name, "low": r.low, "high": r.high, "min": r.minimum, "max": r.maximum,
        "first": r.histogram.first, "width": width, "counts": r.histogram.counts,
    }  # fmt: skip


def _json(content: object) -> Html:
    """JSON for a script element, ``<`` escaped so that it cannot end the element."""
    return Html(json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
