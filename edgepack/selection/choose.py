"""The choice by measurement: forms of a model are built, timed and compared; nothing slower is taken.

Candidates are whole-model ones first. Then the best of them, and an integer one that comes near it, are
varied: all fusion groups of one kind are set to float, one kind after another, and concatenations share one
scale. Then, where a search is asked for, single groups take other precisions. Speed and fidelity are measured
on calibration samples; before a candidate is taken it must also keep, on the evaluation samples, every limit
on accuracy that the gate has: few probes may flatter a candidate that is near a limit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.types import Precision, Precisions, QuantPlan, Request
from edgepack.results import NO_REASON, Candidate, Cause, Reason, SensitivityRow
from edgepack.selection.candidates import (
    CandidateName,
    WholeModel,
    heavy_types,
    methods_of,
    variations,
    whole_model_methods,
)
from edgepack.selection.leaderboard import Leaderboard, Problem
from edgepack.selection.search import Task, search
from edgepack.selection.trials import SAME_SPEED, Cost, Trial

WORTH_A_REPAIR = 0.05
"""How much cheaper a form must be, that is not accurate, for its noisy groups to be looked for."""
BUDGET_SECONDS = 20.0
"""For setting groups of groups to float, after the whole-model candidates."""
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


def choose(problem: Problem, *, method: str, by_group: bool = True, task: Task | None = None) -> Choice:
    """The cheapest form that keeps the floor, and everything that was tried.

    A single ``method`` other than auto is taken as it is: what the user asks for by name is not
    second-guessed. ``by_group``: the clock is that of the device, so it may tell which kernels of one kind
    pay. With a ``task`` single groups may take other precisions, see :mod:`.search`; not where a device times
    candidates, since this host does not speak for what single groups cost there. A candidate that the runtime
    does not load, or fails to run on a probe or an evaluation sample, is told as such and not taken.

    Raises:
        ModelError: the runtime runs no form at all, or not the one that was asked for.
    """
    board = Leaderboard(problem)
    if method != "auto":
        whole = WholeModel(method)
        best = board.measure(CandidateName(whole), _asked_for(problem.groups, whole, problem.fixed))
        return Choice(*problem.form(best.methods), board.lines(best))
    here = problem.bench.timing is None
    best = _best_whole(board)
    if problem.optimize_for != "size" and by_group and here:
        best = _best_by_group(board, best)
    cheapest = min(board.trials, key=board.cost)
    cheaper = board.cost(cheapest) < board.cost(best) * (1 - WORTH_A_REPAIR)
    sensitivity: tuple[SensitivityRow, ...] = ()
    notes: tuple[str, ...] = ()
    if here and task is not None and (task.improves or cheaper):
        best, sensitivity, notes = search(board, best, task)
    return Choice(*problem.form(best.methods), board.lines(best), sensitivity, notes)


def _asked_for(groups: Sequence[FusionGroup], whole: WholeModel, fixed: Precisions) -> Precisions:
    return methods_of(groups, whole, dict.fromkeys(heavy_types(groups), Precision(whole)), fixed)


def _best_whole(board: Leaderboard) -> Trial:
    """The best form of the whole model.

    Raises:
        ModelError: the runtime runs none.
    """
    groups, fixed = board.problem.groups, board.problem.fixed
    for whole, by_type in whole_model_methods(groups, board.bench.target).items():
        board.attempt(CandidateName(whole), methods_of(groups, whole, by_type, fixed))
    if board.trials:
        board.trials[:] = board.bench.as_on_device(board.trials)
    return board.best()


def _best_by_group(board: Leaderboard, best: Trial) -> Trial:
    """``best``, or an integer form that comes near it, with groups of groups in other forms."""
    cost = board.cost
    near = _integer_one_near(board.trials, best, cost)
    best = _vary(board, best, cost, cost)
    if near is not None and board.accurate(near):
        other = _vary(board, near, lambda t: cost.judged(t, 0.0), board.judged)
        best = min(best, other, key=board.judged)
    return best


def _integer_one_near(trials: Sequence[Trial], best: Trial, cost: Cost) -> Trial | None:
    """The cheapest form on integers, where ``best`` is none and not much cheaper."""
    if best.plan.of(Precision.STATIC):
        return None
    integer = [t for t in trials if t.plan.of(Precision.STATIC) and cost(t) < cost(best) * NEAR]
    return min(integer, key=cost, default=None)


def _vary(board: Leaderboard, best: Trial, at_best: CostOf, cost: CostOf) -> Trial:
    """One group of groups after another in float, concatenations on one scale; what pays stays.

    ``cost`` may be asked of forms that are known to be accurate; before, ``at_best`` is a bound of it.
    """
    deadline = time.monotonic() + BUDGET_SECONDS
    problem = board.problem
    folds = board.bench.target.kernels.folds_constants
    for variation in list(variations(problem.groups, best.plan, folds_constants=folds)):
        if time.monotonic() > deadline:
            break
        method = variation.method
        free = [
            n for n in variation.groups if n not in problem.fixed and best.methods[n].precision is not method
        ]
        if not free:
            continue
        before = best.methods[free[0]].precision
        slower = Reason(Cause.SLOWER, f"measured slower as {before} than in float")
        request = Request(method, NO_REASON if method is Precision.SHARED_SCALE else slower)
        trial = board.attempt(
            best.name.vary(variation.label), {**best.methods, **dict.fromkeys(free, request)}
        )
        if trial is None:
            continue
        enough = cost(best) * (1 - SAME_SPEED)
        if at_best(trial) < enough and board.accurate(trial) and cost(trial) < enough:
            advantage = cost(best) * best.speedup / (cost(trial) * trial.speedup)
            if board.bench.confirms(trial, best, advantage):
                best = trial
    return best
