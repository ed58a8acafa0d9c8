"""The search: changes the precision of single fusion groups, by measured noise and time.

The noise of each group is measured alone: the noise that its int8 kernel adds to the outputs of an otherwise
float model. The time of each group is measured in every whole-model candidate. Noise powers of independent
roundings add up, and times nearly do, so the gain of a change can be predicted. A prediction only decides
what is built; a candidate is accepted when it is better than the best so far beyond timing noise.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.plan.types import Precision, Precisions, Request
from edgepack.results import Cause, Reason, SensitivityRow, finite
from edgepack.selection.candidates import CandidateName
from edgepack.selection.leaderboard import Leaderboard
from edgepack.selection.trials import (
    FAILURES,
    RUN,
    SAME_SPEED,
    Trial,
    trial_db,
)

WORTH_TRYING = 0.005
"""Predicted gain below which a measurement cannot confirm a single change."""
LEAST_GAIN = 0.0005
"""Predicted gain below which a change is not part of a batch either."""
LEAST_NOISE = 0.05
"""Least predicted noise as a share of the present noise: noises of single groups add up only roughly."""
CONVERSION_NS = 0.2
"""Estimated time of a QuantizeLinear or DequantizeLinear per element; it only orders the changes."""
PROBES_DIFFER_DB = 1.0
"""By how much the SQNR on a few probes may differ from that on all."""
SHARES_FOR_NOISE = (0.5, 0.75, 0.9)
"""Shares of the budget at which measuring single groups ends and candidates are built, in turns."""
REPAIR_SECONDS = 60.0
"""Budget of a repair: finding the groups that make the cheapest candidate inaccurate."""

PrecisionOfGroup = Mapping[str, Precision]
Noise = dict[tuple[str, Precision], float]
"""Noise power over signal power that one group in one precision adds to the outputs."""


@dataclass(frozen=True, slots=True)
class Task:
    """The budget of a search, what it may do, and where it reports progress."""

    seconds: float
    improves: bool
    """Whether it also improves an accurate candidate; else it only repairs an inaccurate one."""
    elements: Mapping[str, int]
    """Elements of activations by name, to estimate the cost of conversions."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


class Move(NamedTuple):
    """A change of one group's precision, and its predicted gain."""

    gain: float
    group: str
    method: Precision
    reason: Reason


@dataclass(slots=True)
class _Clock:
    task: Task
    started: float

    def left(self, share: float = 1.0) -> bool:
        return time.monotonic() - self.started < self.task.seconds * share

    def tell(self, what: str) -> None:
        spent = min(int(time.monotonic() - self.started), int(self.task.seconds))
        self.task.progress(what, spent, max(int(self.task.seconds), 1))


def too_noisy(method: Precision) -> Reason:
    """Why a repair replaced the precision that the candidate had for a group."""
    return Reason(Cause.NOISIER, f"too noisy as {method}")


