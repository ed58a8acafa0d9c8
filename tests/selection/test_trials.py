"""The sessions of a trial: one is timed, one is compared with the original."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support import quantizing, tiny
from support.quantizing import Built

from edgepack.benchmark.bench import Ratio
from edgepack.config.target import Runtime, load_target
from edgepack.ir.arrays import Feeds
from edgepack.ir.numerics import sqnr_db
from edgepack.runtime import host
from edgepack.runtime.host import ExactRuntime
from edgepack.runtime.runner import Outputs, Runner, open_model
from edgepack.selection.candidates import CandidateName, WholeModel
from edgepack.selection.trials import TrialBench


class Opened:
    """Settings of all sessions that a trial bench opens, and of those that it times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sessions: list[type[Runtime]] = []
        self.timed: list[type[Runtime]] = []
        self._kinds: dict[int, type[Runtime]] = {}
        self._runners: list[Runner] = []
        monkeypatch.setattr("edgepack.selection.trials.open_model", self._open)
        monkeypatch.setattr("edgepack.selection.trials.quick_ratios", self._time)

    def _open(self, path: Path, runtime: Runtime) -> Runner:
        runner = open_model(path, runtime)
        self._runners.append(runner)  # keeps it alive: ids are reused
        self._kinds[id(runner)] = type(runtime)
        self.sessions.append(type(runtime))
        return runner

    def _time(self, runners: Sequence[Runner], feeds: Sequence[Feeds], rounds: int) -> list[Ratio]:
        self.timed = [self._kinds[id(runner)] for runner in runners]
        return [Ratio(1.0, 0.0), Ratio(2.0, 0.1)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return quantizing.build(tmp_path, tiny.NET.replace("batch", "1"), tiny.weights())


NAME = CandidateName(WholeModel.STATIC)


def bench_of(built: Built, target: str) -> TrialBench:
    folder = built.path.parent
    feeds = [{"x": x} for x in tiny.samples(8, 1)]
    return TrialBench(folder / "float.onnx", load_target(target), feeds, folder, set())


@pytest.mark.parametrize(
    ("target", "overflows", "compared"),
    [("x86-cpu", True, ExactRuntime), ("x86-cpu", False, Runtime), ("x86-avx2", True, Runtime)],
)
def test_the_unchanged_file_is_timed(
    target: str,
    overflows: bool,
    compared: type[Runtime],
    built: Built,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "overflows", lambda: overflows)
    bench = bench_of(built, target)
    bench.measure(NAME, {}, built.plan, built.quantized)
    assert opened.timed == [Runtime, Runtime]
    extra = [compared] if compared is ExactRuntime else []
    assert opened.sessions == [Runtime, Runtime, *extra], "the original, the trial, and no more than needed"
    opened.sessions.clear()
    bench.noise(built.quantized)
    assert opened.sessions == [compared]


def test_the_fidelity_of_a_trial_does_not_depend_on_the_host(built: Built, opened: Opened) -> None:
    bench = bench_of(built, "x86-cpu")
    found = bench.measure(NAME, {}, built.plan, built.quantized).compared.sqnr_db
    assert found == pytest.approx(_exact_db(built, bench.feeds))
    assert 10 * np.log10(1 / bench.noise(built.quantized)) == pytest.approx(_exact_db(built, bench.feeds[:4]))


def _exact_db(built: Built, feeds: Sequence[Feeds]) -> float:
    models = ((built.path.with_name("float.onnx"), Runtime()), (built.path, ExactRuntime()))
    expected, got = ([_flat(open_model(*model).run(feed)) for feed in feeds] for model in models)
    return sqnr_db(expected, got)


def _flat(outputs: Outputs) -> np.ndarray:
    return outputs["y"]
