"""The search: noisy and slow groups go to float, and no measurement is repeated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx_ir as ir
import pytest
from support import tiny
from support.onnx_models import parse

from edgepack.benchmark.bench import Ratio
from edgepack.calibration.ranges import RangeTable
from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.errors import EdgepackError, ExportError, ModelError
from edgepack.evaluation.check import Comparison
from edgepack.ir.files import save_model
from edgepack.ir.scheme import QuantScheme, QuantType
from edgepack.pipeline.limits import kept_measurements
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.plan.types import GroupPlan, Precision, Precisions, QuantPlan, Request
from edgepack.results import Cause, Reason
from edgepack.selection.candidates import CandidateName, WholeModel
from edgepack.selection.history import Measurements
from edgepack.selection.leaderboard import Leaderboard
from edgepack.selection.search import Task, search
from edgepack.selection.trials import RUN, Cost, Trial, TrialBench, trial_db

STATIC, WEIGHT_ONLY, FLOAT = Precision.STATIC, Precision.WEIGHT_ONLY, Precision.FLOAT
SCHEME = QuantScheme(QuantType.UINT8, symmetric=False)
NAMES = [f"c{i}" for i in range(8)]
GROUPS = [
    FusionGroup(name, "Conv", Role.HEAVY, (f"v{i}",), (f"v{i + 1}",), weight=f"w{i}")
    for i, name in enumerate(NAMES)
]


@dataclass
class World:
    """A fake bench with known times and noise of eight convolutions in a row."""

    noise_of: Mapping[str, float]
    static_us: Mapping[str, float]
    kept: Measurements = field(default_factory=Measurements)
    built: list[Precisions] = field(default_factory=list)
    float_us: float = 100.0
    now: float = 0.0
    """Seconds on the machine's clock: each measurement takes ``takes`` of them."""
    takes: float = 0.0
    timed: list[Trial] = field(default_factory=list)
    unlike_db: float = 0.0
    """How much noisier candidates are on the evaluation data than on the probes."""
    broken: str = ""
    """The group that the runtime fails to run where it alone is int8."""
    refused: list[tuple[str, str]] = field(default_factory=list)

    def build(self, methods: Precisions) -> tuple[QuantPlan, ir.Model]:
        groups = tuple(GroupPlan(u, methods[u.name][0], methods[u.name][1]) for u in GROUPS)
        self.built.append(methods)
        return QuantPlan(groups, {}, SCHEME, SCHEME), cast(ir.Model, methods)

    def noise(self, model: ir.Model) -> float:
        methods = cast(Precisions, model)
        self.now += self.takes
        if self.broken and [n for n in NAMES if methods[n][0] is STATIC] == [self.broken]:
            raise ModelError("a kernel says no")
        return sum(self.noise_of[n] for n in NAMES if methods[n][0] is STATIC)

    def refuse(self, name: str, error: EdgepackError, *, of_units: bool) -> None:
        self.refused.append((name, str(error)))

    def run_us(self, methods: Precisions) -> float:
        return sum(self.static_us[n] if methods[n][0] is STATIC else self.float_us for n in NAMES)

    def attempt(self, name: CandidateName, methods: Precisions) -> Trial:
        plan, model = self.build(methods)
        compared = Comparison(signal=1.0, noise=self.noise(model), samples=1)
        speedup = self.float_us * len(NAMES) / self.run_us(methods)
        trial = Trial(name, methods, plan, Path(str(name)), 100, speedup, 0.0, compared)
        self.timed.append(trial)
        return trial

    def evaluated_db(self, model: ir.Model) -> float:
        noise = sum(self.noise_of[n] for n in NAMES if cast(Precisions, model)[n][0] is STATIC)
        return trial_db(noise) - self.unlike_db

    def group_us(self, trial: Trial, groups: Sequence[FusionGroup]) -> dict[str, float]:
        times = {n: self.static_us[n] if trial.methods[n][0] is STATIC else self.float_us for n in NAMES}
        return {**times, RUN: sum(times.values())}

    def confirms(self, trial: Trial, best: Trial, advantage: float = 1.0) -> bool:
        return trial.speedup / best.speedup * advantage > 1.01


def look(
    world: World, *, least_db: float = 0.0, improves: bool = True, fixed: Precisions | None = None
) -> Trial:
    return searched(world, Task(60, improves, {}), least_db=least_db, fixed=fixed)[0]


