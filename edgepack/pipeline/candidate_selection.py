"""The candidates of a build, measured against the original."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgepack.calibration.ranges import RangeTable
from edgepack.data.samples import Samples
from edgepack.evaluation.check import Baseline, check
from edgepack.graph.compact import names_of
from edgepack.pipeline.job import Job, probes
from edgepack.pipeline.limits import floor_of, kept_measurements, limits, search_task
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precisions, QuantPlan
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder
from edgepack.quantization.weights.saturation import ReducedRange
from edgepack.results import Fidelity
from edgepack.selection.choose import Choice, choose
from edgepack.selection.leaderboard import Problem
from edgepack.selection.trials import TrialBench


@dataclass(frozen=True, slots=True, eq=False)
class Quantizable:
    """A float model with all inputs that its candidates are built from."""

    model: ir.Model
    """Normalized, after all passes."""
    groups: Sequence[FusionGroup]
    table: RangeTable
    reduced_range: ReducedRange
    rounder: Rounder

    def candidate(self, job: Job, methods: Precisions) -> tuple[QuantPlan, ir.Model]:
        """The plan and the model for the precisions in ``methods``."""
        rounder = self.rounder
        prepared = WeightPreparation(rounder.smoothing, self.reduced_range, rounder.low_bit)
        plan = make_plan(self.model, self.groups, self.table.ranges, job.target, methods, prepared)
        return plan, apply_plan(self.model, plan, rounder(plan))


def choose_candidate(
    job: Job, made: Quantizable, fixed: Precisions, calibration: Samples, reference: Baseline, scratch: Path
) -> Choice:
    """Choose a candidate; ``fixed`` are the precisions that the recipe sets.

    Raises:
        ModelError: the runtime runs no candidate, or not the requested one.
    """
    recipe, target, model = job.recipe, job.target, made.model
    device = target.model_copy(update={"runtime": target.runtime.as_on_device()})
    kept = kept_measurements(recipe, device, made.table)
    names = names_of(model)
    bench = TrialBench(recipe.model, device, probes(calibration), scratch, names, kept, timing=job.timing)

    def verify(path: Path) -> Fidelity:
        return check(path, reference)

    problem = Problem(
        groups=made.groups,
        bench=bench,
        build=lambda methods: made.candidate(job, methods),
        fixed=fixed,
        floor=floor_of(limits(recipe, target, reference.metric), reference.fidelity),
        verify=verify,
        optimize_for=recipe.quantize.optimize_for,
        on_trial=lambda name: job.progress(f"try {name}", 0, 0),
    )
    return choose(
        problem,
        method=recipe.quantize.method,
        by_group=not target.runtime.absent_optimizers,
        task=None if recipe.preset == "fast" or job.large else search_task(recipe, model, job.progress),
    )
