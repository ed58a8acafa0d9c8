"""Comparison of two builds: figures, changes, groups whose precision differs, and warnings."""

import json
from dataclasses import replace
from pathlib import Path

from support import tiny
from support.pages import HOSTILE, checked
from support.reports import BUILT, GROUPS, ORIGINAL, REPORT

from edgepack.report.comparison import change_text, compare_builds, named, pair_text, value_texts
from edgepack.report.html.pair import comparison_html
from edgepack.results import Fidelity

SMALLER = replace(
    REPORT,
    passed=False,
    models=(ORIGINAL, replace(BUILT, size_bytes=750_000, speedup=1.0), replace(BUILT, name="ort")),
    units=(GROUPS[0], replace(GROUPS[1], method="float"), *GROUPS[2:4]),
    environment={"cpu": "Another", "onnxruntime": "1.32.0"},
)


def test_figures_and_precisions_of_both() -> None:
    pair = compare_builds(("a", "b"), REPORT, SMALLER)
    rows = {row.figure: row for row in pair.rows}
    assert (rows["onnx size"].first, rows["onnx size"].second) == (1_000_000, 750_000)
    assert change_text(rows["onnx size"]) == "-25.0 %"
    assert change_text(rows["onnx top1"]) == "+0.0000"
    assert rows["ort size"].first is None and change_text(rows["ort size"]) == ""
    assert [(u.name, u.first, u.second) for u in pair.units] == [
        ("mix", "static", "float"), ("gate2", "float", "")
    ]  # fmt: skip
    assert pair.passed == (True, False)
    page = pair_text(pair)
    assert "750.00 kB   -25.0 %" in page and "other machines" in page and "FAIL" in page


def test_a_figure_that_one_build_lacks_has_no_change() -> None:
    missing = tuple(replace(m, cold_start_ms=None, peak_memory_bytes=None) for m in REPORT.models)
    rows = compare_builds(("a", "b"), REPORT, replace(REPORT, models=missing)).rows
    found = {row.figure: value_texts(row) for row in rows}
    assert found["onnx cold start"] == ("15.00 ms", "-") and found["onnx peak memory"] == ("5.00 MB", "-")


def test_equal_outputs_are_shown_as_equal() -> None:
    equal = replace(BUILT, fidelity=Fidelity(50, None, 1.0, 0.91, "top1"))
    pair = compare_builds(("a", "b"), REPORT, replace(REPORT, models=(ORIGINAL, equal)))
    assert [value_texts(r) for r in pair.rows if r.figure == "onnx fidelity"] == [("31.3 dB", "equal")]


def test_incomparable_builds_get_warnings() -> None:
    other = replace(REPORT, fingerprints={"model": "11", "evaluation": "22"})
    warnings = " ".join(compare_builds(("a", "b"), REPORT, other).warnings)
    assert "original models differ" in warnings and "evaluation data differ" in warnings
    same = compare_builds(("a", "b"), REPORT, REPORT)
    assert same.units == () and len(same.warnings) == 1
    assert {change_text(r) for r in same.rows} <= {"+0.0 %", "+0.0", "+0.0000", ""}


def test_the_comparison_as_html() -> None:
    page = comparison_html(compare_builds((HOSTILE, "b"), REPORT, SMALLER))
    found = checked(page)
    assert "Onnx size" in found.charts and "<script>alert" not in page
    assert "−25.0 % better" in page and "−50.0 % worse" in page


def test_short_names_of_folders() -> None:
    assert named(["dist/a/", "dist/b"]) == ("a", "b")
    assert named(["in/one/x86", "in/two/x86"]) == ("one/x86", "two/x86")
    assert named(["x86", "two/x86"]) == ("x86", "two/x86")
    assert named(["in/same", "in/same/"]) == ("same", "same")


def test_compare_at_the_command_line(tmp_path: Path) -> None:
    for name, report in (("a", REPORT), ("b", SMALLER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report.to_json())
    done = tiny.run(tmp_path, "compare", "a", "b", "--json", "--html", "both.html")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["names"] == ["a", "b"]
    assert "Comparison" in (tmp_path / "both.html").read_text()
    missing = tiny.run(tmp_path, "compare", "a", "none")
    assert missing.returncode == 2 and "has no report.json" in missing.stderr