def searched(
    world: World,
    task: Task,
    *,
    least_db: float = 0.0,
    fixed: Precisions | None = None,
    keeps: Callable[[ir.Model], bool] | None = None,
) -> tuple[Trial, int, tuple[str, ...]]:
    """The candidate found, how many groups were measured alone, and the notes."""
    every = {
        m: world.attempt(CandidateName(WholeModel(m)), dict.fromkeys(NAMES, Request(m)))
        for m in (STATIC, WEIGHT_ONLY, FLOAT)
    }
    trials = list(every.values())

    def accurate(trial: Trial) -> bool:
        return world.evaluated_db(cast(ir.Model, trial.methods)) >= least_db

    def keeps_all(model: ir.Model) -> bool:
        return world.evaluated_db(model) >= least_db

    cost = Cost("balance", 100)
    best = min((t for t in trials if accurate(t)), key=cost)
    board = SimpleNamespace(
        problem=SimpleNamespace(groups=GROUPS, build=world.build, fixed=fixed or {}),
        bench=world, trials=trials, cost=cost, least_db=least_db, attempt=world.attempt,
        accurate=accurate, keeps=keeps or keeps_all, refuse=world.refuse,
    )  # fmt: skip
    found, rows, notes = search(cast(Leaderboard, board), best, task)
    assert {r.name for r in rows} <= set(NAMES)
    return found, len(rows), notes


def groups_in(trial: Trial, wanted: Precision) -> set[str]:
    return {name for name, (method, _) in trial.methods.items() if method is wanted}


QUIET = dict.fromkeys(NAMES, 1e-6)
FAST = dict.fromkeys(NAMES, 40.0)


def test_groups_that_are_slower_in_int8_go_to_float() -> None:
    found = look(World(QUIET, FAST | {"c3": 160.0, "c5": 130.0}))
    assert groups_in(found, STATIC) == set(NAMES) - {"c3", "c5"}


def test_a_noisy_group_that_is_cheap_in_float_goes_to_float() -> None:
    found = look(World(QUIET | {"c6": 0.05}, FAST | {"c6": 99.0}))
    assert groups_in(found, STATIC) == set(NAMES) - {"c6"}


def test_a_noisy_group_that_is_expensive_in_float_stays_int8() -> None:
    found = look(World(QUIET | {"c6": 0.002}, FAST | {"c6": 20.0}))
    assert groups_in(found, STATIC) == set(NAMES)


@pytest.mark.parametrize("improves", [True, False])
def test_a_candidate_that_is_too_noisy_is_repaired_with_few_groups(improves: bool) -> None:
    world = World(QUIET | {"c1": 0.5, "c4": 0.2, "c7": 0.001}, FAST)
    found = look(world, least_db=25.0, improves=improves)
    assert groups_in(found, STATIC) == set(NAMES) - {"c1", "c4"}
    assert found.methods["c1"].reason.text == "too noisy as static"


def test_candidates_accurate_on_the_probes_only_are_not_timed() -> None:
    noise = QUIET | {"c1": 0.5, "c4": 0.002, "c5": 0.002, "c7": 0.001}
    world = World(noise, FAST, unlike_db=4.0)
    found = look(world, least_db=25.0, improves=False)
    assert groups_in(found, STATIC) == set(NAMES) - {"c1", "c4", "c5"}
    inaccurate = [str(t.name) for t in world.timed if world.evaluated_db(cast(ir.Model, t.methods)) < 25.0]
    assert inaccurate == ["static"]


def test_precisions_that_the_recipe_sets_stay() -> None:
    world = World(QUIET, FAST | {"c3": 160.0})
    assert "c3" in groups_in(
        look(world, fixed={"c3": Request(STATIC, Reason(Cause.REQUEST, "the recipe says so"))}), STATIC
    )


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> World:
    """A bench with much to improve, where each measurement takes four seconds."""
    slow = {name: 40.0 if i % 2 else 130.0 + i for i, name in enumerate(NAMES)}
    world = World(QUIET, slow, takes=4.0)
    monkeypatch.setattr("edgepack.selection.search.time", SimpleNamespace(monotonic=lambda: world.now))
    return world


