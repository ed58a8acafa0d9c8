"""The problem that a selection solves, and the candidates measured so far."""

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

BuildCandidate = Callable[[Precisions], tuple[QuantPlan, ir.Model]]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What candidates are built from, the accuracy they must keep, and what is optimized."""

    groups: Sequence[FusionGroup]
    bench: TrialBench
    build: BuildCandidate
    """Builds a plan and a model from the precision of each group."""
    fixed: Precisions
    """Precisions that the recipe sets, by group."""
    floor: Floor
    verify: Callable[[Path], Fidelity]
    """Checks a file on the evaluation data."""
    optimize_for: str = "balance"
    on_trial: Callable[[str], None] = lambda name: None
    """Called with the name of the next candidate."""


@dataclass(slots=True)
class Leaderboard:
    """Measured candidates, their results on the evaluation data, and candidates that failed."""

    problem: Problem
    cost: Cost = field(init=False)
    trials: list[Trial] = field(default_factory=list)
    refused: list[Candidate] = field(default_factory=list)
    verdicts: dict[Path, Fidelity | None] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    """Why a candidate failed on the evaluation data."""

    def __post_init__(self) -> None:
        bench = self.problem.bench
        self.cost = Cost(self.problem.optimize_for, model_bytes(bench.original), bench.constant_db)

    @property
    def bench(self) -> TrialBench:
        """Measures candidates."""
        return self.problem.bench

    @property
    def least_db(self) -> float | None:
        """The limits of fidelity as one SQNR in dB, where there are any."""
        return self.problem.floor.least_db(self.bench.constant_db)

    def measure(self, name: CandidateName, methods: Precisions) -> Trial:
        """Build and measure a candidate.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        self.problem.on_trial(str(name))
        trial = self.bench.measure(name, methods, *self.problem.build(methods))
        self.trials.append(trial)
        return trial

    def attempt(self, name: CandidateName, methods: Precisions) -> Trial | None:
        """Like :meth:`measure`, but ``None`` where the runtime does not run it; keeps the reason."""
        try:
            return self.measure(name, methods)
        except FAILURES as error:
            self.refuse(str(name), error, of_units=bool(name.changed))
            return None

    def refuse(self, name: str, error: EdgepackError, *, of_units: bool) -> None:
        """Record a candidate that failed, and why; ``of_units``: it changes single groups."""
        self.refused.append(Candidate(name, None, None, None, None, False, str(error), of_units))

    def accurate(self, trial: Trial) -> bool:
        """Whether a candidate keeps the floor, on the probes and then on the evaluation data (run once)."""
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
        """Whether a model that was not timed keeps the floor on the evaluation data.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        floor = self.problem.floor
        with self.bench.written(model) as path:
            return not floor.limits_anything or floor.on_evaluation(self.problem.verify(path))

    def best(self) -> Trial:
        """The cheapest accurate candidate; checked in order of cost, since a check runs the evaluation data.

        Where none is accurate, the one with the highest fidelity on the probes.

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
        """The cost of a candidate, with its metric on the evaluation data where known."""
        return self.cost.judged(trial, self.problem.floor.lost(self.verdicts.get(trial.path)))

    def lines(self, chosen: Trial) -> list[Candidate]:
        """All candidates for the report."""
        return [*(self._line(trial, trial is chosen) for trial in self.trials), *self.refused]

    def _line(self, trial: Trial, chosen: bool) -> Candidate:
        verdict, reason = self.verdicts.get(trial.path), self.failures.get(trial.path, "")
        floor = self.problem.floor
        if not floor.on_probes(trial):
            reason = "below the least fidelity"
        elif verdict is not None and not floor.on_metric(verdict):
            reason = "loses more of the metric than the gate allows"
        elif not floor.on_evaluation(verdict):
            reason = "below the least fidelity on the evaluation data"
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
