"""What a selection works on, and what it has tried so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from edgepack.errors import EdgepackError, ModelError
from edgepack.ir.files import model_bytes
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.types import Precisions, QuantPlan
from edgepack.results import Candidate, Fidelity, finite
from edgepack.selection.candidates import CandidateName
from edgepack.selection.trials import FAILURES, Cost, Floor, Trial, TrialBench

Form = Callable[[Precisions], tuple[QuantPlan, ir.Model]]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What there is to choose from, what must be kept, and by what it is judged."""

    groups: Sequence[FusionGroup]
    bench: TrialBench
    form: Form
    """Makes a plan and a model from methods."""
    fixed: Precisions
    """What the recipe decided, by group."""
    floor: Floor
    verify: Callable[[Path], Fidelity]
    """Checks a file on the evaluation data."""
    optimize_for: str = "balance"
    on_trial: Callable[[str], None] = lambda name: None
    """Told what is tried next."""


@dataclass(slots=True)
class Leaderboard:
    """Candidates that were measured, what the evaluation data say of them, and what could not be measured."""

    problem: Problem
    cost: Cost = field(init=False)
    trials: list[Trial] = field(default_factory=list)
    refused: list[Candidate] = field(default_factory=list)
    verdicts: dict[Path, Fidelity | None] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    """Why the evaluation data could not be run on a candidate."""

    def __post_init__(self) -> None:
        bench = self.problem.bench
        self.cost = Cost(self.problem.optimize_for, model_bytes(bench.original), bench.constant_db)

    @property
    def bench(self) -> TrialBench:
        """Where candidates are measured."""
        return self.problem.bench

    @property
    def least_db(self) -> float | None:
        """The floor of fidelity in plain dB, where there is one."""
        return self.problem.floor.least_db(self.bench.constant_db)

    def measure(self, name: CandidateName, methods: Precisions) -> Trial:
        """Build and measure a candidate.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        self.problem.on_trial(str(name))
        trial = self.bench.measure(name, methods, *self.problem.form(methods))
        self.trials.append(trial)
        return trial

    def attempt(self, name: CandidateName, methods: Precisions) -> Trial | None:
        """The same, or ``None`` where the runtime does not run it; the reason is kept."""
        try:
            return self.measure(name, methods)
        except FAILURES as error:
            self.refuse(str(name), error, of_units=bool(name.changed))
            return None

    def refuse(self, name: str, error: EdgepackError, *, of_units: bool) -> None:
        """Keep what could not be measured, and why; ``of_units``: it differs in single groups."""
        self.refused.append(Candidate(name, None, None, None, None, False, str(error), of_units))

    def accurate(self, trial: Trial) -> bool:
        """Whether a candidate keeps the floor, on the probes and then on the evaluation data, asked once."""
        floor = self.problem.floor
        if not floor.on_probes(trial) or trial.path in self.failures:
            return False
        if trial.path not in self.verdicts:
            self.problem.on_trial(f"check {trial.name}")
            try:
                found = self.problem.verify(trial.path) if floor.limits_anything else None
            except FAILURES as error:
                self.failures[trial.path] = str(error)
                return False
            self.verdicts[trial.path] = found
        return floor.on_evaluation(self.verdicts[trial.path])

    def keeps(self, model: ir.Model) -> bool:
        """Whether a candidate that was not measured keeps the floor on the evaluation data.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        floor = self.problem.floor
        with self.bench.written(model) as path:
            return not floor.limits_anything or floor.on_evaluation(self.problem.verify(path))

    def best(self) -> Trial:
        """The cheapest accurate candidate; accuracy is asked in order of cost, since asking takes a run.

        Where none is accurate, that of the highest fidelity on the probes.

        Raises:
            ModelError: the runtime runs none of them, with all reasons.
        """
        for trial in sorted(self.trials, key=self.cost):
            if self.accurate(trial):
                return trial
        left = [trial for trial in self.trials if trial.path not in self.failures]
        if not left:
            reasons = [f"{t.name}: {self.failures[t.path]}" for t in self.trials]
            raise ModelError("; ".join([*reasons, *(f"{line.name}: {line.reason}" for line in self.refused)]))
        return max(left, key=lambda trial: trial.compared.sqnr_db)

    def judged(self, trial: Trial) -> float:
        """The cost of a candidate by what the evaluation data say of it."""
        return self.cost.judged(trial, self.problem.floor.lost(self.verdicts.get(trial.path)))

    def lines(self, chosen: Trial) -> list[Candidate]:
        """All of it for the report."""
        return [*(self._line(trial, trial is chosen) for trial in self.trials), *self.refused]

    def _line(self, trial: Trial, chosen: bool) -> Candidate:
        verdict, reason = self.verdicts.get(trial.path), self.failures.get(trial.path, "")
        floor = self.problem.floor
        if not floor.on_probes(trial):
            reason = "below the floor of fidelity"
        elif verdict is not None and not floor.on_metric(verdict):
            reason = "loses more of the metric than the gate allows"
        elif not floor.on_evaluation(verdict):
            reason = "below the floor of fidelity on the evaluation data"
        return Candidate(
            name=str(trial.name),
            size_bytes=trial.size_bytes,
            speedup=trial.speedup,
            sqnr_db=finite(trial.compared.sqnr_db),
            metric=verdict.metric if verdict is not None else None,
            chosen=chosen,
            reason=reason,
            of_units=bool(trial.name.changed),
        )
