"""The choice by measurement: forms of a model are built, timed and compared; nothing slower is taken.

Candidates are whole-model methods first, then the best of them, and an integer one that comes near it, with
one group of similar units after another set to float and concatenations on one scale, then, where a search is
asked for, with single units in other forms. Speed and fidelity are measured on calibration samples; before a
form is taken it must also keep, on the evaluation samples, every limit on accuracy that the gate has: few
probes may flatter a form that is near a limit.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgepack.config.target import Target
from edgepack.ir.files import model_bytes
from edgepack.quantization.groups import Role, Unit
from edgepack.quantization.plan.types import Method, QuantPlan
from edgepack.results import Candidate, Fidelity, SensitivityRow
from edgepack.selection.leaderboard import Form, Tried
from edgepack.selection.search import Task, search
from edgepack.selection.trials import SAME_SPEED, Cost, Floor, Methods, Trial, TrialBench

TABLE = "table "
FLOAT_HERE = "computes in float in the form that was chosen"
WORTH_A_REPAIR = 0.05
"""How much cheaper a form must be, that is not accurate, for its noisy units to be looked for."""
BUDGET_SECONDS = 20.0
"""For setting groups of units to float, after the whole-model candidates."""
NEAR = 1.15
"""How much dearer an integer form may be to be looked at as well: a few of its kernels may be to blame."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The form that was taken, and every line of what was tried."""

    plan: QuantPlan
    model: ir.Model
    candidates: list[Candidate]
    sensitivity: tuple[SensitivityRow, ...] = ()
    notes: tuple[str, ...] = ()


CostOf = Callable[[Trial], float]


def choose(
    units: Sequence[Unit],
    bench: TrialBench,
    form: Form,
    fixed: Methods,
    floor: Floor,
    verify: Callable[[Path], Fidelity],
    *,
    method: str,
    optimize_for: str,
    by_group: bool = True,
    task: Task | None = None,
    on_trial: Callable[[str], None] = lambda name: None,
) -> Choice:
    """The cheapest form that keeps the floor, and everything that was tried.

    ``form`` makes a plan and a model from methods; ``verify`` checks a file on the evaluation data. A single
    ``method`` other than auto is taken as it is: what the user asks for by name is not second-guessed.
    ``by_group``: the clock is that of the device, so it may tell which kernels of one kind pay. With a
    ``task`` single units may take other forms, see :mod:`.search`; not where a device times whole forms,
    since this host does not speak for what single units cost there. A form that the runtime does not load, or
    fails to run on a probe or an evaluation sample, is told as such and not taken.

    Raises:
        ModelError: the runtime runs no form at all, or not the one that was asked for.
    """
    cost = Cost(optimize_for, model_bytes(bench.original), bench.constant_db)
    tried = Tried(bench, form, floor, cost, verify, on_trial)
    if method != "auto":
        best = tried.measure(method, _asked_for(units, method, fixed))
        return Choice(*form(best.methods), tried.lines(best))
    here = bench.timing is None
    best = _best_whole(units, tried, fixed)
    if optimize_for != "size" and by_group and here:
        best = _best_by_group(units, tried, best, fixed)
    cheaper = cost(min(tried.trials, key=cost)) < cost(best) * (1 - WORTH_A_REPAIR)
    sensitivity: tuple[SensitivityRow, ...] = ()
    notes: tuple[str, ...] = ()
    if here and task is not None and (task.improves or cheaper):
        best, sensitivity, notes = _best_by_unit(units, tried, best, fixed, task)
    return Choice(*form(best.methods), tried.lines(best), sensitivity, notes)


def _asked_for(units: Sequence[Unit], method: str, fixed: Methods) -> Methods:
    return methods_of(units, method, dict.fromkeys(_heavy_types(units), Method(method)), fixed)


def _best_whole(units: Sequence[Unit], tried: Tried, fixed: Methods) -> Trial:
    """The best form of the whole model.

    Raises:
        ModelError: the runtime runs none.
    """
    for name, by_type in whole_model_methods(units, tried.bench.target).items():
        tried.attempt(name, methods_of(units, name, by_type, fixed))
    if tried.trials:
        tried.trials[:] = tried.bench.as_on_device(tried.trials)
    return tried.best()


def _best_by_group(units: Sequence[Unit], tried: Tried, best: Trial, fixed: Methods) -> Trial:
    """``best``, or an integer form that comes near it, with groups of units in other forms."""
    cost = tried.cost
    near = _integer_one_near(tried.trials, best, cost)
    best = _vary(units, best, tried, fixed, cost, cost)
    if near is not None and tried.accurate(near):
        other = _vary(units, near, tried, fixed, lambda t: cost.judged(t, 0.0), tried.judged)
        best = min(best, other, key=tried.judged)
    return best


