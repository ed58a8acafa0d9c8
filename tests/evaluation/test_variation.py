"""Fidelity by the varying power: constant parts of outputs are no signal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.onnx_models import Array, f32, parse

from edgepack.benchmark.bench import ColdStart
from edgepack.config.recipe import load_recipe
from edgepack.config.target import Gate, load_target
from edgepack.evaluation.check import Comparison
from edgepack.evaluation.gate import judge, leaves_room
from edgepack.evaluation.variation import varying_power
from edgepack.ir.files import save_model
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.report.text import text
from edgepack.results import BuildReport, Fidelity, finite
from edgepack.selection.trials import Cost, Floor


def outputs(*arrays: Array) -> list[dict[str, Array]]:
    return [{"y": np.asarray(array, np.float32)} for array in arrays]


def compared(reference: list[dict[str, Array]], other: list[dict[str, Array]]) -> Comparison:
    found = Comparison(varying=varying_power(reference))
    for index, (a, b) in enumerate(zip(reference, other, strict=True)):
        found.add(a, b, str(index))
    return found


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_it_is_the_variance_of_each_value(samples: int, rows: int, columns: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(samples, rows, columns)).astype(np.float32)
    expected = samples * float(x.astype(np.float64).var(0, ddof=1).sum())
    assert varying_power(outputs(*x)) == pytest.approx(expected, rel=1e-9)


@given(st.floats(-1000, 1000), st.integers(0, 2**32 - 1))
def test_an_offset_changes_nothing(offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, places = rng.normal(size=(20, 1, 6)), rng.normal(size=(1, 6)) * offset
    assert varying_power(outputs(*(x + places))) == pytest.approx(varying_power(outputs(*x)), rel=1e-2)


def test_outputs_of_a_hundred_and_a_small_signal() -> None:
    rng = np.random.default_rng(0)
    reference = outputs(*(100 + rng.normal(size=(50, 1, 8))))
    mean = np.mean([r["y"] for r in reference], axis=0)
    found = compared(reference, outputs(*[mean] * 50))
    assert found.sqnr_db > 39
    assert abs(found.centred_sqnr_db) < 0.2


def test_sizes_that_differ_share_a_mean_by_what_they_have_in_common() -> None:
    """Text lines of different widths: one mean per letter, over positions and lines."""
    rng = np.random.default_rng(0)
    letters = np.array([5.0, -3.0, 0.0])
    lines = [letters + rng.normal(size=(1, width, 3)) for width in (4, 9, 30, 2)]
    rows = np.concatenate([line[0] for line in lines])
    assert varying_power(outputs(*lines)) == pytest.approx(len(rows) * rows.var(0, ddof=1).sum(), rel=1e-4)
    ranks = outputs(rng.normal(size=(2, 3)), rng.normal(size=6))
    every = np.concatenate([o["y"].ravel() for o in ranks]).astype(np.float64)
    assert varying_power(ranks) == pytest.approx(every.size * every.var(ddof=1), rel=1e-6)


def test_one_sample_is_taken_by_its_rows_or_by_its_values() -> None:
    rows = np.random.default_rng(0).normal(size=(16, 3))
    assert varying_power(outputs(rows)) == pytest.approx(16 * rows.var(0, ddof=1).sum(), rel=1e-5)
    assert varying_power(outputs(rows[:1])) == pytest.approx(3 * rows[0].var(ddof=1), rel=1e-5)
    assert varying_power(outputs(f32(2.0))) == 4.0


def test_outputs_that_do_not_vary() -> None:
    """Compared with their whole power where none varies; beside others they are no signal."""
    still = outputs(*[f32([[3, 4]])] * 5)
    assert varying_power(still) == pytest.approx(125)
    assert compared(still, still).centred_sqnr_db == np.inf
    moving = [{**o, "z": f32([i])} for i, o in enumerate(still)]
    assert varying_power(moving) == pytest.approx(5 * np.var(range(5), ddof=1))
    silent = outputs(*[f32([[0, 0]])] * 5)
    assert varying_power(silent) == 0
    noisy = compared(silent, still).fidelity()
    assert noisy.sqnr_db == noisy.centred_sqnr_db == -999.0
    assert varying_power([]) == 0


def test_rounding_of_float32_is_no_signal() -> None:
    nearly = np.nextafter(f32([100.0] * 4), f32(200))
    assert varying_power(outputs(f32([100.0] * 4), nearly)) == pytest.approx(80_000, rel=1e-5)


def test_infinite_values_are_left_out() -> None:
    reference = outputs(*(f32([number, -np.inf]) for number in (1, 3, 2)))
    assert varying_power(reference) == pytest.approx(3.0)
    assert finite(float("inf")) is finite(float("nan")) is None


def test_the_gate_and_the_floor_have_a_limit_on_it() -> None:
    found = Fidelity(9, 40.0, 1.0, None, None, 14.0)
    assert Floor(None, None, None, None, 14.0).on_evaluation(found)
    assert not Floor(None, None, None, None, 14.1).on_evaluation(found)
    assert Floor(None, None, None, None, 14.1).limits_anything
    assert Floor(20.0, None, None, None, 15.0).least_db(10.0) == 25.0
    assert Floor(20.0, None, None, None).least_db(10.0) == 20.0
    assert Floor(None, 0.5, None, None).least_db(10.0) is None
    assert leaves_room(Gate(min_centred_sqnr_db=11), found, found)
    assert not leaves_room(Gate(min_centred_sqnr_db=11.1), found, found)


def test_noise_is_compared_with_the_varying_power() -> None:
    assert Cost("balance", 1, 20.0).of_noise(45.0) == Cost("balance", 1).of_noise(25.0)


# --- whole builds ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))


def built(folder: Path, *, more: dict[str, Array], **recipe: Any) -> BuildReport:
    """The tiny project with other weights, without a metric."""
    tiny.project(folder, gate=None, **recipe)
    save_model(parse(tiny.NET, weights={**tiny.weights(), **more}), folder / "model.onnx")
    job = Job(load_recipe(folder / "edgepack.yaml", {}), load_target("x86-cpu"), folder, "edgepack build")
    return build(job)[0]


THOUSAND = {"b1": tiny.weights()["b1"] + f32(1000)}
"""Activations of 1,000 and a signal of 1, on 255 steps."""


def test_a_large_offset_no_longer_passes(tmp_path: Path) -> None:
    """No varying signal is left, at an SQNR of more than 50 dB."""
    report = built(tmp_path / "p", more=THOUSAND)
    found = report.models[1].fidelity
    assert found is not None and found.sqnr_db is not None and found.centred_sqnr_db is not None
    assert found.sqnr_db > 50
    assert found.centred_sqnr_db < 6
    assert not report.passed
    (line,) = [line for line in report.gate if "of what varies" in line.limit]
    assert (line.bound, line.measured) == (15.0, found.centred_sqnr_db)
    assert f"{found.centred_sqnr_db:.1f} dB" in text(report)


def test_a_build_with_method_auto_finds_a_candidate_that_keeps_the_signal(tmp_path: Path) -> None:
    report = built(tmp_path / "p", more=THOUSAND, quantize={"method": "auto"})
    assert report.passed
    assert next(c.name for c in report.candidates if c.chosen) != "static"


STILL = tiny.NET.replace(
    "y = Gemm <transB = 1> (r, w2, b2)", "g = Gemm <transB = 1> (r, w2, b2) y = Add (g, c)"
)


def test_outputs_that_never_vary_pass(tmp_path: Path) -> None:
    more = {"w2": np.zeros_like(tiny.weights()["w2"]), "b2": f32([1, 2, 3, 4])}
    report = built(tmp_path / "p", more=more)
    assert report.passed
    assert judge(Gate(min_centred_sqnr_db=15), report.models, asked_for=True)[0].passed
