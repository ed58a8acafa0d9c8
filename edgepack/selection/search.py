"""The search: forms for single units, where one form for all of a kind is not the best there is.

Each unit is measured alone, for the noise that its integer form brings to the outputs of an otherwise float
model, and for its time in every form of the whole model. Noise powers of independent roundings add up and
times nearly do, so the gain of a change can be foretold; what is foretold only decides what is tried, and
what is tried is built, timed side by side with the best so far, and taken when it is better beyond noise.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgepack.quantization.groups import Role, Unit
from edgepack.quantization.plan.types import Method, Methods, Request
from edgepack.results import Cause, Reason, SensitivityRow, finite
from edgepack.selection.candidates import CandidateName
from edgepack.selection.leaderboard import Tried
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
"""Of what there is: noise of units alone does not add up so well that all could be foretold away."""
CONVERSION_NS = 0.2
"""Guess of what a value costs that is converted at a border; it orders proposals and decides nothing."""
PROBES_DIFFER_DB = 1.0
"""The few probes of a quick look may be this much cleaner or noisier than all."""
SHARES_FOR_NOISE = (0.5, 0.75, 0.9)
"""Of the budget, until which units are measured alone before forms are tried, in turns."""
REPAIR_SECONDS = 60.0
"""For finding which units keep the cheapest form from being accurate, where one is not."""

Forms = Mapping[str, Method]
Noise = dict[tuple[str, Method], float]
"""Noise power over signal power that a unit in a form brings to the outputs, alone."""


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
    """A change of one unit's form, and what it is foretold to do."""

    gain: float
    unit: str
    method: Method
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


def too_noisy(method: Method) -> Reason:
    """Why a repair kept a unit from the precision that a candidate had for it."""
    return Reason(Cause.NOISIER, f"too noisy as {method}")


