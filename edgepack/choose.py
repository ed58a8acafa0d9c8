"""The choice by measurement: forms of a model are built, timed and compared; nothing slower is taken.

Candidates are whole-model methods first, then the best of them with one group of similar units after
another set to float. Speed and fidelity are measured on calibration samples; where the user has a metric
and a limit on its drop, a form must also keep that on the evaluation samples before it is taken.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from edgepack.feeds import Feeds
from edgepack.measure.bench import file_ratios, quick_ratios
from edgepack.measure.check import Comparison, compare_outputs
from edgepack.measure.runner import Outputs, Runner, open_model
from edgepack.model import model_bytes, save_model
from edgepack.quantize.plan import Method, QuantPlan
from edgepack.quantize.units import Role, Unit
from edgepack.report import Candidate, Fidelity, finite
from edgepack.target import Target

Methods = Mapping[str, tuple[Method, str]]
"""Method and reason by unit name."""

SAME_SPEED = 0.01
"""A difference below this is not worth a decision: two runs of one file differ by as much."""
SIZE_WEIGHT = 0.2
"""In the balance a file four times smaller outweighs a model 1.3 times slower; see docs/decisions."""
ROUNDS = 25
TABLE = "table "
FLOAT_HERE = "computes in float in the form that was chosen"
NEVER = 1e6
BUDGET_SECONDS = 20.0
"""For setting groups of units to float, after the whole-model candidates."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A built and measured form."""

    name: str
    methods: Methods
    plan: QuantPlan
    path: Path
    size_bytes: int
    speedup: float
    error: float
    """Standard error of ``speedup``."""
    compared: Comparison


