"""The search: forms for single groups, where one form for all of a kind is not the best there is.

Each group is measured alone, for the noise that its integer form brings to the outputs of an otherwise float
model, and for its time in every form of the whole model. Noise powers of independent roundings add up and
times nearly do, so the gain of a change can be foretold; what is foretold only decides what is tried, and
what is tried is built, timed side by side with the best so far, and taken when it is better beyond noise.
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
"""Foretold gain of a single change below which a measurement could not confirm it."""
LEAST_GAIN = 0.0005
"""Foretold gain of a change below which it is not even part of a larger one."""
LEAST_NOISE = 0.05
"""Of what there is: noise of groups alone does not add up so well that all could be foretold away."""
CONVERSION_NS = 0.2
"""Guess of what a value costs that is converted at a border; it orders proposals and decides nothing."""
PROBES_DIFFER_DB = 1.0
"""The few probes of a quick look may be this much cleaner or noisier than all."""
SHARES_FOR_NOISE = (0.5, 0.75, 0.9)
"""Of the budget, until which groups are measured alone before forms are tried, in turns."""
REPAIR_SECONDS = 60.0
"""For finding which groups keep the cheapest form from being accurate, where one is not."""

Forms = Mapping[str, Precision]
Noise = dict[tuple[str, Precision], float]
"""Noise power over signal power that a group in a form brings to the outputs, alone."""


@dataclass(frozen=True, slots=True)
class Task:
    """How long a search may take, what it may do, and who is told how it goes."""

    seconds: float
    improves: bool
    """Not only repairs what is not accurate, but looks for what is better than what is."""
    elements: Mapping[str, int]
    """Sizes of activations by name, to guess what conversions cost."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


class Move(NamedTuple):
    """A change of one group's form, and what it is foretold to do."""

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
    """Why a repair kept a group from the precision that a candidate had for it."""
    return Reason(Cause.NOISIER, f"too noisy as {method}")


