"""Charts as HTML and inline SVG, with positions in percent, so that text keeps its size on any screen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgepack.report.html.markup import Html, tag

PADDING = 0.08
"""Free space at either end of an axis, as a share of its span."""
MARKS = {
    "static": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
    "dynamic": "M-4.5,-4.5h9v9h-9z",
    "weight_only": "M0,-5.5L5.5,4.5H-5.5z",
    "stored": "M0,5.5L5.5,-4.5H-5.5z",
    "float": "M-4.5,-4.5L4.5,4.5M-4.5,4.5L4.5,-4.5",
}
"""SVG path of the mark for each precision; the shape also helps colour-blind readers."""
OTHER_MARK = "M0,-6L6,0L0,6L-6,0z"


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a bar chart."""

    label: str
    value: float | None
    """``None`` where it was not measured."""
    text: str
    """The value as text."""
    before: float | None = None
    """The value of the step before; a reduction is drawn as a pale end."""
    note: str = ""
    kind: str = ""
    """``original``, or empty: picks the colour."""


def bars(title: str, rows: Sequence[Bar], *, better: str) -> Html:
    """A bar chart from zero, as a table for screen readers; ``better`` says which direction is good."""
    most = max((v for row in rows for v in (row.value, row.before) if v is not None), default=0.0) or 1.0

    def track(row: Bar) -> Html:
        if row.value is None:
            return tag("div", class_="track")
        share = 100 * row.value / most
        ghost = 100 * (row.before or 0.0) / most - share
        return tag(
            "div",
            tag("span", class_=f"bar {row.kind}".strip(), style=f"width:{max(share, 0.4):.2f}%"),
            tag("span", class_="ghost", style=f"width:{ghost:.2f}%") if ghost > 0 else None,
            class_="track",
        )

    return _chart_table(title, rows, [track(row) for row in rows], better)


def dots(title: str, rows: Sequence[Bar], *, better: str, limit: float | None = None) -> Html:
    """A dot chart whose axis need not start at zero, for metrics; ``limit`` is the gate's."""
    known = [row.value for row in rows if row.value is not None] + ([limit] if limit is not None else [])
    low, high = min(known), max(known)
    room = (high - low) * 0.15 or abs(high) * 0.01 or 0.01
    low, high = low - room, high + room

    def track(row: Bar) -> Html:
        line = None if limit is None else _at("limit", limit, low, high)
        dot = None if row.value is None else _at(f"dot {row.kind}".strip(), row.value, low, high)
        return tag("div", line, dot, class_="track axis")

    hint = f"{better}; from {low:.4g} to {high:.4g}"
    hint += "" if limit is None else f"; the line is the gate's limit, {limit:.4g}"
    return _chart_table(title, rows, [track(row) for row in rows], hint)


def _at(kind: str, value: float, low: float, high: float) -> Html:
    return tag("span", class_=kind, style=f"left:{100 * (value - low) / (high - low):.2f}%")


def _chart_table(title: str, rows: Sequence[Bar], tracks: Sequence[Html], better: str) -> Html:
    lines = [
        tag(
            "tr",
            tag("th", row.label, scope="row"),
            tag("td", track, class_="plot"),
            tag("td", row.text, tag("small", row.note) if row.note else None, class_="num"),
        )
        for row, track in zip(rows, tracks, strict=True)
    ]
    caption = tag("caption", title, " ", tag("small", better))
    return tag("table", caption, tag("tbody", lines), class_="bars", data_chart=title)