def _best_by_unit(
    units: Sequence[Unit], tried: Tried, best: Trial, fixed: Methods, task: Task
) -> tuple[Trial, tuple[SensitivityRow, ...], tuple[str, ...]]:
    """``best``, or a cheaper one, with single units in other forms, see :func:`.search.search`."""
    return search(
        units,
        best,
        tried.trials,
        tried.bench,
        tried.form,
        fixed,
        tried.attempt,
        tried.accurate,
        tried.keeps,
        tried.cost,
        tried.floor.least_db(tried.bench.constant_db),
        task,
        tried.refuse,
    )


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
    if kernels.folds_constants and any(
        (u.op_type == "MatMul" and u.weight) or is_table(u) or u.stored for u in units
    ):
        candidates["stored"] = dict.fromkeys(heavy, Method.STORED)
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
    in_float = Method.FLOAT if name == "float" else Method.STORED
    light = Method.STATIC if name.startswith("static") else in_float
    table = in_float if name in ("float", "stored") else Method.WEIGHT_ONLY
    methods = {}
    for unit in units:
        method = table if is_table(unit) else by_type.get(unit.op_type, light)
        here = method is Method.FLOAT or (unit.role is not Role.HEAVY and method is light is in_float)
        methods[unit.name] = fixed.get(unit.name, (method, FLOAT_HERE if here else ""))
    return methods


def groups_of(units: Sequence[Unit], trial: Trial) -> dict[str, list[str]]:
    """Units of one kind that are not float in ``trial``: they win or lose together."""
    taken = {u.unit.name for u in trial.plan.units if u.method is not Method.FLOAT and not u.stored}
    groups: dict[str, list[str]] = {}
    for unit in units:
        if unit.name not in taken or (unit.role is Role.MOVE and not is_table(unit)):
            continue
        groups.setdefault(f"{TABLE}{unit.name}" if is_table(unit) else unit.kind, []).append(unit.name)
    heavy = [u.name for u in units if u.role is Role.HEAVY and u.name in taken]
    groups = {kind: names for kind, names in groups.items() if names != heavy}  # all: another whole form
    if len(heavy) > 2:
        groups["first unit"], groups["last unit"] = heavy[:1], heavy[-1:]
    return groups


def _integer_one_near(trials: Sequence[Trial], best: Trial, cost: Cost) -> Trial | None:
    """The cheapest form on integers, where ``best`` is none and not much cheaper."""
    if best.plan.of(Method.STATIC):
        return None
    integer = [t for t in trials if t.plan.of(Method.STATIC) and cost(t) < cost(best) * NEAR]
    return min(integer, key=cost, default=None)


def _vary(
    units: Sequence[Unit],
    best: Trial,
    tried: Tried,
    fixed: Methods,
    at_best: CostOf,
    cost: CostOf,
) -> Trial:
    """One group of units after another in float, concatenations on one scale; what pays stays.

    ``cost`` may be asked of forms that are known to be accurate; before, ``at_best`` is a bound of it.
    """
    deadline = time.monotonic() + BUDGET_SECONDS
    folds = tried.bench.target.kernels.folds_constants
    for label, names, form in (*_in_float(units, best, folds), *_on_one_scale(units, best)):
        if time.monotonic() > deadline:
            break
        free = [n for n in names if n not in fixed and best.methods[n][0] is not form]
        if not free:
            continue
        # Weights stored as int8 cost no time, so a unit that computes in float need not be large.
        reason = "" if form is Method.TIED else f"measured slower as {best.methods[free[0]][0]} than in float"
        changed = {**best.methods, **dict.fromkeys(free, (form, reason))}
        trial = tried.attempt(f"{best.name}, {label}", changed)
        if trial is None:
            continue
        enough = cost(best) * (1 - SAME_SPEED)
        if at_best(trial) < enough and tried.accurate(trial) and cost(trial) < enough:
            advantage = cost(best) * best.speedup / (cost(trial) * trial.speedup)
            if tried.bench.confirms(trial, best, advantage):
                best = trial
    return best


def _in_float(units: Sequence[Unit], best: Trial, folds: bool) -> Iterator[tuple[str, list[str], Method]]:
    for group, names in groups_of(units, best).items():
        unfolded = Method.STORED if folds else Method.FLOAT
        form = unfolded if group.startswith(TABLE) else Method.WEIGHT_ONLY
        yield f"{group} in float", names, form


def _on_one_scale(units: Sequence[Unit], best: Trial) -> Iterator[tuple[str, list[str], Method]]:
    static = {u.unit.name for u in best.plan.of(Method.STATIC)}
    names = [u.name for u in units if u.op_type == "Concat" and u.role is Role.LIGHT and u.name in static]
    if names:
        yield "Concat on one scale", names, Method.TIED
