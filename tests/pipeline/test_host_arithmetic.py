"""Builds on a host whose int8 matrix products saturate, for devices whose do not, and the reverse."""

import sys
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from edgepack.benchmark.bench import ColdStart
from edgepack.benchmark.devices.bundle import Job as Runs
from edgepack.calibration.ranges import RangeTable
from edgepack.config.recipe import load_recipe
from edgepack.config.target import Runtime, load_target
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.pipeline.limits import kept_measurements
from edgepack.pipeline.measuring import check_models
from edgepack.pipeline.on_device import Request, bench_device
from edgepack.results import BuildReport
from edgepack.runtime import host
from edgepack.runtime.host import NOTE, ExactRuntime
from edgepack.runtime.runner import Runner, open_model

JUDGED = ("evaluation.check",)
"""Modules that open models to compare their outputs."""
TIMED = ("benchmark.bench", "benchmark.profile")
"""Modules that open models to time them."""


class Sessions:
    """The settings that modules open models with, by module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: dict[str, set[type[Runtime]]] = {}
        for module in (*JUDGED, *TIMED):
            self._watch(monkeypatch, module)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self.kinds[module] = set()

        def opened(path: Path, runtime: Runtime) -> Runner:
            self.kinds[module].add(type(runtime))
            return open_model(path, runtime)

        monkeypatch.setattr(f"edgepack.{module}.open_model", opened)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    return Sessions(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.project(tmp_path / "project", metric="accuracy")


def run(folder: Path, target: str, **changes: Any) -> BuildReport:
    recipe = load_recipe(folder / "edgepack.yaml", {})
    device = load_target(target).model_copy(update=changes)
    return build(Job(recipe, device, folder, "edgepack build"))[0]


@pytest.mark.parametrize(
    ("target", "overflows", "judged"),
    [
        ("x86-cpu", True, ExactRuntime),
        ("x86-cpu", False, Runtime),
        ("x86-avx2", True, Runtime),
        ("x86-avx2", False, Runtime),
    ],
)
def test_outputs_are_judged_as_the_device_computes_and_files_timed_as_they_are(
    target: str,
    overflows: bool,
    judged: type[Runtime],
    folder: Path,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "overflows", lambda: overflows)
    exact_groups: list[bool] = []

    def errors(*_: Any, exact: bool, **__: Any) -> dict[str, float]:
        exact_groups.append(exact)
        return {}

    monkeypatch.setattr("edgepack.benchmark.group_figures.group_errors", errors)
    report = run(folder, target)
    assert all(sessions.kinds[module] == {judged} for module in JUDGED)
    assert all(sessions.kinds[module] == {Runtime} for module in TIMED)
    assert exact_groups == [judged is ExactRuntime]
    assert (NOTE in report.notes) is (judged is ExactRuntime)


def test_figures_of_accuracy_are_the_same_for_onnx_and_ort(
    folder: Path, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The .ort has the host's fused kernels, which session settings cannot change."""
    monkeypatch.setattr(host, "overflows", lambda: True)
    report = run(folder, "x86-cpu", formats=("onnx", "ort"))
    _, onnx, ort = report.models
    assert onnx.fidelity == ort.fidelity
    (pair,) = report.parity
    assert pair.sqnr_db is None, "equal"


def test_groups_are_compared_exactly(
    folder: Path, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any host, with exact arithmetic, every group has the fidelity of eight bits."""
    monkeypatch.setattr(host, "overflows", lambda: True)
    levels = [group.sqnr_db for group in run(folder, "x86-cpu").units]
    assert all(level is not None and 30 < level < 80 for level in levels), levels


@pytest.mark.parametrize(("overflows", "judged"), [(True, ExactRuntime), (False, Runtime)])
def test_check(
    overflows: bool,
    judged: type[Runtime],
    folder: Path,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "overflows", lambda: overflows)
    recipe = load_recipe(folder / "edgepack.yaml", {})
    model = folder / "model.onnx"
    check_models(model, [model], recipe, folder, load_target("x86-cpu"), lambda *_: None)
    assert sessions.kinds["evaluation.check"] == {judged}


def test_measurements_with_other_kernels_are_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))
    recipe = load_recipe(tiny.project(tmp_path / "p", preset="best") / "edgepack.yaml", {})
    table = RangeTable({}, "mse", "model", "samples", 3)
    paths = set()
    for overflows in (False, True):
        monkeypatch.setattr(host, "overflows", lambda found=overflows: found)
        paths.add(kept_measurements(recipe, load_target("x86-cpu"), table).path)
    assert len(paths) == 2


def test_what_a_device_answers_is_compared_with_exact_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "overflows", lambda: True)
    kinds: list[type[Runtime]] = []

    def opened(path: Path, runtime: Runtime) -> Runner:
        kinds.append(type(runtime))
        return open_model(path, runtime)

    monkeypatch.setattr("edgepack.benchmark.devices.bundle.open_model", opened)
    recipe = load_recipe(folder / "edgepack.yaml", {})
    request = Request(
        "local", (folder / "model.onnx",), load_target("x86-cpu"), 1, Runs(runs=2, cold=False), sys.executable
    )
    (row,) = bench_device(request, recipe, folder).models
    assert kinds == [ExactRuntime]
    assert row.exact, "a float model: the same in both"
