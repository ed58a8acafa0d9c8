"""The comparison of two builds as HTML, in the style of the report."""

from edgepack.report.comparison import Pair, Row, change_text, value_texts
from edgepack.report.html.charts import Bar, bars
from edgepack.report.html.markup import Html, table, tag
from edgepack.report.html.render import page
from edgepack.report.html.words import NONE, microseconds, section

DRAWN = {"size", "packed", "latency p50", "speed-up", "peak memory", "fidelity"}
"""Figures with a chart; the table has all."""


def comparison_html(pair: Pair) -> str:
    """``pair`` as one HTML file."""
    first, second = pair.names
    charts = [_chart(pair, row) for row in pair.rows if row.figure.partition(" ")[2] in DRAWN]
    parts = [
        section("figures", "All figures", _figures(pair), lead=f"The change is {second} against {first}."),
        section("charts", "Side by side", tag("div", [c for c in charts if c], class_="grid-2")),
        section("units", "Groups whose precision differs", _groups(pair)),
    ]
    return page(f"{first} and {second}: comparison", _header(pair), parts)


def _header(pair: Pair) -> Html:
    badges = [
        tag("p", f"{name}: ", "✓ pass" if ok else "✗ gate failed", class_="pass" if ok else "fail")
        for name, ok in zip(pair.names, pair.passed, strict=True)
    ]
    return tag(
        "header",
        tag("div", tag("h1", "Comparison", tag("small", " and ".join(pair.names))), badges, class_="top"),
        [tag("p", warning, class_="lead") for warning in pair.warnings],
    )


def _figures(pair: Pair) -> Html:
    rows = [(r.figure, *value_texts(r), _verdict(r)) for r in pair.rows]
    return table(("Figure", *pair.names, "Change"), rows, label="All figures", numbers=(1, 2, 3))


def _verdict(row: Row) -> Html | str:
    """The change, marked better or worse where it exceeds the measurement noise."""
    if row.first is None or row.second is None or not row.first:
        return ""
    written = change_text(row).replace("-", "−")
    noise = 0.02 if row.unit in ("ms", "ratio") else 0.0
    if row.figure.startswith("original ") or abs(row.second / row.first - 1) <= noise:
        return written
    better = (row.second > row.first) == row.more_is_better
    return tag("span", written, " better" if better else " worse", class_="good" if better else "bad")


def _chart(pair: Pair, row: Row) -> Html | None:
    if row.first is None or row.second is None:
        return None
    first, second = value_texts(row)
    change = change_text(row).replace("-", "−")
    lines = [
        Bar(pair.names[0], row.first, first, kind="original"),
        Bar(pair.names[1], row.second, second, note=change),
    ]
    return bars(
        row.figure.capitalize(), lines, better=f"{'more' if row.more_is_better else 'less'} is better"
    )


def _groups(pair: Pair) -> Html:
    if not pair.units:
        return tag("p", "None: every group has the same precision in both.")
    rows = [
        (
            u.name,
            u.op_type,
            u.first or NONE,
            u.second or NONE,
            microseconds(u.first_us),
            microseconds(u.second_us),
        )
        for u in pair.units
    ]
    first, second = pair.names
    head = ("Group", "Operator", first, second, f"µs {first}", f"µs {second}")
    return table(head, rows, label="Groups whose precision differs", numbers=(4, 5))