@dataclass(slots=True)
class Search:
    """The state of a search; see :func:`search`."""

    board: Leaderboard
    clock: _Clock
    whole: Mapping[Precision, Trial]
    """Whole-model candidates by precision."""
    noise: Noise = field(default_factory=dict)
    us: dict[Precision, Mapping[str, float | None]] = field(default_factory=dict)
    failed: set[tuple[str, Precision]] = field(default_factory=set)
    """Groups and precisions whose single measurement failed."""

    @property
    def groups(self) -> Sequence[FusionGroup]:
        """All groups of the model."""
        return self.board.problem.groups

    @property
    def original_us(self) -> float:
        """Microseconds of a run of the original."""
        method, trial = next(iter(self.whole.items()))
        return _value(self.us[method], RUN) * trial.speedup

    def time_groups(self) -> None:
        """Time all groups in each whole-model candidate."""
        for method, trial in self.whole.items():
            self.us[method] = self.board.bench.group_us(trial, self.groups)

    def measure_noise(self, share: float) -> None:
        """Measure the noise of each group alone, in each precision, up to a ``share`` of the budget."""
        plain = {u.name: Request(Precision.FLOAT) for u in self.groups}
        for group, method in self.unknown():
            if not self.clock.left(share):
                return
            self.clock.tell(f"group {group.name} alone")
            _, model = self.board.problem.build({**plain, group.name: Request(method)})
            try:
                self.noise[group.name, method] = self.board.bench.noise(model)
            except FAILURES as error:
                self.failed.add((group.name, method))
                self.board.refuse(f"{group.name} as {method}, alone", error, of_units=False)

    def unknown(self) -> list[tuple[FusionGroup, Precision]]:
        """Groups and precisions whose noise is not measured yet."""
        methods = (Precision.STATIC, Precision.DYNAMIC, Precision.WEIGHT_ONLY)
        every = ((group, method) for method in methods for group in self._movable(method))
        known = self.noise.keys() | self.failed
        return [(group, method) for group, method in every if (group.name, method) not in known]

    def _movable(self, method: Precision) -> Iterator[FusionGroup]:
        trial = self.whole.get(method)
        precisions = _precisions(trial) if trial is not None else {}
        for group in self.groups:
            if (
                group.role is Role.HEAVY
                and group.name not in self.board.problem.fixed
                and precisions.get(group.name) is method
            ):
                yield group

    def moves(self, best: Trial) -> list[Move]:
        """Changes that are predicted to make ``best`` cheaper, the best one of each group."""
        precisions, total_us = _precisions(best), self.original_us / best.speedup
        noise = 10 ** (-best.compared.sqnr_db / 10)
        found = []
        for group in self._movable_at_all():
            now = precisions[group.name]
            options = []
            for method in self.us:
                if method is now or (group.name, method) not in self._known(now):
                    continue
                us = total_us + self._us(group, method, precisions) - self._us(group, now, precisions)
                power = noise + self._noise(group.name, method) - self._noise(group.name, now)
                ratio = us / total_us
                after, before = trial_db(max(power, noise * LEAST_NOISE)), best.compared.sqnr_db
                ratio *= self.board.cost.of_noise(after) / self.board.cost.of_noise(before)
                options.append(
                    Move(1 - ratio, group.name, method, Reason(Cause.FASTER, f"measured better than {now}"))
                )
            if options and (move := max(options)).gain > LEAST_GAIN:
                found.append(move)
        return sorted(found, reverse=True)

    def _movable_at_all(self) -> Iterator[FusionGroup]:
        seen = set()
        for method in self.whole:
            for group in self._movable(method):
                if group.name not in seen:
                    seen.add(group.name)
                    yield group

    def _known(self, now: Precision) -> set[tuple[str, Precision]]:
        """Groups and precisions with known noise, for groups whose present precision is known as well."""
        measured = {name for name, method in self.noise if method is now}
        if now in (Precision.FLOAT, Precision.WEIGHT_ONLY, Precision.STORED):
            measured = {name for name, _ in self.noise}
        known = {(name, method) for name, method in self.noise if name in measured}
        return known | {(name, Precision.FLOAT) for name in measured if Precision.WEIGHT_ONLY not in self.us}

    def _noise(self, name: str, method: Precision) -> float:
        same = Precision.WEIGHT_ONLY if method is Precision.STORED else method
        return self.noise.get((name, same), 0.0)

    def _us(self, group: FusionGroup, method: Precision, precisions: PrecisionOfGroup) -> float:
        """Microseconds of the group in a precision, with conversions to its neighbours' ``precisions``."""
        own = _value(self.us[method], group.name)
        static = method is Precision.STATIC
        around = (*_producers(group, self.groups), *_consumers(group, self.groups))
        crossings = sum((precisions[other.name] is Precision.STATIC) is not static for other in around)
        return own + crossings * _elements(group, self.clock.task.elements) * CONVERSION_NS * 1e-3

    def improve(self, best: Trial) -> Trial:
        """``best`` with groups in other precisions: all predicted gains at once, then half as many, ..."""
        measured: set[frozenset[tuple[str, Precision]]] = set()
        moves = self.moves(best)
        size = len(moves)
        singles = 0
        while moves and self.clock.left():
            batch = moves[:size] if size else moves[singles : singles + 1]
            if not size:
                singles += 1
                if not batch or batch[0].gain < WORTH_TRYING:
                    break
            key = frozenset((m.group, m.method) for m in batch)
            if key not in measured:
                measured.add(key)
                trial = self._changed(best, batch)
                if trial is not None and self._better(trial, best):
                    best, moves, singles = trial, self.moves(trial), 0
                    size = len(moves)
                    continue
            size //= 2
        return best

    def repair(self, cheap: Trial, best: Trial) -> Trial:
        """The inaccurate ``cheap`` with as few groups in float as make it accurate.

        Groups go to float in the order of the noise that they save per microsecond. Gives ``best`` where no
        repaired candidate is cheaper.
        """
        precisions = _precisions(cheap)
        stored = _precisions(self.whole[Precision.WEIGHT_ONLY]) if Precision.WEIGHT_ONLY in self.whole else {}
        noisy = []
        for name in (u.name for u in self._movable_at_all() if precisions[u.name] is not Precision.FLOAT):
            now = precisions[name]
            # Weight-only noise is so small that it need not be measured.
            to = Precision.WEIGHT_ONLY if stored.get(name) is Precision.WEIGHT_ONLY else Precision.FLOAT
            saved = self._noise(name, now) - self._noise(name, to)
            if saved > 0 and now is not to:
                noisy.append(Move(saved / self._price_us(name, now, to), name, to, too_noisy(now)))
        noisy.sort(reverse=True)
        enough, too_few, count = len(noisy) + 1, 0, 1
        taken = best
        while too_few + 1 < enough and count <= len(noisy) and self.clock.left():
            trial = self._changed(cheap, noisy[:count]) if self._may_do(cheap, noisy[:count]) else None
            if trial is not None and self.board.accurate(trial):
                enough = count
                if self.board.cost(trial) < self.board.cost(taken) * (1 - SAME_SPEED):
                    taken = trial
            else:
                too_few = count
            # Doubled until accurate, then a binary search between the bounds.
            count = min(count * 2, len(noisy)) if enough > len(noisy) else (too_few + enough) // 2
            if count in (too_few, enough):
                break
        return taken

    def _may_do(self, trial: Trial, batch: Sequence[Move]) -> bool:
        """Whether ``trial`` with ``batch`` is accurate: roughly on few probes, then on evaluation data."""
        self.clock.tell("search")
        _, model = self.board.problem.build(_changed_methods(trial, batch))
        try:
            if self.board.least_db is not None:
                nearly = self.board.least_db - PROBES_DIFFER_DB
                if trial_db(self.board.bench.noise(model)) <= nearly:
                    return False
            return self.board.keeps(model)
        except FAILURES as error:
            self.board.refuse(str(_name(trial, batch)), error, of_units=True)
            return False

    def _price_us(self, name: str, now: Precision, to: Precision) -> float:
        us = self.us.get(to) or self.us.get(Precision.FLOAT) or {}
        return max(_value(us, name) - _value(self.us.get(now, {}), name), 1.0)

    def _changed(self, trial: Trial, batch: Sequence[Move]) -> Trial | None:
        self.clock.tell("search")
        return self.board.attempt(_name(trial, batch), _changed_methods(trial, batch))

    def _better(self, trial: Trial, best: Trial) -> bool:
        if self.board.cost(trial) >= self.board.cost(best) * (1 - SAME_SPEED) or not self.board.accurate(
            trial
        ):
            return False
        advantage = self.board.cost.apart_from_time(best) / self.board.cost.apart_from_time(trial)
        return self.board.bench.confirms(trial, best, advantage)

    def rows(self) -> tuple[SensitivityRow, ...]:
        """Measurements of single groups, for the report."""
        kinds = {u.name: u.op_type for u in self.groups}
        return tuple(
            SensitivityRow(
                name,
                kinds[name],
                str(method),
                finite(trial_db(noise)),
                {str(m): round(value, 2) for m, us in self.us.items() if (value := us.get(name)) is not None},
            )
            for (name, method), noise in self.noise.items()
        )