@dataclass(slots=True)
class Search:
    """What a search works with; see :func:`search`."""

    tried: Tried
    clock: _Clock
    whole: Mapping[Method, Trial]
    """Forms of the whole model by their method."""
    noise: Noise = field(default_factory=dict)
    us: dict[Method, Mapping[str, float | None]] = field(default_factory=dict)
    failed: set[tuple[str, Method]] = field(default_factory=set)
    """Units and forms that could not be measured alone."""

    @property
    def units(self) -> Sequence[Unit]:
        """All of the model."""
        return self.tried.problem.units

    @property
    def original_us(self) -> float:
        """A run of the original."""
        method, trial = next(iter(self.whole.items()))
        return _value(self.us[method], RUN) * trial.speedup

    def time_units(self) -> None:
        """Time units in all forms of the whole model."""
        for method, trial in self.whole.items():
            self.us[method] = self.tried.bench.unit_us(trial, self.units)

    def measure_noise(self, share: float) -> None:
        """Find the noise of each unit in each form alone, up to a ``share`` of the budget."""
        plain = {u.name: Request(Method.FLOAT) for u in self.units}
        for unit, method in self.unknown():
            if not self.clock.left(share):
                return
            self.clock.tell(f"unit {unit.name} alone")
            _, model = self.tried.problem.form({**plain, unit.name: Request(method)})
            try:
                self.noise[unit.name, method] = self.tried.bench.noise(model)
            except FAILURES as error:
                self.failed.add((unit.name, method))
                self.tried.refuse(f"{unit.name} as {method}, alone", error, of_units=False)

    def unknown(self) -> list[tuple[Unit, Method]]:
        """Units and forms whose noise is yet to be measured."""
        methods = (Method.STATIC, Method.DYNAMIC, Method.WEIGHT_ONLY)
        every = ((unit, method) for method in methods for unit in self._movable(method))
        known = self.noise.keys() | self.failed
        return [(unit, method) for unit, method in every if (unit.name, method) not in known]

    def _movable(self, method: Method) -> Iterator[Unit]:
        trial = self.whole.get(method)
        forms = _forms(trial) if trial is not None else {}
        for unit in self.units:
            if (
                unit.role is Role.HEAVY
                and unit.name not in self.tried.problem.fixed
                and forms.get(unit.name) is method
            ):
                yield unit

    def moves(self, best: Trial) -> list[Move]:
        """Changes of single units that are foretold to make ``best`` cheaper, the best one for each unit."""
        forms, total_us = _forms(best), self.original_us / best.speedup
        noise = 10 ** (-best.compared.sqnr_db / 10)
        found = []
        for unit in self._movable_at_all():
            now = forms[unit.name]
            options = []
            for method in self.us:
                if method is now or (unit.name, method) not in self._known(now):
                    continue
                us = total_us + self._us(unit, method, forms) - self._us(unit, now, forms)
                power = noise + self._noise(unit.name, method) - self._noise(unit.name, now)
                ratio = us / total_us
                after, before = trial_db(max(power, noise * LEAST_NOISE)), best.compared.sqnr_db
                ratio *= self.tried.cost.of_noise(after) / self.tried.cost.of_noise(before)
                options.append(
                    Move(1 - ratio, unit.name, method, Reason(Cause.FASTER, f"measured better than {now}"))
                )
            if options and (move := max(options)).gain > LEAST_GAIN:
                found.append(move)
        return sorted(found, reverse=True)

    def _movable_at_all(self) -> Iterator[Unit]:
        seen = set()
        for method in self.whole:
            for unit in self._movable(method):
                if unit.name not in seen:
                    seen.add(unit.name)
                    yield unit

    def _known(self, now: Method) -> set[tuple[str, Method]]:
        """Forms that a unit may take: those measured, where its present form is measured as well."""
        measured = {name for name, method in self.noise if method is now}
        if now in (Method.FLOAT, Method.WEIGHT_ONLY, Method.STORED):
            measured = {name for name, _ in self.noise}
        known = {(name, method) for name, method in self.noise if name in measured}
        return known | {(name, Method.FLOAT) for name in measured if Method.WEIGHT_ONLY not in self.us}

    def _noise(self, name: str, method: Method) -> float:
        same = Method.WEIGHT_ONLY if method is Method.STORED else method
        return self.noise.get((name, same), 0.0)

    def _us(self, unit: Unit, method: Method, forms: Forms) -> float:
        """Microseconds of the unit in a form, with conversions at its borders to ``forms`` around it."""
        own = _value(self.us[method], unit.name)
        integer = method is Method.STATIC
        around = (*_sources(unit, self.units), *_readers(unit, self.units))
        crossings = sum((forms[other.name] is Method.STATIC) is not integer for other in around)
        return own + crossings * _elements(unit, self.clock.task.elements) * CONVERSION_NS * 1e-3

    def improve(self, best: Trial) -> Trial:
        """``best`` with units in other forms, as many at a time as are foretold to gain."""
        tried: set[frozenset[tuple[str, Method]]] = set()
        moves = self.moves(best)
        size = len(moves)
        singles = 0
        while moves and self.clock.left():
            batch = moves[:size] if size else moves[singles : singles + 1]
            if not size:
                singles += 1
                if not batch or batch[0].gain < WORTH_TRYING:
                    break
            key = frozenset((m.unit, m.method) for m in batch)
            if key not in tried:
                tried.add(key)
                trial = self._changed(best, batch)
                if trial is not None and self._better(trial, best):
                    best, moves, singles = trial, self.moves(trial), 0
                    size = len(moves)
                    continue
            size //= 2
        return best

    def repair(self, cheap: Trial, best: Trial) -> Trial:
        """``cheap``, which is not accurate enough, with the fewest noisy units in float that make it so.

        Gives ``best`` where none of that is cheaper. Units leave in the order of the noise that a
        microsecond buys off.
        """
        forms = _forms(cheap)
        stored = _forms(self.whole[Method.WEIGHT_ONLY]) if Method.WEIGHT_ONLY in self.whole else {}
        noisy = []
        for name in (u.name for u in self._movable_at_all() if forms[u.name] is not Method.FLOAT):
            now = forms[name]
            # Weights alone bring so little noise that it need not be known.
            to = Method.WEIGHT_ONLY if stored.get(name) is Method.WEIGHT_ONLY else Method.FLOAT
            saved = self._noise(name, now) - self._noise(name, to)
            if saved > 0 and now is not to:
                noisy.append(Move(saved / self._price_us(name, now, to), name, to, too_noisy(now)))
        noisy.sort(reverse=True)
        enough, too_few, count = len(noisy) + 1, 0, 1
        taken = best
        while too_few + 1 < enough and count <= len(noisy) and self.clock.left():
            trial = self._changed(cheap, noisy[:count]) if self._may_do(cheap, noisy[:count]) else None
            if trial is not None and self.tried.accurate(trial):
                enough = count
                if self.tried.cost(trial) < self.tried.cost(taken) * (1 - SAME_SPEED):
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
        _, model = self.tried.problem.form(_changed_methods(trial, batch))
        try:
            if self.tried.least_db is not None:
                nearly = self.tried.least_db - PROBES_DIFFER_DB
                if trial_db(self.tried.bench.noise(model)) <= nearly:
                    return False
            return self.tried.keeps(model)
        except FAILURES as error:
            self.tried.refuse(str(_name(trial, batch)), error, of_units=True)
            return False

    def _price_us(self, name: str, now: Method, to: Method) -> float:
        us = self.us.get(to) or self.us.get(Method.FLOAT) or {}
        return max(_value(us, name) - _value(self.us.get(now, {}), name), 1.0)

    def _changed(self, trial: Trial, batch: Sequence[Move]) -> Trial | None:
        self.clock.tell("search")
        return self.tried.attempt(_name(trial, batch), _changed_methods(trial, batch))

    def _better(self, trial: Trial, best: Trial) -> bool:
        if self.tried.cost(trial) >= self.tried.cost(best) * (1 - SAME_SPEED) or not self.tried.accurate(
            trial
        ):
            return False
        advantage = self.tried.cost.apart_from_time(best) / self.tried.cost.apart_from_time(trial)
        return self.tried.bench.confirms(trial, best, advantage)

    def rows(self) -> tuple[SensitivityRow, ...]:
        """What was measured of units alone, for the report."""
        kinds = {u.name: u.op_type for u in self.units}
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
    tried: Tried, best: Trial, task: Task
) -> tuple[Trial, tuple[SensitivityRow, ...], tuple[str, ...]]:
    """The cheapest accurate form found within the budget, what each unit does alone, and notes.

    ``best``: the cheapest accurate one of those that were ``tried``; where a cheaper one is not accurate, it
    is repaired first. The same measurements give the same result: nothing here is random. What the runtime
    does not run is told to ``tried``, and not taken.
    """
    trials, cost = tuple(tried.trials), tried.cost
    whole = {m: t for t in reversed(trials) if t.name.is_whole and (m := t.name.whole.method) is not None}
    clock = _Clock(task, time.monotonic())
    state = Search(tried, clock, whole)
    state.time_units()
    state.measure_noise(SHARES_FOR_NOISE[0])
    cheaper = sorted((t for t in trials if cost(t) < cost(best)), key=cost)
    if cheaper and not tried.accurate(cheaper[0]):
        best = state.repair(cheaper[0], best)
    if task.improves:
        best = state.improve(best)
        for share in SHARES_FOR_NOISE[1:]:
            if state.unknown() and clock.left(share):
                state.measure_noise(share)
                best = state.improve(best)
    missing = len(state.unknown())
    notes = [f"{len(state.noise)} units measured alone" + (f", {missing} not" if missing else "")]
    if missing or not clock.left():
        notes.append(f"stopped by the budget of {task.seconds:g} s")
    if tried.bench.kept.reused:
        notes.append(f"{tried.bench.kept.reused} measurements of an earlier run used")
    return best, state.rows(), tuple(notes)


def _name(trial: Trial, batch: Sequence[Move]) -> CandidateName:
    """What the form ``trial`` is called with ``batch`` changed."""
    return trial.name.change([(m.unit, m.method) for m in batch])


def _changed_methods(trial: Trial, batch: Sequence[Move]) -> Methods:
    return {**trial.methods, **{m.unit: Request(m.method, m.reason) for m in batch}}


def _forms(trial: Trial) -> dict[str, Method]:
    return {u.unit.name: u.method for u in trial.plan.units}


def _value(figures: Mapping[str, float | None], name: str) -> float:
    return figures.get(name) or 0.0


def _sources(unit: Unit, units: Sequence[Unit]) -> list[Unit]:
    return [other for other in units if set(other.outputs) & set(unit.inputs)]


def _readers(unit: Unit, units: Sequence[Unit]) -> list[Unit]:
    return [other for other in units if set(other.inputs) & set(unit.outputs)]


def _elements(unit: Unit, shapes: Mapping[str, int]) -> int:
    return max((shapes.get(name, 0) for name in (*unit.inputs, *unit.outputs)), default=0)
