"""Speed ratios: of the first model, larger for a faster one, wherever they are taken."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.benchmark import bench
from edgepack.benchmark.bench import Ratio, Rounds
from edgepack.config.target import Runtime

SECONDS = [0.004, 0.002, 0.008]
"""The first model, one twice as fast, one half as fast."""
FILES = [Path("original.onnx"), Path("fast.onnx"), Path("slow.onnx")]


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    best = np.tile(np.asarray(SECONDS), (12, 1))
    rounds = Rounds(best, tuple(best.T))
    monkeypatch.setattr(bench, "_measure_files", lambda *args, **more: rounds)
    monkeypatch.setattr(bench, "measure", lambda *args, **more: rounds)
    start = SimpleNamespace(milliseconds=1.0, memory_bytes=1)
    monkeypatch.setattr(bench, "cold_start", lambda *args: start)


def of_files() -> list[Ratio]:
    return bench.file_ratios(FILES, Runtime(), [], 12)


def of_runners() -> list[Ratio]:
    return bench.quick_ratios([], [], 12)


def of_bench() -> list[Ratio]:
    models = {path.stem: path for path in FILES}
    found = bench.bench(models, Runtime(), [{}], warmup=0, runs=12)
    return [Ratio(latency.speedup, latency.speedup_error or 0.0) for latency in found.values()]


@pytest.mark.usefixtures("known_times")
@pytest.mark.parametrize("ratios", [of_files, of_runners, of_bench])
def test_a_faster_model_has_the_larger_ratio(ratios: Callable[[], list[Ratio]]) -> None:
    assert [r.speedup for r in ratios()] == pytest.approx([1.0, 2.0, 0.5])
    assert [r.standard_error for r in ratios()] == pytest.approx([0, 0, 0])


@given(st.floats(0.01, 10), st.floats(0.001, 0.2), st.integers(12, 60))
def test_the_error_of_a_ratio_grows_with_its_spread(speedup: float, spread: float, rounds: int) -> None:
    noise = 1 + spread * np.where(np.arange(rounds) % 2, 1, -1)
    found, wider = (bench._ratio(speedup * values) for values in (noise, 1 + 3 * (noise - 1)))
    assert 0 < found.standard_error < wider.standard_error
    assert abs(found.speedup - speedup) <= spread * speedup * 1.001
