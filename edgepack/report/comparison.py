"""Comparison of two builds by their reports. Nothing is built or measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from edgepack.report.tables import size_text, table, time_text
from edgepack.results import BuildReport, Fidelity, GroupRow, ModelFigures

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both builds; ``None`` where a build lacks it."""

    figure: str
    first: float | None
    second: float | None
    unit: str
    """``bytes``, ``ms``, ``ratio``, ``db`` or ``share``."""
    more_is_better: bool
    equal: tuple[bool, bool] = (False, False)
    """Whether the outputs equal the original's, so that fidelity has no number."""


@dataclass(frozen=True, slots=True)
class ChangedGroup:
    """A fusion group whose precision differs; an empty precision: the build has no such group."""

    name: str
    op_type: str
    first: str
    second: str
    first_us: float | None
    second_us: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """The comparison of two builds."""

    names: tuple[str, str]
    passed: tuple[bool, bool]
    rows: tuple[Row, ...]
    units: tuple[ChangedGroup, ...]
    warnings: tuple[str, ...]
    """Why figures may not be comparable: other models, data or machines."""


def compare_builds(names: tuple[str, str], first: BuildReport, second: BuildReport) -> Pair:
    """The figures of both builds, the groups that differ, and warnings."""
    rows: list[Row] = []
    formats = list(dict.fromkeys(m.name for m in (*first.models, *second.models)))
    for name in formats:
        pair = [next((m for m in r.models if m.name == name), None) for r in (first, second)]
        rows += _rows(name, pair[0], pair[1])
    passed = (first.passed, second.passed)
    return Pair(names, passed, tuple(rows), _changed(first, second), _warnings(first, second))


def _rows(name: str, first: ModelFigures | None, second: ModelFigures | None) -> list[Row]:
    def row(figure: str, unit: str, of: Callable[[ModelFigures], float | None], more: bool = False) -> Row:
        return Row(f"{name} {figure}", _of(first, of), _of(second, of), unit, more)

    def checked(of: Callable[[Fidelity], float | None]) -> Callable[[ModelFigures], float | None]:
        return lambda m: _of(m.fidelity, of)

    label = next((m.fidelity.metric_name for m in (first, second) if m and m.fidelity), None)
    equal = (_is_equal(name, first), _is_equal(name, second))
    found = [
        row("size", "bytes", lambda m: m.size_bytes),
        row("packed", "bytes", lambda m: m.packed_bytes),
        row("latency p50", "ms", lambda m: m.latency_ms_p50),
        row("speed-up", "ratio", lambda m: m.speedup, True),
        row("cold start", "ms", lambda m: m.cold_start_ms),
        row("peak memory", "bytes", lambda m: m.peak_memory_bytes),
        replace(row("fidelity", "db", checked(lambda f: f.sqnr_db), True), equal=equal),
        row("agreement", "share", checked(lambda f: f.agreement), True),
        row((label or "metric").rpartition(":")[2], "share", checked(lambda f: f.metric), True),
    ]
    return [r for r in found if r.first is not None or r.second is not None or any(r.equal)]


def _of(thing: T | None, of: Callable[[T], float | None]) -> float | None:
    return None if thing is None else of(thing)


def _is_equal(name: str, model: ModelFigures | None) -> bool:
    found = model.fidelity if model else None
    return found is not None and found.sqnr_db is None and name != "original"


def _changed(first: BuildReport, second: BuildReport) -> tuple[ChangedGroup, ...]:
    sides = [{u.name: u for u in r.units} for r in (first, second)]
    found = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = sides[0].get(name), sides[1].get(name)
        known = a or b
        if known is not None and _precision(a) != _precision(b):
            us = [_of(group, lambda u: u.built_us) for group in (a, b)]
            found.append(ChangedGroup(name, known.op_type, _precision(a), _precision(b), us[0], us[1]))
    return tuple(found)


def _precision(group: GroupRow | None) -> str:
    return group.method if group else ""


def _warnings(first: BuildReport, second: BuildReport) -> tuple[str, ...]:
    found = []
    for key, warning in (
        ("model", "the original models differ"),
        ("evaluation", "the evaluation data differ: metrics and fidelity are not comparable"),
    ):
        sides = [r.fingerprints.get(key) for r in (first, second)]
        if sides[0] != sides[1]:
            found.append(warning)
    machines = [(r.environment.get("cpu"), r.environment.get("onnxruntime")) for r in (first, second)]
    if machines[0] != machines[1]:
        found.append(
            "measured on other machines or runtimes: times are not comparable, speed-ups only roughly"
        )
    else:
        found.append("measured in two runs: speed-ups are comparable, times only roughly")
    return tuple(found)


def value_texts(row: Row) -> tuple[str, str]:
    """Both values as text."""
    first, second = (
        "equal" if equal else _value_text(row.unit, value)
        for value, equal in zip((row.first, row.second), row.equal, strict=True)
    )
    return first, second


def _value_text(unit: str, value: float | None) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return size_text(value)
    if unit == "ms":
        return time_text(value)
    return {"ratio": f"{value:.2f}×", "db": f"{value:.1f} dB"}.get(unit, f"{value:.4f}")


def change_text(row: Row) -> str:
    """The change from the first to the second: percent for bytes, times and ratios, else the difference."""
    if row.first is None or row.second is None:
        return ""
    if row.unit in ("db", "share"):
        digits = 1 if row.unit == "db" else 4
        return f"{row.second - row.first:+.{digits}f}"
    return f"{100 * (row.second / row.first - 1):+.1f} %" if row.first else ""


def pair_text(pair: Pair) -> str:
    """The comparison as lines of text."""
    head = ("", *pair.names, "change")
    verdicts = ("gate", *("pass" if ok else "FAIL" for ok in pair.passed), "")
    rows = [(r.figure, *value_texts(r), change_text(r)) for r in pair.rows]
    lines = table([head, verdicts, *rows], right=(1, 2, 3))
    if pair.units:
        shown = [(u.name, u.op_type, u.first or "-", u.second or "-") for u in pair.units]
        lines += ["", "groups whose precision differs", *table(shown)]
    return "\n".join([*lines, "", *pair.warnings]) + "\n"


def named(folders: Sequence[str]) -> tuple[str, str]:
    """Short names of two folders: as few of their last components as make them differ."""
    first, second = (folder.rstrip("/").split("/") for folder in folders)
    most = max(len(first), len(second))
    parts = next((n for n in range(1, most + 1) if first[-n:] != second[-n:]), 1)
    return "/".join(first[-parts:]), "/".join(second[-parts:])