@pytest.mark.parametrize("budget_s", [10.0, 30.0, 50.0])
def test_a_search_ends_one_measurement_after_its_budget_at_the_latest(
    clocked: World, budget_s: float
) -> None:
    found, measured, notes = searched(clocked, Task(budget_s, True, {}))
    trials_took = 3 * clocked.takes
    assert clocked.now - trials_took <= budget_s + clocked.takes
    assert 0 < measured < 2 * len(NAMES)
    assert notes[0] == f"{measured} groups measured alone, {2 * len(NAMES) - measured} not"
    assert notes[1] == f"stopped by the budget of {budget_s:g} s"
    assert found.speedup >= 1.0


def test_remaining_time_goes_to_groups_not_measured_yet(clocked: World) -> None:
    _, measured, notes = searched(clocked, Task(120, True, {}))
    assert measured == 2 * len(NAMES), "half of the budget is not enough for them"
    assert notes == (f"{measured} groups measured alone",)


def test_a_repaired_group_goes_to_weight_only_though_that_was_not_measured(clocked: World) -> None:
    clocked.noise_of, clocked.static_us = QUIET | {"c1": 0.5, "c4": 0.2}, FAST
    found, measured, _ = searched(clocked, Task(60, False, {}), least_db=25.0)
    assert measured == len(NAMES), "time is for groups as static alone"
    assert groups_in(found, WEIGHT_ONLY) == {"c1", "c4"}


def test_more_time_finds_a_candidate_at_least_as_fast(clocked: World) -> None:
    speedups = []
    for budget_s in (4.0, 40.0, 400.0):
        clocked.now = 0.0
        speedups.append(searched(clocked, Task(budget_s, True, {}))[0].speedup)
    assert speedups == sorted(speedups)
    assert speedups[-1] > speedups[0]


def test_progress_shows_the_step_and_the_seconds_spent(clocked: World) -> None:
    steps: list[tuple[str, int, int]] = []
    searched(clocked, Task(90, True, {}, lambda *line: steps.append(line)))
    assert [what for what, _, _ in steps[: len(NAMES)]] == [f"group {name} alone" for name in NAMES]
    assert steps[-1][0] == "search"
    spent = [done for _, done, _ in steps]
    assert spent == sorted(spent)
    assert {total for _, _, total in steps} == {90}
    assert max(spent) <= 90


@pytest.mark.parametrize("least_db", [0.0, 25.0])
def test_equal_measurements_give_equal_results_in_the_same_steps(least_db: float) -> None:
    noise = QUIET | {"c1": 0.02, "c4": 0.02, "c7": 0.001}
    # With groups of equal time and noise too: the result must not depend on the order of a set.
    worlds = [World(noise, FAST | {"c2": 130.0, "c3": 130.0}) for _ in range(2)]
    found = [look(world, least_db=least_db) for world in worlds]
    assert found[0].methods == found[1].methods
    assert worlds[0].built == worlds[1].built


def test_a_group_that_fails_alone_is_listed_once_and_the_search_continues() -> None:
    world = World(QUIET, FAST | {"c5": 160.0}, broken="c3")
    found, measured, notes = searched(world, Task(60, True, {}))
    assert world.refused == [("c3 as static, alone", "a kernel says no")]
    assert measured == 2 * len(NAMES) - 1
    assert notes == (f"{measured} groups measured alone",)
    assert groups_in(found, STATIC) == set(NAMES) - {"c5"}


@pytest.mark.parametrize("failure", [ModelError, ExportError])
def test_a_repair_that_fails_on_the_evaluation_data_is_listed(failure: type[EdgepackError]) -> None:
    world = World(QUIET | {"c1": 0.5, "c4": 0.2}, FAST)
    asked: list[set[str]] = []

    def keeps(model: ir.Model) -> bool:
        methods = cast(Precisions, model)
        asked.append({name for name in NAMES if methods[name][0] is STATIC})
        if len(asked) == 1:
            raise failure("sample 7: a kernel says no")
        return world.evaluated_db(model) >= 25.0

    found, _, _ = searched(world, Task(60, False, {}), least_db=25.0, keeps=keeps)
    assert len(asked) > 1
    ((name, reason),) = world.refused
    assert reason == "sample 7: a kernel says no"
    assert name.startswith("static; with c1 ")
    assert groups_in(found, WEIGHT_ONLY) >= {"c1", "c4"}


