"""The gate: each limit and the measured figure."""

import pytest

from edgepack.config.target import Gate
from edgepack.evaluation.gate import judge
from edgepack.results import Fidelity, ModelFigures


def figures(
    name: str,
    *,
    metric: float | None = 0.9,
    sqnr_db: float | None = 30.0,
    agreement: float | None = 0.99,
    size_bytes: int = 1000,
    latency_ms: float = 2.0,
    speedup: float = 2.0,
    checked: bool = True,
) -> ModelFigures:
    fidelity = Fidelity(10, sqnr_db, agreement, metric, "accuracy") if checked else None
    return ModelFigures(
        name, name, size_bytes, latency_ms, latency_ms, latency_ms, speedup, 5.0, 10_000, fidelity
    )


ORIGINAL = figures("original", metric=0.91, size_bytes=4000, latency_ms=4.0, speedup=1.0)
BUILT = figures("onnx")

LIMITS = [
    (Gate(max_metric_drop=0.01), Gate(max_metric_drop=0.009), 0.01),
    (Gate(min_sqnr_db=30), Gate(min_sqnr_db=30.1), 30.0),
    (Gate(min_agreement=0.99), Gate(min_agreement=0.991), 0.99),
    (Gate(max_bytes=1000), Gate(max_bytes=999), 1000),
    (Gate(max_latency_ms=2.0), Gate(max_latency_ms=1.9), 2.0),
    (Gate(min_speedup=2.0), Gate(min_speedup=2.1), 2.0),
]


@pytest.mark.parametrize(("kept", "broken", "measured"), LIMITS, ids=lambda v: str(v)[:24])
def test_each_limit_at_its_bound_and_beyond(kept: Gate, broken: Gate, measured: float) -> None:
    (line,) = judge(kept, [ORIGINAL, BUILT], asked_for=True)
    assert line.passed
    assert line.measured == pytest.approx(measured)
    (line,) = judge(broken, [ORIGINAL, BUILT], asked_for=True)
    assert not line.passed
    assert line.measured == pytest.approx(measured)


def test_no_limits_no_lines() -> None:
    assert judge(Gate(), [ORIGINAL, BUILT], asked_for=True) == ()


def test_the_worst_file_counts() -> None:
    gate = Gate(max_bytes=1500, min_speedup=1.5)
    slow = figures("ort", size_bytes=1600, speedup=1.4)
    size, speed = judge(gate, [ORIGINAL, BUILT, slow], asked_for=True)
    assert (size.measured, size.passed) == (1600, False)
    assert (speed.measured, speed.passed) == (1.4, False)


def test_the_original_is_not_judged() -> None:
    (line,) = judge(Gate(max_bytes=1500), [ORIGINAL, BUILT], asked_for=True)
    assert line.passed


def test_what_the_user_asked_for_and_was_not_measured_fails() -> None:
    unlabelled = figures("onnx", metric=None)
    (line,) = judge(Gate(max_metric_drop=0.01), [ORIGINAL, unlabelled], asked_for=True)
    assert line.measured is None
    assert not line.passed
    assert judge(Gate(max_metric_drop=0.01), [ORIGINAL, unlabelled], asked_for=False) == ()
    one_unchecked = [ORIGINAL, BUILT, figures("ort", checked=False)]
    (line,) = judge(Gate(min_sqnr_db=10), one_unchecked, asked_for=True)
    assert not line.passed


def test_equal_outputs_pass_any_fidelity() -> None:
    (line,) = judge(Gate(min_sqnr_db=200), [ORIGINAL, figures("onnx", sqnr_db=None)], asked_for=True)
    assert line.passed


def test_a_metric_that_rose_passes() -> None:
    (line,) = judge(Gate(max_metric_drop=0), [ORIGINAL, figures("onnx", metric=0.95)], asked_for=True)
    assert line.passed
    assert line.measured == pytest.approx(-0.04)
