"""What a choice has tried so far: forms that were measured, and what the runtime refused to do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from edgepack.errors import EdgepackError, ModelError
from edgepack.quantization.plan.types import QuantPlan
from edgepack.results import Candidate, Fidelity, finite
from edgepack.selection.trials import FAILURES, WITH, Cost, Floor, Methods, Trial, TrialBench

Form = Callable[[Methods], tuple[QuantPlan, ir.Model]]


@dataclass(slots=True)
class Tried:
    """Forms that were measured, what the evaluation data say of them, and what could not be measured."""

    bench: TrialBench
    form: Form
    """Makes a plan and a model from methods."""
    floor: Floor
    cost: Cost
    verify: Callable[[Path], Fidelity]
    """Checks a file on the evaluation data."""
    on_trial: Callable[[str], None]
    trials: list[Trial] = field(default_factory=list)
    refused: list[Candidate] = field(default_factory=list)
    verdicts: dict[Path, Fidelity | None] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    """Why the evaluation data could not be run on a form."""

    def measure(self, name: str, methods: Methods) -> Trial:
        """Build and measure a form.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        self.on_trial(name)
        trial = self.bench.measure(name, methods, *self.form(methods))
        self.trials.append(trial)
        return trial

    def attempt(self, name: str, methods: Methods) -> Trial | None:
        """The same, or ``None`` where the runtime does not run it; the reason is kept."""
        try:
            return self.measure(name, methods)
        except FAILURES as error:
            self.refuse(name, error)
            return None

    def refuse(self, name: str, error: EdgepackError) -> None:
        """Keep what could not be measured, and why."""
        self.refused.append(Candidate(name, None, None, None, None, False, str(error), WITH in name))

    def accurate(self, trial: Trial) -> bool:
        """Whether a form keeps the floor, on the probes and then on the evaluation data, asked once."""
        if not self.floor.on_probes(trial) or trial.path in self.failures:
            return False
        if trial.path not in self.verdicts:
            self.on_trial(f"check {trial.name}")
            try:
                found = self.verify(trial.path) if self.floor.limits_anything else None
            except FAILURES as error:
                self.failures[trial.path] = str(error)
                return False
            self.verdicts[trial.path] = found
        return self.floor.on_evaluation(self.verdicts[trial.path])

    def keeps(self, model: ir.Model) -> bool:
        """Whether a form that was not measured keeps the floor on the evaluation data.

        Raises:
            ModelError, ExportError: the runtime does not run it.
        """
        with self.bench.written(model) as path:
            return not self.floor.limits_anything or self.floor.on_evaluation(self.verify(path))

    def best(self) -> Trial:
        """The cheapest accurate form; accuracy is asked in order of cost, since asking takes a run.

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
        """The cost of a form by what the evaluation data say of it."""
        return self.cost.judged(trial, self.floor.lost(self.verdicts.get(trial.path)))

    def lines(self, chosen: Trial) -> list[Candidate]:
        """All of it for the report."""
        return [*(self._line(trial, trial is chosen) for trial in self.trials), *self.refused]

    def _line(self, trial: Trial, chosen: bool) -> Candidate:
        verdict, reason = self.verdicts.get(trial.path), self.failures.get(trial.path, "")
        if not self.floor.on_probes(trial):
            reason = "below the floor of fidelity"
        elif verdict is not None and not self.floor.on_metric(verdict):
            reason = "loses more of the metric than the gate allows"
        elif not self.floor.on_evaluation(verdict):
            reason = "below the floor of fidelity on the evaluation data"
        return Candidate(
            trial.name,
            trial.size_bytes,
            trial.speedup,
            finite(trial.compared.sqnr_db),
            verdict.metric if verdict is not None else None,
            chosen,
            reason,
            WITH in trial.name,
        )
