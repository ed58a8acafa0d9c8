"""The report as JSON and as text."""

import json
from dataclasses import replace

import pytest
from support.reports import BUILT, GROUPS, ORIGINAL, REPORT

from edgepack.report.tables import size_text, table, time_text
from edgepack.report.text import text
from edgepack.results import (
    EQUAL_DB,
    BuildReport,
    Candidate,
    Cause,
    Fidelity,
    GateLine,
    GroupRow,
    Limit,
    finite,
    step_of,
)


def test_the_verdict_and_what_counts_are_in_the_first_line() -> None:
    first = text(REPORT).splitlines()[0]
    assert first == "PASS  net.onnx for x86-cpu: 4.00× smaller, 2.00× as fast, top1 0.9000  (-0.0100)"
    assert text(replace(REPORT, passed=False)).startswith("GATE FAILED  net.onnx")


def test_latencies_of_a_busy_machine_get_a_note() -> None:
    assert "busy" not in text(REPORT)
    disturbed = replace(BUILT, latency_ms_p90=BUILT.latency_ms_p50 * 40)
    last = text(replace(REPORT, models=(ORIGINAL, disturbed))).splitlines()[-1]
    assert last.startswith("the machine was busy (p90 is up to 40 times p50)")


def test_a_model_that_grew_or_has_no_metric() -> None:
    grown = replace(BUILT, size_bytes=5_000_000, speedup=0.8, fidelity=Fidelity(5, None, None, None, None))
    first = text(replace(REPORT, models=(ORIGINAL, grown))).splitlines()[0]
    assert first.endswith("1.25× larger, 0.80× as fast, fidelity equal")


def test_what_was_not_measured_has_a_dash() -> None:
    """A device may report no memory; zero would be a figure."""
    missing = tuple(replace(m, cold_start_ms=None, peak_memory_bytes=None) for m in (ORIGINAL, BUILT))
    report = replace(REPORT, models=missing, waterfall=(step_of(missing[0], "original", None),) * 3)
    lines = [line.split() for line in text(report).splitlines()]
    assert ["cold", "start", "-", "-"] in lines and ["peak", "memory", "-", "-"] in lines
    steps = [line for line in lines if line[:1] == ["original"] and "MB" in line]
    assert len(steps) == 3 and all(line[4:6] == ["-", "4.00"] for line in steps)
    figures = json.loads(report.to_json())["models"][1]
    assert figures["cold_start_ms"] is None and figures["peak_memory_bytes"] is None


def test_columns_are_aligned() -> None:
    lines = text(REPORT).splitlines()
    start = next(i for i, line in enumerate(lines) if "original" in line and "onnx" in line)
    places = {
        line.index(figure) for line, figure in zip(lines[start + 1 :], ["4.00 MB", "4.00 ms"], strict=False)
    }
    assert places == {lines[start].index("original")}
    at = lines.index("candidates")
    candidates = lines[at + 1 : at + 4]
    assert len({line.index("as fast") for line in candidates}) == 1
    assert candidates[0].lstrip().startswith("→ ")


def test_float_groups_are_listed_by_reason() -> None:
    lines = text(REPORT).splitlines()
    at = lines.index("float:")
    assert lines[at + 1 : at + 3] == ["  2 Mul: an input is float", "  1 Conv: an override of the recipe"]
    assert "static: 1 of 2 Conv, 1 of 1 Add" in lines
    reasons = [f"the target's runtime has no integer kernel for {op}" for op in ("Erf", "Pow")]
    summary = "the target's runtime has no integer kernel"
    rows = [
        GroupRow(op, op, "float", reason, 0, cause=Cause.NO_KERNEL, summary=summary)
        for op, reason in zip(("Erf", "Pow"), reasons, strict=True)
    ]
    assert "  1 Erf, 1 Pow: the target's runtime has no integer kernel" in text(
        replace(REPORT, units=tuple(rows))
    )