def search(
    board: Leaderboard, best: Trial, task: Task
) -> tuple[Trial, tuple[SensitivityRow, ...], tuple[str, ...]]:
    """The cheapest accurate candidate found within the budget, figures of single groups, and notes.

    ``best``: the cheapest accurate candidate of ``board``. Where a cheaper one is not accurate, that one is
    repaired first. The search has no randomness: the same measurements give the same result. Candidates that
    the runtime does not run are recorded on ``board`` and not chosen.
    """
    trials, cost = tuple(board.trials), board.cost
    whole = {m: t for t in reversed(trials) if t.name.is_whole and (m := t.name.whole.method) is not None}
    clock = _Clock(task, time.monotonic())
    state = Search(board, clock, whole)
    state.time_groups()
    state.measure_noise(SHARES_FOR_NOISE[0])
    cheaper = sorted((t for t in trials if cost(t) < cost(best)), key=cost)
    if cheaper and not board.accurate(cheaper[0]):
        best = state.repair(cheaper[0], best)
    if task.improves:
        best = state.improve(best)
        for share in SHARES_FOR_NOISE[1:]:
            if state.unknown() and clock.left(share):
                state.measure_noise(share)
                best = state.improve(best)
    missing = len(state.unknown())
    notes = [f"{len(state.noise)} groups measured alone" + (f", {missing} not" if missing else "")]
    if missing or not clock.left():
        notes.append(f"stopped by the budget of {task.seconds:g} s")
    if board.bench.kept.reused:
        notes.append(f"{board.bench.kept.reused} measurements of an earlier run used")
    return best, state.rows(), tuple(notes)


def _name(trial: Trial, batch: Sequence[Move]) -> CandidateName:
    """The name of ``trial`` with ``batch`` applied."""
    return trial.name.change([(m.group, m.method) for m in batch])


def _changed_methods(trial: Trial, batch: Sequence[Move]) -> Precisions:
    return {**trial.methods, **{m.group: Request(m.method, m.reason) for m in batch}}


def _precisions(trial: Trial) -> dict[str, Precision]:
    return {u.group.name: u.precision for u in trial.plan.groups}


def _value(figures: Mapping[str, float | None], name: str) -> float:
    return figures.get(name) or 0.0


def _producers(group: FusionGroup, groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    return [other for other in groups if set(other.outputs) & set(group.inputs)]


def _consumers(group: FusionGroup, groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    return [other for other in groups if set(other.inputs) & set(group.outputs)]


def _elements(group: FusionGroup, shapes: Mapping[str, int]) -> int:
    return max((shapes.get(name, 0) for name in (*group.inputs, *group.outputs)), default=0)