@dataclass(frozen=True, slots=True)
class Floor:
    """The least accuracy that a form must keep."""

    sqnr_db: float | None
    agreement: float | None
    metric_drop: float | None
    original_metric: float | None

    def on_probes(self, trial: Trial) -> bool:
        """Whether ``trial`` is accurate enough on the probes."""
        compared = trial.compared
        if self.sqnr_db is not None and compared.sqnr_db < self.sqnr_db:
            return False
        agreement = compared.agreement
        return self.agreement is None or agreement is None or agreement >= self.agreement

    def on_metric(self, fidelity: Fidelity | None) -> bool:
        """Whether the metric keeps its limit; true where there is none."""
        if fidelity is None or fidelity.metric is None:
            return True
        if self.metric_drop is None or self.original_metric is None:
            return True
        return self.original_metric - fidelity.metric <= self.metric_drop + 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The form that was taken, and every line of what was tried."""

    plan: QuantPlan
    model: ir.Model
    candidates: list[Candidate]


@dataclass(slots=True)
class TrialBench:
    """The original, open, and the probes on which every form is timed and compared with it."""

    original: Path
    target: Target
    feeds: Sequence[Feeds]
    folder: Path
    made: int = 0

    def __post_init__(self) -> None:
        self._runner = open_model(self.original, self.target.runtime)
        self._reference = [self._runner.run(feed) for feed in self.feeds]

    _runner: Runner = field(init=False)
    _reference: list[Outputs] = field(init=False)

    def measure(self, name: str, methods: Methods, plan: QuantPlan, model: ir.Model) -> Trial:
        """Write one form, time it against the original, interleaved, and compare its outputs."""
        self.made += 1
        path = self.folder / f"trial_{self.made}.onnx"
        save_model(model, path)
        runner = open_model(path, self.target.runtime)
        compared = compare_outputs(self._reference, runner, self.feeds)
        ratio = quick_ratios([self._runner, runner], self.feeds, ROUNDS)[1]
        return Trial(
            name, methods, plan, path, model_bytes(path), ratio.speedup, ratio.standard_error, compared
        )

    def confirms(self, trial: Trial, best: Trial) -> bool:
        """Whether ``trial`` is faster than ``best`` beyond noise, side by side in several sessions."""
        ratio = file_ratios([best.path, trial.path], self.target.runtime, self.feeds, ROUNDS)[1]
        return ratio.speedup > 1 + SAME_SPEED + ratio.standard_error


Form = Callable[[Methods], tuple[QuantPlan, ir.Model]]
Cost = Callable[[Trial], float]


def choose(
    units: Sequence[Unit],
    bench: TrialBench,
    form: Form,
    fixed: Methods,
    floor: Floor,
    verify: Callable[[Path], Fidelity | None],
    *,
    method: str,
    optimize_for: str,
    on_trial: Callable[[str], None] = lambda name: None,
) -> Choice:
    """The cheapest form that keeps the floor, and everything that was tried.

    ``form`` makes a plan and a model from methods; ``verify`` gives the user's metric of a file. A single
    ``method`` other than auto is taken as it is: what the user asks for by name is not second-guessed.
    """
    trials: list[Trial] = []
    verdicts: dict[Path, Fidelity | None] = {}

    def attempt(name: str, methods: Methods) -> Trial:
        on_trial(name)
        trial = bench.measure(name, methods, *form(methods))
        trials.append(trial)
        return trial

    def accurate(trial: Trial) -> bool:
        if not floor.on_probes(trial):
            return False
        if trial.path not in verdicts:
            on_trial(f"check {trial.name}")
            verdicts[trial.path] = verify(trial.path)
        return floor.on_metric(verdicts[trial.path])

    candidates = whole_model_methods(units, bench.target)
    if method != "auto":
        best = attempt(
            method, methods_of(units, method, dict.fromkeys(_heavy_types(units), Method(method)), fixed)
        )
    else:
        for name, by_type in candidates.items():
            attempt(name, methods_of(units, name, by_type, fixed))
        cost = _cost_for(optimize_for, model_bytes(bench.original))
        best = _best(trials, accurate, cost)
        if optimize_for != "size":
            best = _drop_what_does_not_pay(units, best, bench, attempt, accurate, fixed, cost)
    lines = [_line(t, t is best, floor, verdicts.get(t.path)) for t in trials]
    return Choice(*form(best.methods), lines)


def whole_model_methods(units: Sequence[Unit], target: Target) -> dict[str, dict[str, Method]]:
    """The whole-model candidates that differ on this model: method by operator type, by candidate name."""
    kernels = target.kernels
    heavy = _heavy_types(units)
    weighted = {u.op_type for u in units if u.weight is not None}
    candidates: dict[str, dict[str, Method]] = {}
    static = heavy & set(kernels.integer)
    dynamic = weighted & set(kernels.dynamic)
    if static:
        candidates["static"] = dict.fromkeys(heavy, Method.STATIC)
    if dynamic and static - dynamic:
        candidates["static and dynamic"] = {
            op: Method.DYNAMIC if op in dynamic else Method.STATIC for op in heavy
        }
    if dynamic:
        candidates["dynamic"] = {op: Method.DYNAMIC if op in dynamic else Method.WEIGHT_ONLY for op in heavy}
    if weighted & set(kernels.weight_only) or any(is_table(u) for u in units):
        candidates["weight_only"] = dict.fromkeys(heavy, Method.WEIGHT_ONLY)
    candidates["float"] = dict.fromkeys(heavy, Method.FLOAT)
    return candidates


def _heavy_types(units: Sequence[Unit]) -> set[str]:
    return {u.op_type for u in units if u.role is Role.HEAVY}


def is_table(unit: Unit) -> bool:
    """Whether the unit looks rows up in a constant table: an embedding."""
    return unit.op_type == "Gather" and bool(unit.constants)


def methods_of(
    units: Sequence[Unit], name: str, by_type: Mapping[str, Method], fixed: Methods
) -> dict[str, tuple[Method, str]]:
    """Methods by unit: what the recipe fixed, then by type; light units follow their neighbours."""
    light = Method.STATIC if name.startswith("static") else Method.FLOAT
    table = Method.FLOAT if name == "float" else Method.WEIGHT_ONLY
    methods = {u.name: table if is_table(u) else by_type.get(u.op_type, light) for u in units}
    return {
        u: fixed.get(u, (method, FLOAT_HERE if method is Method.FLOAT else ""))
        for u, method in methods.items()
    }


def groups_of(units: Sequence[Unit], trial: Trial) -> dict[str, list[str]]:
    """Units of one kind that are not float in ``trial``: they win or lose together."""
    taken = {u.unit.name for u in trial.plan.units if u.method is not Method.FLOAT}
    groups: dict[str, list[str]] = {}
    for unit in units:
        if unit.name not in taken or (unit.role is Role.MOVE and not is_table(unit)):
            continue
        groups.setdefault(f"{TABLE}{unit.name}" if is_table(unit) else unit.kind, []).append(unit.name)
    heavy = [u.name for u in units if u.role is Role.HEAVY and u.name in taken]
    if len(heavy) > 2:
        groups["first unit"], groups["last unit"] = heavy[:1], heavy[-1:]
    return groups


def _best(trials: Sequence[Trial], accurate: Callable[[Trial], bool], cost: Cost) -> Trial:
    """The cheapest accurate one; accuracy is asked in order of cost, since asking takes a run."""
    by_cost = sorted(trials, key=cost)
    return next((t for t in by_cost if accurate(t)), max(trials, key=lambda t: t.compared.sqnr_db))


def _drop_what_does_not_pay(
    units: Sequence[Unit],
    best: Trial,
    bench: TrialBench,
    attempt: Callable[[str, Methods], Trial],
    accurate: Callable[[Trial], bool],
    fixed: Methods,
    cost: Cost,
) -> Trial:
    """Compute one group of units after another in float; what makes the model cheaper stays."""
    deadline = time.monotonic() + BUDGET_SECONDS
    base = best.name
    for group, names in groups_of(units, best).items():
        if time.monotonic() > deadline:
            break
        form = Method.FLOAT if group.startswith(TABLE) else Method.WEIGHT_ONLY
        free = [n for n in names if n not in fixed and best.methods[n][0] is not form]
        if not free:
            continue
        # Weights stored as int8 cost no time, so a unit that computes in float need not be large.
        reason = f"measured slower as {best.methods[free[0]][0]} than in float"
        changed = {**best.methods, **dict.fromkeys(free, (form, reason))}
        trial = attempt(f"{base}, {group} in float", changed)
        if cost(trial) < cost(best) * (1 - SAME_SPEED) and accurate(trial) and bench.confirms(trial, best):
            best = trial
    return best


def _cost_for(optimize_for: str, original_bytes: int) -> Cost:
    """What a form costs: time, bytes, or both. What is slower than the original costs more than all else."""

    def cost(trial: Trial) -> float:
        if optimize_for == "size":
            return trial.size_bytes
        smaller = (trial.size_bytes / original_bytes) ** SIZE_WEIGHT if optimize_for == "balance" else 1.0
        slower = trial.speedup < 1 - SAME_SPEED - 2 * trial.error
        return smaller / trial.speedup * (NEVER if slower else 1.0)

    return cost


def _line(trial: Trial, chosen: bool, floor: Floor, verdict: Fidelity | None) -> Candidate:
    reason = ""
    if not floor.on_probes(trial):
        reason = "below the floor of fidelity"
    elif not floor.on_metric(verdict):
        reason = "loses more of the metric than the gate allows"
    metric = verdict.metric if verdict is not None else None
    return Candidate(
        trial.name, trial.size_bytes, trial.speedup, finite(trial.compared.sqnr_db), metric, chosen, reason
    )