NAME = CandidateName(WholeModel.STATIC)
NOTHING = QuantPlan((), {}, SCHEME, SCHEME)
RELU = "g (float[4] x) => (float[4] y) { y = Relu (x) }"
MODELS = [RELU, RELU.replace("Relu (x)", "Abs (x)"), RELU.replace("Relu (x)", "Identity (x)")]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Speeds that were measured, by a fake timer."""
    speeds: list[float] = []

    def ratios(runners: object, feeds: object, rounds: int) -> list[Ratio]:
        if len(speeds) == 2:
            raise KeyboardInterrupt
        speeds.append(1.5 + len(speeds))
        return [Ratio(1.0, 0.0), Ratio(speeds[-1], 0.1)]

    monkeypatch.setattr("edgepack.selection.trials.quick_ratios", ratios)
    return speeds


def bench_of(folder: Path) -> TrialBench:
    folder.mkdir()
    save_model(parse(RELU), folder / "original.onnx")
    feeds = [{"x": np.asarray([-1, 1, 2, 3], np.float32)}]
    kept = Measurements(folder.parent / "kept.jsonl")
    return TrialBench(folder / "original.onnx", load_target("x86-cpu"), feeds, folder, set(), kept)


def test_a_killed_search_resumes_with_its_measurements(tmp_path: Path, timed: list[float]) -> None:
    first = bench_of(tmp_path / "first")
    before = [first.measure(NAME, {}, NOTHING, parse(text)) for i, text in enumerate(MODELS[:2])]
    with pytest.raises(KeyboardInterrupt):
        first.measure(NAME, {}, NOTHING, parse(MODELS[2]))
    timed.clear()
    again = bench_of(tmp_path / "again")
    after = [again.measure(NAME, {}, NOTHING, parse(text)) for i, text in enumerate(MODELS)]
    assert len(timed) == 1, "only what was cut off is measured"
    assert again.kept.reused == 2
    assert [(t.speedup, t.compared) for t in after[:2]] == [(t.speedup, t.compared) for t in before]


def test_measurements_belong_to_bytes_not_to_names(tmp_path: Path, timed: list[float]) -> None:
    bench = bench_of(tmp_path / "bench")
    static = bench.measure(NAME, {}, NOTHING, parse(MODELS[0]))
    same = bench.measure(NAME, {}, NOTHING, parse(MODELS[0]))
    other = bench.measure(NAME, {}, NOTHING, parse(MODELS[1]))
    assert same.speedup == static.speedup
    assert other.speedup != static.speedup


def test_errors_of_the_runtime_do_not_name_a_temporary_file(tmp_path: Path) -> None:
    bench = bench_of(tmp_path / "bench")
    with pytest.raises(ModelError, match=r"^onnxruntime refuses it: .*Relu"):
        bench.measure(NAME, {}, NOTHING, parse(RELU.replace("float", "int16")))


def test_measurements_of_other_models_samples_and_threads_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))
    recipe = load_recipe(tiny.project(tmp_path / "p", preset="best") / "edgepack.yaml", {})
    target = load_target("x86-cpu")
    threads = target.runtime.model_copy(update={"threads": 7})
    ranges = RangeTable({}, "mse", "model", "samples", 3)
    cases = [
        (target, ranges),
        (target, replace(ranges, model_fingerprint="another")),
        (target, replace(ranges, samples_fingerprint="another")),
        (target.model_copy(update={"runtime": threads}), ranges),
    ]
    paths = [kept_measurements(recipe, *case).path for case in cases]
    assert len(set(paths)) == len(cases)
    assert kept_measurements(recipe, target, replace(ranges)).path == paths[0]


def test_measurements_are_kept_and_a_truncated_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.jsonl"
    kept = Measurements(path)
    kept.put({"noise": 0.5, "rank": None}, "noise", "ab")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "noise/cd", "figu')
    again = Measurements(path)
    again.put({"noise": 1.0}, "noise", "ef")
    third = Measurements(path)
    assert third.get("noise", "ab") == {"noise": 0.5, "rank": None}
    assert third.get("noise", "cd") is None
    assert third.get("noise", "ef") == {"noise": 1.0}
    assert third.reused == 2


def test_without_a_file_measurements_are_kept_in_memory() -> None:
    kept = Measurements()
    kept.put({"a": 1.0}, "x")
    assert kept.get("x") == {"a": 1.0}
