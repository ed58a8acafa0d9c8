"""What a candidate costs and what it must keep: a slower one never wins, a limit is a limit."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.onnx_models import parse

from edgepack.benchmark.bench import Ratio
from edgepack.config.target import load_target
from edgepack.evaluation.check import Comparison
from edgepack.ir.files import save_model
from edgepack.ir.scheme import QuantScheme, QuantType
from edgepack.quantization.plan.types import QuantPlan
from edgepack.results import Fidelity
from edgepack.selection import trials
from edgepack.selection.candidates import CandidateName, WholeModel
from edgepack.selection.trials import SAME_SPEED, Cost, Floor, Trial, TrialBench

SCHEME = QuantScheme(QuantType.UINT8, symmetric=False)
PLAN = QuantPlan((), {}, SCHEME, SCHEME)
NAME = CandidateName(WholeModel.STATIC)
ORIGINAL_BYTES = 1_000_000

speedups = st.floats(0.2, 8)
errors = st.floats(0, 0.1)
sizes = st.integers(50_000, 1_200_000)
levels = st.floats(0, 80)


def trial(speedup: float, error: float = 0.0, size: int = 250_000, sqnr_db: float = 30.0) -> Trial:
    compared = Comparison(signal=10 ** (sqnr_db / 10), noise=1.0, samples=1)
    return Trial(NAME, {}, PLAN, Path("candidate.onnx"), size, speedup, error, compared)


def is_slower(candidate: Trial) -> bool:
    """Slower than the original beyond what a repeated measurement may differ by."""
    return candidate.speedup < 1 - SAME_SPEED - 2 * candidate.error


candidates = st.builds(trial, speedups, errors, sizes, levels)


# 0.7 is below 1 - 0.01 - 2 * 0.1, whatever the error.
slower = st.builds(trial, st.floats(0.05, 0.7), errors, sizes, levels)
not_slower = st.builds(trial, st.floats(1, 8), errors, sizes, levels)


@given(slower, not_slower, st.sampled_from(["balance", "speed"]))
def test_what_is_slower_than_the_original_costs_more_than_all_that_is_not(
    slow: Trial, other: Trial, optimize_for: str
) -> None:
    assert is_slower(slow) and not is_slower(other)
    cost = Cost(optimize_for, ORIGINAL_BYTES)
    assert cost(slow) > 1000 * cost(other)


def test_within_its_error_a_candidate_is_not_called_slower() -> None:
    cost = Cost("speed", ORIGINAL_BYTES)
    assert cost(trial(0.95, error=0.05)) < cost(trial(0.95, error=0.01))


@given(candidates, candidates)
def test_for_size_only_bytes_count(one: Trial, other: Trial) -> None:
    cost = Cost("size", ORIGINAL_BYTES)
    assert (cost(one) < cost(other)) == (one.size_bytes < other.size_bytes)


@given(speedups, speedups, sizes, levels)
def test_of_two_alike_the_faster_costs_less(a: float, b: float, size: int, sqnr_db: float) -> None:
    assume(a > b * 1.001)
    for optimize_for in ("balance", "speed"):
        cost = Cost(optimize_for, ORIGINAL_BYTES)
        assert cost(trial(a, 0.0, size, sqnr_db)) < cost(trial(b, 0.0, size, sqnr_db))


@given(st.floats(0.001, 0.2), st.floats(0.3, 1), st.floats(0, 3))
def test_the_metric_may_drop_by_what_the_gate_allows_and_no_more(
    allowed: float, original: float, part: float
) -> None:
    assume(abs(part - 1) > 1e-3)
    floor = Floor(None, None, allowed, original)
    found = Fidelity(100, 20.0, 0.9, original - part * allowed, "top1")
    assert floor.on_metric(found) == (part < 1)
    assert floor.on_evaluation(found) == (part < 1)
    assert floor.lost(found) == pytest.approx(part)


@pytest.fixture
def bench(tmp_path: Path) -> TrialBench:
    save_model(parse("g (float[4] x) => (float[4] y) { y = Relu (x) }"), tmp_path / "original.onnx")
    feeds = [{"x": np.ones(4, np.float32)}]
    return TrialBench(tmp_path / "original.onnx", load_target("x86-cpu"), feeds, tmp_path, set())


@pytest.mark.parametrize(
    ("speedup", "error", "advantage", "confirmed"),
    [
        (1.05, 0.02, 1.0, True),
        (1.02, 0.02, 1.0, False),  # beyond equal speed, but not beyond its error
        (1.005, 0.0, 1.0, False),  # two runs of one file differ by as much
        (0.95, 0.01, 1.2, True),  # slower, and worth it
        (1.10, 0.02, 0.9, False),
    ],
)
def test_a_candidate_is_confirmed_only_beyond_the_error_of_its_ratio(
    bench: TrialBench,
    monkeypatch: pytest.MonkeyPatch,
    speedup: float,
    error: float,
    advantage: float,
    confirmed: bool,
) -> None:
    monkeypatch.setattr(trials, "file_ratios", lambda *_: [Ratio(1.0, 0.0), Ratio(speedup, error)])
    assert bench.confirms(trial(1.0), trial(1.0), advantage) == confirmed
