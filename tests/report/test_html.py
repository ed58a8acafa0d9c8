"""The HTML report: it has the whole report, names of a model never become markup, nothing is fetched."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pages import HOSTILE, Checker, checked
from support.reports import BUILT, REPORT

from edgepack.calibration.histogram import Histogram, StreamingHistogram
from edgepack.calibration.ranges import Range, RangeTable, load_ranges
from edgepack.errors import ConfigError
from edgepack.report.html.charts import Bar, Point, bars, dots, log_ticks, scatter, ticks
from edgepack.report.html.layers import MOST_HISTOGRAM_BYTES
from edgepack.report.html.markup import Html, join, tag
from edgepack.report.html.reading import read_report
from edgepack.report.html.render import report_html, write_html
from edgepack.results import (
    SCHEMA_VERSION,
    BuildReport,
    Curve,
    Fidelity,
    GroupRow,
    Parity,
    Refusal,
    StageReport,
    Step,
)

TABLE = RangeTable(
    {
        "whole": Range(-1.0, 1.0, -1.0, 1.0, Histogram(-1, -2, (1, 5, 7, 2))),
        HOSTILE: Range(0.0, 2.0, 0.0, 8.0, Histogram(0, 0, (100, 30, 0, 0, 0, 0, 0, 1))),
        "bare": Range(0.0, 1.0, 0.0, 1.0),
    },
    "mse", "f" * 64, "e" * 64, 100,
)  # fmt: skip
STEPS = (
    Step("original", 4_000_000, 3_000_000, 9_000_000, 4.0, 1.0, None, 1.0, 0.91),
    Step(
        "prune", 4_000_000, 2_000_000, 9_000_000, 4.0, 1.0, 30.0, 0.99, 0.905, ("half of 9 weights are zero",)
    ),
    Step("quantized", 1_000_000, 700_000, 5_000_000, 2.0, 2.0, 25.0, 0.98, 0.9),
)


CURVE = Curve((5, 10, 15), (0.5, 0.25, 0.2), (10, 15), (0.3, 0.31), 10)


def test_the_whole_report_is_on_the_page() -> None:
    report = replace(
        REPORT,
        waterfall=STEPS,
        models=(*REPORT.models, replace(BUILT, name="ort", file="model.ort")),
        parity=(Parity("ort", "onnx", 41.2, 0.9987),),
        refused=(Refusal("tflite", "model.tflite", "node 'x' (Erf) is not supported"),),
    )
    page = report_html(report, TABLE)
    found = checked(page)
    assert {"Bytes on disk", "Latency, median", "Top1", "Histogram", "Parity"} <= set(found.charts)
    assert {"Fidelity of each group over its time", "Groups", "Time of each stage"} <= set(found.charts)
    for expected in (
        "Pass", "4.00× smaller", "2.00× as fast", "−0.0100", "metric drop at most",
        "half of 9 weights are zero",
        "an override of the recipe", "node 'x' (Erf) is not supported", "41.2 dB · 0.9987",
        "Some CPU", "edgepack build",
        "1 of 3 tensors have no histogram here",
    ):  # fmt: skip
        assert expected in page, expected
    assert page.index("Pass") < page.index("metric drop at most") < page.index("Bytes on disk")


def test_what_was_not_measured_has_a_dash(tmp_path: Path) -> None:
    assert "Peak memory" in checked(report_html(REPORT, None)).charts
    missing = tuple(replace(m, cold_start_ms=None, peak_memory_bytes=None) for m in REPORT.models)
    report = replace(REPORT, models=missing)
    page = report_html(report, None)
    dash = '<td class="num">–</td>'
    assert page.count(dash) == report_html(REPORT, None).count(dash) + 4
    assert "Peak memory" not in checked(page).charts
    (tmp_path / "report.json").write_text(report.to_json())
    assert read_report(tmp_path) == report
    one = replace(REPORT, models=(REPORT.models[0], missing[1]))
    assert "Peak memory" in checked(report_html(one, None)).charts


def test_a_gate_that_is_not_met_comes_first() -> None:
    page = report_html(replace(REPORT, passed=False), None)
    assert "Gate failed" in page.partition("<main>")[0]
    assert "Histogram" not in checked(page).charts


def test_the_filter_of_the_groups_finds_its_table() -> None:
    page = report_html(REPORT, TABLE)
    (name,) = re.findall(r'data-filter="([^"]+)"', page)
    (table,) = [kinds.split() for kinds in re.findall(r'<table class="([^"]+)"', page) if name in kinds]
    assert {name, "sortable"} <= set(table)


def test_names_of_a_model_are_never_markup() -> None:
    group = GroupRow(HOSTILE, HOSTILE, "float", HOSTILE, 1, 20.0, 1.0, 1.0)
    page = report_html(replace(REPORT, model=HOSTILE, command=HOSTILE, units=(group,)), TABLE)
    clean = report_html(REPORT, TABLE)
    assert checked(page).scripts == checked(clean).scripts == 2
    assert "<script>alert" not in page


def test_a_report_with_few_figures_is_valid_html() -> None:
    bare = replace(
        REPORT,
        units=(),
        candidates=(),
        gate=(),
        stages=(),
        models=(REPORT.models[0], replace(BUILT, fidelity=None)),
    )
    checked(report_html(bare, None))
    unmeasured = tuple(replace(u, sqnr_db=None, built_us=None, float_us=None) for u in REPORT.units)
    assert "were not measured one by one" in report_html(replace(bare, units=unmeasured), None)
    equal = replace(BUILT, fidelity=Fidelity(3, None, None, None, None))
    checked(report_html(replace(bare, models=(REPORT.models[0], equal)), RangeTable({}, "mse", "", "", 0)))


def test_a_page_of_a_very_large_model_stays_below_6_mb() -> None:
    counts = Histogram(-3, 0, tuple(range(10_000_000, 10_000_128)))
    many = {
        f"/model/layers.{i}/mlp/act/Mul_output_0": Range(0.0, 9.0, 0.0, 10.0, counts) for i in range(4000)
    }
    units = tuple(
        GroupRow(
            f"/model/layers.{i}/mlp/up_proj/MatMul", "MatMul", "static", "", 10**7, 30.0, 10.0 + i, 5.0 + i
        )
        for i in range(4000)
    )
    page = report_html(replace(REPORT, units=units), RangeTable(many, "mse", "f", "e", 100))
    assert MOST_HISTOGRAM_BYTES < len(page.encode()) < 6_000_000
    assert re.search(r"\d+ of 4000 tensors have no histogram here", page)


def test_the_html_is_written_again_from_the_files_of_a_package(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(REPORT.to_json())
    TABLE.save(tmp_path / "ranges.json")
    assert asdict(read_report(tmp_path)) == asdict(REPORT)
    assert write_html(tmp_path).read_text() == report_html(REPORT, TABLE)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ranges.json", "report.html", "report.json"]
    (tmp_path / "ranges.json").unlink()
    assert write_html(tmp_path).read_text() == report_html(REPORT, None)


def test_a_broken_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no report\.json; give the folder of a finished build"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_report(tmp_path)
    broken = json.loads(REPORT.to_json())
    broken["models"][1]["size_bytes"] = "many"
    (tmp_path / "report.json").write_text(json.dumps(broken))
    with pytest.raises(
        ConfigError, match=r"is no report of this edgepack version \(models\.1\.size_bytes: .*\); build again"
    ):
        read_report(tmp_path)


def test_the_schema_version_comes_first_in_a_report() -> None:
    assert next(iter(json.loads(REPORT.to_json()).items())) == ("schema_version", SCHEMA_VERSION)


def test_a_report_without_a_schema_version_is_read_as_version_1(tmp_path: Path) -> None:
    content = json.loads(REPORT.to_json())
    del content["schema_version"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert asdict(read_report(tmp_path)) == {**asdict(REPORT), "schema_version": 1}


def test_a_newer_report_is_refused_even_where_its_fields_would_fit(tmp_path: Path) -> None:
    content = {**json.loads(REPORT.to_json()), "edgepack_version": "9.0.0", "new": 1}
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert read_report(tmp_path).edgepack_version == "9.0.0", "a new field alone is no new schema"
    (tmp_path / "report.json").write_text(json.dumps({**content, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(
        ConfigError, match=rf"schema version {SCHEMA_VERSION + 1}, .* edgepack 9\.0\.0; .*: update edgepack"
    ):
        read_report(tmp_path)


def test_escaping_and_attributes() -> None:
    assert tag(
        "p", "a < b", Html("<br>"), None, ["x", "&"], class_="c", data_tip='"', hidden=True, lang=None
    ) == ('<p class="c" data-tip="&quot;" hidden>a &lt; b<br>x&amp;</p>')
    assert join(tag("line", x1=0.5)) == '<line x1="0.5"/>'


def test_each_training_has_its_curves() -> None:
    stages = (
        *REPORT.stages,
        StageReport("tune", 3.0, ("15 steps",), CURVE),
        StageReport("tune int8", 3.0, (), replace(CURVE, judged_steps=(), judged_losses=())),
    )
    page = report_html(replace(REPORT, stages=stages), None)
    checked = Checker(page)
    assert {"Loss of tune", "Loss of tune int8"} <= set(checked.charts)
    assert page.count('class="curve solid"') == 2 and page.count('class="curve dashed"') == 1
    assert "the weights of step 10 were kept" in page
    for points in re.findall(r'points="([^"]*)"', page):
        assert all(0 <= float(part) <= 100 for point in points.split() for part in point.split(","))
    assert "Training" not in report_html(REPORT, None)


@pytest.mark.parametrize("losses", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 2.0)])
def test_any_losses_are_drawn_or_left_out(losses: tuple[float, float, float]) -> None:
    curve = replace(CURVE, losses=losses, judged_steps=(), judged_losses=())
    page = report_html(replace(REPORT, stages=(StageReport("tune", 1.0, (), curve),)), None)
    assert page.count("<polyline") == int(any(losses))


def test_bars_show_the_reduction_by_a_step() -> None:
    drawn = bars("Bytes", [Bar("a", 200.0, "200 B"), Bar("b", 50.0, "50 B", before=200.0)], better="")
    assert re.findall(r'class="(\w+)" style="width:([\d.]+)%"', drawn) == [
        ("bar", "100.00"), ("bar", "25.00"), ("ghost", "75.00")
    ]  # fmt: skip
    assert "style" not in bars("Bytes", [Bar("a", None, "–")], better="")


def test_dots_of_equal_values_and_a_limit() -> None:
    drawn = dots("Metric", [Bar("a", 0.9, ""), Bar("b", None, "–")], better="", limit=0.9)
    assert re.findall(r"left:([\d.]+)%", drawn) == ["50.00"] * 3  # the limit in either row


def test_a_scatter_puts_every_point_inside() -> None:
    points = [Point(10.0**k, 10.0 * k, "static", str(k)) for k in range(-3, 4)]
    drawn = scatter("s", points, "x", "y")
    places = [float(p) for p in re.findall(r'<svg x="([\d.]+)%"', drawn)]
    assert places == sorted(places) and places[0] > 0 and places[-1] < 100
    assert scatter("one", points[:1], "x", "y").count("data-tip") == 1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    found = ticks(low, low + span)
    slack = span * 1e-6 + abs(low) * 1e-12
    assert len(found) <= 7
    assert all(low - slack <= x <= low + span + slack for x in found)


@given(st.floats(-6, 6), st.floats(0.01, 12))
def test_logarithmic_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    found = log_ticks(low, low + span)
    assert len(found) <= 6
    assert all(low <= np.log10(x) <= low + span for x in found)


NOT_TINY = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
"""A histogram does not keep the sign of values that are 2¹⁴⁹ times smaller than a bin."""


@given(st.lists(NOT_TINY, min_size=1, max_size=300), st.integers(2, 40))
def test_a_coarse_histogram_counts_all_values_in_their_bins(values: list[float], most: int) -> None:
    x = np.array(values, np.float32)
    stream = StreamingHistogram(256)
    stream.add(x, float(x.min()), float(x.max()))
    found = stream.coarse(most)
    assert found is not None and sum(found.counts) == len(values)
    assert len(found.counts) <= most
    assert found.counts[0] and found.counts[-1]
    width = 2.0**found.exponent
    assert found.first * width <= x.min() and x.max() < (found.first + len(found.counts)) * width


def test_nothing_counted_has_no_coarse_histogram(tmp_path: Path) -> None:
    assert StreamingHistogram(256).coarse() is None
    TABLE.save(tmp_path / "ranges.json")
    assert load_ranges(tmp_path / "ranges.json") == TABLE
    assert len((tmp_path / "ranges.json").read_text().splitlines()) < 15


def test_reports_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Later fields have defaults and unknown fields are ignored."""
    content = json.loads(REPORT.to_json())
    content["of_a_later_version"] = 1
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert isinstance(read_report(tmp_path), BuildReport)
