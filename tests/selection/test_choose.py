"""The choice: the cheapest candidate that keeps every limit, on the probes and on the evaluation data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import onnx_ir as ir
import pytest
from support.onnx_models import parse

from edgepack.config.target import Target, load_target
from edgepack.errors import EdgepackError, ExportError, ModelError, SamplesError
from edgepack.evaluation.check import Comparison
from edgepack.ir.files import save_model
from edgepack.ir.scheme import QuantScheme, QuantType
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.plan.types import GroupPlan, Precision, Precisions, QuantPlan
from edgepack.results import Fidelity
from edgepack.selection.candidates import CandidateName
from edgepack.selection.choose import Choice, choose
from edgepack.selection.leaderboard import Problem
from edgepack.selection.trials import Floor, Trial, TrialBench

SCHEME = QuantScheme(QuantType.UINT8, symmetric=False)
GROUPS = [FusionGroup("conv", "Conv", Role.HEAVY, ("x",), ("y",), weight="w")]
SPEED = {Precision.STATIC: 2.0, Precision.WEIGHT_ONLY: 1.2, Precision.FLOAT: 1.0}
PROBES_DB = {Precision.STATIC: 16.0, Precision.WEIGHT_ONLY: 40.0, Precision.FLOAT: 120.0}
BELOW = "below the least fidelity on the evaluation data"
LOSES = "loses more of the metric than the gate allows"


@dataclass
class Bench:
    """A fake bench with known speeds and dB by candidate."""

    original: Path
    target: Target
    timing: None = None
    constant_db: float = 0.0

    def as_on_device(self, trials: Sequence[Trial]) -> list[Trial]:
        return list(trials)

    def measure(self, name: CandidateName, methods: Precisions, plan: QuantPlan, model: ir.Model) -> Trial:
        method = methods["conv"][0]
        compared = Comparison(signal=10 ** (PROBES_DB[method] / 10), noise=1.0, samples=1)
        return Trial(name, methods, plan, Path(str(method)), 100, SPEED[method], 0.0, compared)

    def confirms(self, trial: Trial, best: Trial, advantage: float = 1.0) -> bool:
        return trial.speedup * advantage > best.speedup


def build(methods: Precisions) -> tuple[QuantPlan, ir.Model]:
    return QuantPlan((GroupPlan(GROUPS[0], *methods["conv"]),), {}, SCHEME, SCHEME), cast(ir.Model, methods)


def chosen(
    folder: Path, floor: Floor, evaluated: Mapping[str, Fidelity] | Callable[[Path], Fidelity]
) -> Choice:
    save_model(parse("g (float[4] x) => (float[4] y) { y = Relu (x) }"), original := folder / "model.onnx")
    bench = cast(TrialBench, Bench(original, load_target("x86-cpu")))

    def verify(path: Path) -> Fidelity:
        return evaluated(path) if callable(evaluated) else evaluated[str(path)]

    return choose(Problem(GROUPS, bench, build, {}, floor, verify, "speed"), method="auto")


def taken(choice: Choice) -> tuple[str, dict[str, str]]:
    return (
        next(c.name for c in choice.candidates if c.chosen),
        {c.name: c.reason for c in choice.candidates if c.reason},
    )


def measured(sqnr_db: float | None, agreement: float = 1.0, metric: float | None = None) -> Fidelity:
    return Fidelity(9, sqnr_db, agreement, metric, None)


def test_the_fastest_that_keeps_the_floor_is_chosen(tmp_path: Path) -> None:
    found = chosen(tmp_path, Floor(15.0, None, None, None), {"static": measured(15.5)})
    assert taken(found) == ("static", {})


@pytest.mark.parametrize(
    "floor, evaluated, reason",
    [
        (Floor(15.0, None, None, None), measured(11.4), BELOW),
        (Floor(None, 0.9, None, None), measured(18.0, 0.8), BELOW),
        (Floor(None, None, 0.01, 0.9), measured(18.0, metric=0.8), LOSES),
    ],
    ids=["dB", "agreement", "metric"],
)
def test_a_candidate_accurate_on_the_probes_only_is_not_chosen(
    tmp_path: Path, floor: Floor, evaluated: Fidelity, reason: str
) -> None:
    found = chosen(tmp_path, floor, {"static": evaluated, "weight_only": measured(39.0, metric=0.9)})
    assert taken(found) == ("weight_only", {"static": reason})


@pytest.mark.parametrize("failure", [ExportError, ModelError])
def test_a_candidate_that_fails_on_the_evaluation_data_is_listed_and_not_chosen(
    tmp_path: Path, failure: type[EdgepackError]
) -> None:
    reason = "sample 7: int8.onnx fails on it: a kernel says no"

    def verify(path: Path) -> Fidelity:
        if str(path) == "static":
            raise failure(reason)
        return measured(39.0)

    found = chosen(tmp_path, Floor(15.0, None, None, None), verify)
    assert taken(found) == ("weight_only", {"static": reason})


def test_where_all_candidates_fail_the_error_has_the_reasons(tmp_path: Path) -> None:
    def verify(path: Path) -> Fidelity:
        raise ExportError(f"{path} fails")

    with pytest.raises(ModelError, match="static: static fails; weight_only: weight_only fails"):
        chosen(tmp_path, Floor(15.0, None, None, None), verify)


def test_bad_samples_do_not_exclude_a_candidate(tmp_path: Path) -> None:
    def verify(path: Path) -> Fidelity:
        raise SamplesError("broken.png: is not a readable image")

    with pytest.raises(SamplesError, match=r"broken\.png"):
        chosen(tmp_path, Floor(15.0, None, None, None), verify)


def test_equal_outputs_keep_every_floor(tmp_path: Path) -> None:
    assert taken(chosen(tmp_path, Floor(15.0, 0.9, None, None), {"static": measured(None)}))[0] == "static"


def test_without_a_limit_evaluation_data_are_not_run(tmp_path: Path) -> None:
    assert taken(chosen(tmp_path, Floor(None, None, 0.01, None), {}))[0] == "static"


STEM = [
    FusionGroup(n, "Conv", Role.HEAVY, ("x",), ("y",), weight="w", kind="Conv") for n in ("a", "b", "c", "d")
]


@dataclass
class StemBench(Bench):
    """Static int8 is 1.2 times as fast as the original, 1.33 times with the first group in float."""

    def measure(self, name: CandidateName, methods: Precisions, plan: QuantPlan, model: ir.Model) -> Trial:
        integer = [m is Precision.STATIC for m, _ in methods.values()]
        speed = 1.2 if all(integer) else 1.33 if all(integer[1:]) else 1.22 if not any(integer) else 1.1
        decibels = 16.0 if any(integer) else 26.0
        compared = Comparison(signal=10 ** (decibels / 10), noise=1.0, samples=1)
        path = Path("integer" if any(integer) else "weights")
        return Trial(name, methods, plan, path, 300, speed, 0.0, compared)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ({"weights": 0.89, "integer": 0.90}, "static, first group in float"),  # the noise costs no metric
        ({"weights": 0.90, "integer": 0.881}, "weight_only"),  # it costs all of the allowed drop
    ],
)
def test_a_static_candidate_near_the_best_is_varied(
    tmp_path: Path, metric: dict[str, float], expected: str
) -> None:
    save_model(parse("g (float[4] x) => (float[4] y) { y = Relu (x) }"), original := tmp_path / "m.onnx")
    bench = cast(TrialBench, StemBench(original, load_target("x86-cpu")))

    def make(methods: Precisions) -> tuple[QuantPlan, ir.Model]:
        plans = tuple(GroupPlan(u, *methods[u.name]) for u in STEM)
        return QuantPlan(plans, {}, SCHEME, SCHEME), cast(ir.Model, methods)

    def verify(path: Path) -> Fidelity:
        return measured(20.0, metric=metric[str(path)])

    floor = Floor(None, None, 0.02, 0.90)
    choice = choose(Problem(STEM, bench, make, {}, floor, verify), method="auto")
    assert taken(choice)[0] == expected


@dataclass
class PickyBench(Bench):
    """A runtime that fails on some candidates."""

    fails: tuple[Precision, ...] = ()

    def measure(self, name: CandidateName, methods: Precisions, plan: QuantPlan, model: ir.Model) -> Trial:
        if methods["conv"][0] in self.fails:
            raise ModelError(f"{name}: cannot be run")
        return super().measure(name, methods, plan, model)


def picky(folder: Path, fails: tuple[Precision, ...], method: str = "auto") -> Choice:
    save_model(parse("g (float[4] x) => (float[4] y) { y = Relu (x) }"), original := folder / "model.onnx")
    bench = cast(TrialBench, PickyBench(original, load_target("x86-cpu"), fails=fails))
    floor = Floor(None, None, None, None)
    problem = Problem(GROUPS, bench, build, {}, floor, lambda _: measured(20.0), "speed")
    return choose(problem, method=method)


def test_a_candidate_that_the_runtime_fails_on_is_listed_and_not_chosen(tmp_path: Path) -> None:
    choice = picky(tmp_path, (Precision.STATIC,))
    assert taken(choice) == ("weight_only", {"static": "static: cannot be run"})
    assert [c.speedup for c in choice.candidates if c.name == "static"] == [None]


def test_no_candidate_runs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="static: cannot be run"):
        picky(tmp_path, tuple(Precision))
    with pytest.raises(ModelError, match="cannot be run"):
        picky(tmp_path, (Precision.STATIC,), "static")
