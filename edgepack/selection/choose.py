"""The choice by measurement: candidates are built, timed and compared; a slower model is never chosen.

Whole-model candidates come first. Then the best of them, and a static int8 one of similar cost, are varied:
all fusion groups of one kind are set to float, one kind after another, and every Concat shares one scale.
Then a search, where requested, changes the precision of single groups. Speed and fidelity are measured on
probe samples of the calibration data. A chosen candidate must also keep every accuracy limit of the gate on
the evaluation data: a few probes are too optimistic for a candidate near a limit.
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
"""How much cheaper an inaccurate candidate must be for a search of the groups that make it so."""
BUDGET_SECONDS = 20.0
"""For the variations, after the whole-model candidates."""
NEAR = 1.15
"""How much more a static int8 candidate may cost and still be varied: a few slow kernels may be the cause."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The chosen candidate, and the report lines of all candidates."""

    plan: QuantPlan
    model: ir.Model
    candidates: list[Candidate]
    sensitivity: tuple[SensitivityRow, ...] = ()
    notes: tuple[str, ...] = ()


CostOf = Callable[[Trial], float]


def choose(problem: Problem, *, method: str, by_group: bool = True, task: Task | None = None) -> Choice:
    """The cheapest candidate that keeps the accuracy floor, and all that were measured.

    A ``method`` other than auto is used as it is, without a comparison. ``by_group``: this host's times hold
    for the target, so variations by kind of group are timed too. With a ``task`` single groups may change
    precision, see :mod:`.search`. With a device neither is done: times of single groups on this host do not
    hold there. A candidate that the runtime does not load, or fails to run on a probe or an evaluation
    sample, is listed with the reason and not chosen.

    Raises:
        ModelError: the runtime runs no candidate, or not the requested one.
    """
    board = Leaderboard(problem)
    if method != "auto":
        whole = WholeModel(method)
        best = board.measure(CandidateName(whole), _requested(problem.groups, whole, problem.fixed))
        return Choice(*problem.build(best.methods), board.lines(best))
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
    return Choice(*problem.build(best.methods), board.lines(best), sensitivity, notes)


def _requested(groups: Sequence[FusionGroup], whole: WholeModel, fixed: Precisions) -> Precisions:
    return methods_of(groups, whole, dict.fromkeys(heavy_types(groups), Precision(whole)), fixed)


def _best_whole(board: Leaderboard) -> Trial:
    """The best whole-model candidate.

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
    """``best``, or a static int8 candidate of similar cost, with the variations that make it cheaper."""
    cost = board.cost
    near = _static_near(board.trials, best, cost)
    best = _vary(board, best, cost, cost)
    if near is not None and board.accurate(near):
        other = _vary(board, near, lambda t: cost.judged(t, 0.0), board.judged)
        best = min(best, other, key=board.judged)
    return best


def _static_near(trials: Sequence[Trial], best: Trial, cost: Cost) -> Trial | None:
    """The cheapest static int8 candidate of similar cost; ``None`` where ``best`` is one itself."""
    if best.plan.of(Precision.STATIC):
        return None
    integer = [t for t in trials if t.plan.of(Precision.STATIC) and cost(t) < cost(best) * NEAR]
    return min(integer, key=cost, default=None)


def _vary(board: Leaderboard, best: Trial, at_best: CostOf, cost: CostOf) -> Trial:
    """Apply one variation after another; keep those that reduce the cost.

    ``cost`` needs a check on the evaluation data; ``at_best`` is a lower bound of it that does not.
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