@dataclass(frozen=True, slots=True)
class Point:
    """One mark of a scatter plot."""

    x: float
    y: float
    kind: str
    tip: str


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> Html:
    """A scatter plot with a logarithmic x axis; ``x`` must be above zero."""
    x_low, x_high = _span([math.log10(p.x) for p in points])
    y_low, y_high = _span([p.y for p in points])

    def right(x: float) -> float:
        return 100 * (math.log10(x) - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        return 100 * (y_high - y) / (y_high - y_low)

    marks = [
        tag(
            "svg",
            tag("path", d=MARKS.get(p.kind, OTHER_MARK), class_=f"mark {p.kind}", data_tip=p.tip),
            x=f"{right(p.x):.2f}%",
            y=f"{down(p.y):.2f}%",
            overflow="visible",
        )
        for p in points
    ]
    grid = [
        part
        for x in log_ticks(x_low, x_high)
        for part in (
            tag("line", x1=f"{right(x):.2f}%", x2=f"{right(x):.2f}%", y1="0", y2="100%", class_="grid"),
            tag("text", f"{x:g}", x=f"{right(x):.2f}%", y="100%", dy="16", text_anchor="middle"),
        )
    ] + [
        part
        for y in ticks(y_low, y_high)
        for part in (
            tag("line", x1="0", x2="100%", y1=f"{down(y):.2f}%", y2=f"{down(y):.2f}%", class_="grid"),
            tag("text", f"{y:g}", x="0", dx="-8", y=f"{down(y):.2f}%", dy="4", text_anchor="end"),
        )
    ]
    drawing = tag(
        "svg", grid, marks, width="100%", height="100%", overflow="visible", role="img", aria_label=title
    )
    return tag(
        "figure",
        tag("div", y_label, class_="axis-title"),
        tag("div", drawing, class_="frame"),
        tag("div", x_label, class_="axis-title x"),
        class_="chart",
        data_chart=title,
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a line chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str
    """A CSS class: ``solid`` or ``dashed``."""


def lines(title: str, drawn: Sequence[Line], x_label: str, y_label: str) -> Html:
    """A line chart with a linear x axis and a logarithmic y axis; ``y`` must be above zero."""
    x_low, x_high = _span([x for line in drawn for x in line.x])
    y_low, y_high = _span([math.log10(y) for line in drawn for y in line.y])

    def place(x: float, y: float) -> tuple[float, float]:
        return 100 * (x - x_low) / (x_high - x_low), 100 * (y_high - math.log10(y)) / (y_high - y_low)

    paths = [
        tag(
            "polyline",
            points=" ".join(f"{a:.2f},{b:.2f}" for a, b in map(place, line.x, line.y)),
            class_=f"curve {line.kind}",
            vector_effect="non-scaling-stroke",
        )
        for line in drawn
    ]
    down, right = ticks(x_low, x_high), log_ticks(y_low, y_high)
    grid = [
        part
        for y in right
        for at in (f"{place(x_low, y)[1]:.2f}%",)
        for part in (
            tag("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"),
            tag("text", f"{y:g}", x="0", dx="-8", y=at, dy="4", text_anchor="end"),
        )
    ] + [
        tag("text", f"{x:g}", x=f"{place(x, 10**y_low)[0]:.2f}%", y="100%", dy="16", text_anchor="middle")
        for x in down
    ]
    joined = tag("svg", paths, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    drawing = tag(
        "svg", grid, joined, width="100%", height="100%", overflow="visible", role="img", aria_label=title
    )
    names = [tag("li", tag("span", class_=f"stroke {line.kind}"), line.label) for line in drawn]
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", y_label, class_="axis-title"),
        tag("div", drawing, class_="frame low"),
        tag("div", x_label, class_="axis-title x"),
        tag("ul", names, class_="legend"),
        class_="chart",
        data_chart=title,
    )


def legend(kinds: Sequence[str]) -> Html:
    """The legend of a scatter plot."""
    return tag(
        "ul",
        [
            tag(
                "li",
                tag(
                    "svg",
                    tag(
                        "path",
                        d=MARKS.get(kind, OTHER_MARK),
                        class_=f"mark {kind}",
                        transform="translate(8,8)",
                    ),
                    width="16",
                    height="16",
                    aria_hidden="true",
                ),
                kind.replace("_", " "),
            )
            for kind in kinds
        ],
        class_="legend",
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * PADDING or 0.5
    return low - room, high + room


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between ``10**low`` and ``10**high``, at most about ``most``."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [
            m * 10.0**k
            for k in range(math.floor(low), math.ceil(high) + 1)
            for m in steps
            if low <= math.log10(m * 10.0**k) <= high
        ]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]