@dataclass(slots=True)
class Search:
    """What a search works with; see :func:`search`."""

    board: Leaderboard
    clock: _Clock
    whole: Mapping[Precision, Trial]
    """Forms of the whole model by their method."""
    noise: Noise = field(default_factory=dict)
    us: dict[Precision, Mapping[str, float | None]] = field(default_factory=dict)
    failed: set[tuple[str, Precision]] = field(default_factory=set)
    """Groups and forms that could not be measured alone."""

    @property
    def groups(self) -> Sequence[FusionGroup]:
        """All of the model."""
        return self.board.problem.groups

    @property
    def original_us(self) -> float:
        """A run of the original."""
        method, trial = next(iter(self.whole.items()))
        return _value(self.us[method], RUN) * trial.speedup

    def time_groups(self) -> None:
        """Time groups in all forms of the whole model."""
        for method, trial in self.whole.items():
            self.us[method] = self.board.bench.group_us(trial, self.groups)

    def measure_noise(self, share: float) -> None:
        """Find the noise of each group in each form alone, up to a ``share`` of the budget."""
        plain = {u.name: Request(Precision.FLOAT) for u in self.groups}
        for group, method in self.unknown():
            if not self.clock.left(share):
                return
            self.clock.tell(f"group {group.name} alone")
            _, model = self.board.problem.form({**plain, group.name: Request(method)})
            try:
                self.noise[group.name, method] = self.board.bench.noise(model)
            except FAILURES as error:
                self.failed.add((group.name, method))
                self.board.refuse(f"{group.name} as {method}, alone", error, of_units=False)

    def unknown(self) -> list[tuple[FusionGroup, Precision]]:
        """Groups and forms whose noise is yet to be measured."""
        methods = (Precision.STATIC, Precision.DYNAMIC, Precision.WEIGHT_ONLY)
        every = ((group, method) for method in methods for group in self._movable(method))
        known = self.noise.keys() | self.failed
        return [(group, method) for group, method in every if (group.name, method) not in known]

    def _movable(self, method: Precision) -> Iterator[FusionGroup]:
        trial = self.whole.get(method)
        forms = _forms(trial) if trial is not None else {}
        for group in self.groups:
            if (
                group.role is Role.HEAVY
                and group.name not in self.board.problem.fixed
                and forms.get(group.name) is method
            ):
                yield group

    def moves(self, best: Trial) -> list[Move]:
        """Changes that should make ``best`` cheaper by what was measured, one for each group."""
        forms, total_us = _forms(best), self.original_us / best.speedup
        noise = 10 ** (-best.compared.sqnr_db / 10)
        found = []
        for group in self._movable_at_all():
            now = forms[group.name]
            options = []
            for method in self.us:
                if method is now or (group.name, method) not in self._known(now):
                    continue
                us = total_us + self._us(group, method, forms) - self._us(group, now, forms)
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
        """Forms that a group may take: those measured, where its present form is measured as well."""
        measured = {name for name, method in self.noise if method is now}
        if now in (Precision.FLOAT, Precision.WEIGHT_ONLY, Precision.STORED):
            measured = {name for name, _ in self.noise}
        known = {(name, method) for name, method in self.noise if name in measured}
        return known | {(name, Precision.FLOAT) for name in measured if Precision.WEIGHT_ONLY not in self.us}

    def _noise(self, name: str, method: Precision) -> float:
        same = Precision.WEIGHT_ONLY if method is Precision.STORED else method
        return self.noise.get((name, same), 0.0)

    def _us(self, group: FusionGroup, method: Precision, forms: Forms) -> float:
        """Microseconds of the group in a form, with conversions at its borders to ``forms`` around it."""
        own = _value(self.us[method], group.name)
        integer = method is Precision.STATIC
        around = (*_sources(group, self.groups), *_readers(group, self.groups))
        crossings = sum((forms[other.name] is Precision.STATIC) is not integer for other in around)
        return own + crossings * _elements(group, self.clock.task.elements) * CONVERSION_NS * 1e-3

    def improve(self, best: Trial) -> Trial:
        """``best`` with groups in other forms, as many at a time as are foretold to gain."""
        board: set[frozenset[tuple[str, Precision]]] = set()
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
            if key not in board:
                board.add(key)
                trial = self._changed(best, batch)
                if trial is not None and self._better(trial, best):
                    best, moves, singles = trial, self.moves(trial), 0
                    size = len(moves)
                    continue
            size //= 2
        return best

    def repair(self, cheap: Trial, best: Trial) -> Trial:
        """``cheap``, which is not accurate enough, with the fewest noisy groups in float that make it so.

        Gives ``best`` where none of that is cheaper. Groups leave in the order of the noise that a
        microsecond buys off.
        """
        forms = _forms(cheap)
        stored = _forms(self.whole[Precision.WEIGHT_ONLY]) if Precision.WEIGHT_ONLY in self.whole else {}
        noisy = []
        for name in (u.name for u in self._movable_at_all() if forms[u.name] is not Precision.FLOAT):
            now = forms[name]
            # Weights alone bring so little noise that it need not be known.
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
            # Doubled until enough, then halved between the bounds.
            count = min(count * 2, len(noisy)) if enough > len(noisy) else (too_few + enough) // 2
            if count in (too_few, enough):
                break
        return taken

    def _may_do(self, trial: Trial, batch: Sequence[Move]) -> bool:
        """Whether ``trial`` so changed is accurate: on a few probes nearly, then on the evaluation data."""
        self.clock.tell("search")
        _, model = self.board.problem.form(_changed_methods(trial, batch))
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
        """What was measured of groups alone, for the report."""
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
    """The cheapest accurate form found within the budget, what each group does alone, and notes.

    ``best``: the cheapest accurate one of those that were ``board``; where a cheaper one is not accurate, it
    is repaired first. The same measurements give the same result: nothing here is random. What the runtime
    does not run is told to ``board``, and not taken.
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
    """What the form ``trial`` is called with ``batch`` changed."""
    return trial.name.change([(m.group, m.method) for m in batch])


def _changed_methods(trial: Trial, batch: Sequence[Move]) -> Precisions:
    return {**trial.methods, **{m.group: Request(m.method, m.reason) for m in batch}}


def _forms(trial: Trial) -> dict[str, Precision]:
    return {u.group.name: u.precision for u in trial.plan.groups}


def _value(figures: Mapping[str, float | None], name: str) -> float:
    return figures.get(name) or 0.0


def _sources(group: FusionGroup, groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    return [other for other in groups if set(other.outputs) & set(group.inputs)]


def _readers(group: FusionGroup, groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    return [other for other in groups if set(other.inputs) & set(group.outputs)]


def _elements(group: FusionGroup, shapes: Mapping[str, int]) -> int:
    return max((shapes.get(name, 0) for name in (*group.inputs, *group.outputs)), default=0)
