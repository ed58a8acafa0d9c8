"""The search: noisy units leave, slow ones too, and nothing that is measured is measured again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import onnx_ir as ir
import pytest

from edgepack.measure.check import Comparison
from edgepack.measurements import Measurements
from edgepack.quantize.plan import Method, QuantPlan, UnitPlan
from edgepack.quantize.units import Role, Unit
from edgepack.scheme import QuantScheme, QuantType
from edgepack.search import Task, search
from edgepack.trials import RUN, Cost, Methods, Trial, TrialBench

STATIC, WEIGHT_ONLY, FLOAT = Method.STATIC, Method.WEIGHT_ONLY, Method.FLOAT
SCHEME = QuantScheme(QuantType.UINT8, symmetric=False)
NAMES = [f"c{i}" for i in range(8)]
UNITS = [
    Unit(name, "Conv", Role.HEAVY, (f"v{i}",), (f"v{i + 1}",), weight=f"w{i}") for i, name in enumerate(NAMES)
]


@dataclass
class World:
    """A machine with known times and noise of eight convolutions in a row, standing in for a bench."""

    noise_of: Mapping[str, float]
    static_us: Mapping[str, float]
    kept: Measurements = field(default_factory=Measurements)
    built: list[Methods] = field(default_factory=list)
    float_us: float = 100.0

    def form(self, methods: Methods) -> tuple[QuantPlan, ir.Model]:
        units = tuple(UnitPlan(u, methods[u.name][0], methods[u.name][1]) for u in UNITS)
        self.built.append(methods)
        return QuantPlan(units, {}, SCHEME, SCHEME), cast(ir.Model, methods)

    def noise(self, model: ir.Model) -> float:
        methods = cast(Methods, model)
        return sum(self.noise_of[n] for n in NAMES if methods[n][0] is STATIC)

    def run_us(self, methods: Methods) -> float:
        return sum(self.static_us[n] if methods[n][0] is STATIC else self.float_us for n in NAMES)

    def attempt(self, name: str, methods: Methods) -> Trial:
        plan, model = self.form(methods)
        compared = Comparison(signal=1.0, noise=self.noise(model), samples=1)
        speedup = self.float_us * len(NAMES) / self.run_us(methods)
        return Trial(name, methods, plan, Path(name), 100, speedup, 0.0, compared)

    def unit_us(self, trial: Trial, units: Sequence[Unit]) -> dict[str, float]:
        times = {n: self.static_us[n] if trial.methods[n][0] is STATIC else self.float_us for n in NAMES}
        return {**times, RUN: sum(times.values())}

    def confirms(self, trial: Trial, best: Trial, advantage: float = 1.0) -> bool:
        return trial.speedup / best.speedup * advantage > 1.01


def look(
    world: World, *, least_db: float = 0.0, improves: bool = True, fixed: Methods | None = None
) -> Trial:
    every = {m: world.attempt(str(m), dict.fromkeys(NAMES, (m, ""))) for m in (STATIC, WEIGHT_ONLY, FLOAT)}
    trials = list(every.values())

    def accurate(trial: Trial) -> bool:
        return trial.compared.sqnr_db >= least_db

    cost = Cost("balance", 100)
    best = min((t for t in trials if accurate(t)), key=cost)
    found, rows, _ = search(
        UNITS, best, trials, cast(TrialBench, world), world.form, fixed or {}, world.attempt, accurate,
        cost, least_db, Task(60, improves, {}),
    )  # fmt: skip
    assert {r.name for r in rows} <= set(NAMES)
    return found


def form_of(trial: Trial, form: Method) -> set[str]:
    return {name for name, (method, _) in trial.methods.items() if method is form}


QUIET = dict.fromkeys(NAMES, 1e-6)
FAST = dict.fromkeys(NAMES, 40.0)


def test_units_that_are_slower_as_integers_leave() -> None:
    found = look(World(QUIET, FAST | {"c3": 160.0, "c5": 130.0}))
    assert form_of(found, STATIC) == set(NAMES) - {"c3", "c5"}


def test_a_noisy_unit_that_is_cheap_in_float_leaves() -> None:
    found = look(World(QUIET | {"c6": 0.05}, FAST | {"c6": 99.0}))
    assert form_of(found, STATIC) == set(NAMES) - {"c6"}


def test_a_noisy_unit_that_is_expensive_in_float_stays() -> None:
    found = look(World(QUIET | {"c6": 0.002}, FAST | {"c6": 20.0}))
    assert form_of(found, STATIC) == set(NAMES)


@pytest.mark.parametrize("improves", [True, False])
def test_what_is_too_noisy_is_repaired_with_few_units(improves: bool) -> None:
    world = World(QUIET | {"c1": 0.5, "c4": 0.2, "c7": 0.001}, FAST)
    found = look(world, least_db=25.0, improves=improves)
    assert form_of(found, STATIC) == set(NAMES) - {"c1", "c4"}
    assert found.methods["c1"][1] == "too noisy as static"


def test_what_the_recipe_fixed_stays() -> None:
    world = World(QUIET, FAST | {"c3": 160.0})
    assert "c3" in form_of(look(world, fixed={"c3": (STATIC, "the recipe says so")}), STATIC)


def test_measurements_are_kept_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
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


def test_without_a_file_measurements_last_as_long_as_the_object() -> None:
    kept = Measurements()
    kept.put({"a": 1.0}, "x")
    assert kept.get("x") == {"a": 1.0}