def test_weak_groups_are_named() -> None:
    lines = text(REPORT).splitlines()
    at = lines.index("groups with the lowest fidelity, and those slower than in float")
    assert lines[at + 1].split() == ["mix", "Add", "25.0", "dB", "10", "→", "31", "µs"]
    assert lines[at + 2].split() == ["stem", "Conv", "28.1", "dB", "900", "→", "300", "µs"]
    assert lines[at + 3] == ""
    only_faint = replace(REPORT, units=(GROUPS[0],))
    assert "groups with the lowest fidelity" in text(only_faint).splitlines()


def test_the_limit_that_failed_is_marked() -> None:
    gate = (
        REPORT.gate[0],
        GateLine(Limit.BYTES, 5e5, 1e6, False),
        GateLine(Limit.AGREEMENT, 0.9, None, False),
    )
    lines = text(replace(REPORT, passed=False, gate=gate)).splitlines()
    failed = [line.split() for line in lines if line.startswith("  FAIL")]
    assert failed[0] == ["FAIL", "bytes", "at", "most", "500,000", "measured", "1,000,000"]
    assert failed[1][-2:] == ["not", "measured"]


def test_empty_parts_have_no_lines() -> None:
    bare = replace(REPORT, gate=(), candidates=(), units=(), runtime={})
    page = text(bare)
    for word in ("gate", "candidates", "float:", "lowest", "kernel"):
        assert word not in page
    assert "\n\n\n" not in page


def test_json_is_complete_and_strict() -> None:
    content = json.loads(REPORT.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(content) == set(BuildReport.__slots__)
    assert content["models"][1]["fidelity"]["sqnr_db"] == 31.26
    assert content["units"][1]["built_us"] == 31.0
    with pytest.raises(ValueError, match="JSON"):
        replace(REPORT, runtime={"x": float("inf")}).to_json()


@pytest.mark.parametrize(
    ("size", "shown"),
    [(999, "999 B"), (1000, "1.00 kB"), (2_508_800_000, "2.51 GB"), (627_660_000, "627.66 MB")],
)
def test_sizes(size: int, shown: str) -> None:
    assert size_text(size) == shown


def test_times() -> None:
    assert time_text(0.0125) == "12.5 µs"
    assert time_text(12.345) == "12.35 ms" or time_text(12.345) == "12.34 ms"
    assert finite(float("nan")) is finite(float("inf")) is finite(None) is None
    assert finite(1.5) == 1.5


def test_tables_do_not_trail() -> None:
    assert table([("a", "bb"), ("ccc", "")]) == ["  a     bb", "  ccc"]
    assert table([("a", "1"), ("b", "100")], right=(1,)) == ["  a     1", "  b   100"]


def test_kernels_that_only_the_host_has_get_a_note() -> None:
    without = replace(REPORT, runtime={**REPORT.runtime, "weighed_without": ["NchwcTransformer"]})
    assert "NchwcTransformer" in text(without).splitlines()[-1]
    assert "NchwcTransformer" not in text(REPORT)


def test_the_gate_names_equal_outputs() -> None:
    line = GateLine(Limit.SQNR_DB, 15.0, EQUAL_DB, True)
    page = text(replace(REPORT, gate=(line,)))
    assert "outputs are equal" in page and "999" not in page


def test_candidates_of_single_groups_that_fail_are_named() -> None:
    failing = [
        Candidate(f"c{i} as static, alone", None, None, None, None, False, "a kernel says no", True)
        for i in range(5)
    ]
    fine = Candidate("static; with c9 float", 1_000_000, 2.0, 31.0, 0.9, False, "", True)
    page = text(replace(REPORT, candidates=(*REPORT.candidates, *failing, fine)))
    assert [f"c{i} as static, alone" in page for i in range(5)] == [True] * 3 + [False] * 2
    assert page.count("a kernel says no") == 3
    assert "and 3 that change single groups, in report.json" in page
