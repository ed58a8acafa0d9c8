"""From ranges to stored weights: each weight is rounded once for all candidates, and trained on request."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepack.calibration.ranges import RangeTable
from edgepack.config.recipe import Recipe
from edgepack.config.target import Target
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError
from edgepack.pipeline.progress import Clock
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.weights.low_bit import BitsOfGroups, LowBit
from edgepack.quantization.weights.out_of_core import round_to_files
from edgepack.quantization.weights.rounding import Rounded, Rounder, round_weights, with_trained
from edgepack.quantization.weights.saturation import ReducedRange

ROUNDING_SAMPLES = 32
"""Samples for the second moments of GPTQ; more samples change the result by less than its noise."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightRounding:
    """The inputs of weight rounding, besides samples."""

    recipe: Recipe
    target: Target
    model: ir.Model
    groups: Sequence[FusionGroup]
    table: RangeTable
    reduced_range: ReducedRange
    bits: BitsOfGroups
    large: bool

    def widest(self, low_bit: Mapping[str, LowBit]) -> QuantPlan:
        """The plan with every group in static int8 that can be; all candidates use its weights."""
        methods = {u.name: Request(Precision.STATIC) for u in self.groups}
        prepared = WeightPreparation(reduced_range=self.reduced_range, low_bit=low_bit)
        return make_plan(self.model, self.groups, self.table.ranges, self.target, methods, prepared)


def round_all(
    rounding_inputs: WeightRounding, samples: Samples, folder: Path, on_sample: Callable[[], None]
) -> Rounder:
    """Round every weight that a candidate may store; those of a large model are kept in ``folder``."""
    plan = rounding_inputs.widest(rounding_inputs.bits.low_bit)
    if rounding_inputs.large:
        return replace(
            round_to_files(rounding_inputs.model, plan, folder), low_bit=rounding_inputs.bits.low_bit
        )
    return round_weights(
        rounding_inputs.model,
        plan,
        samples,
        gptq=rounding_inputs.recipe.preset != "fast",
        threads=os.cpu_count() or 1,  # the host's: weights do not depend on the target's
        seed=rounding_inputs.recipe.seed,
        on_sample=on_sample,
    )


def rounding_note(rounder: Rounder, *, large: bool) -> str:
    """A note for the report."""
    by_gptq = 0 if large else len(rounder.rounded)
    return f"{by_gptq} weights by GPTQ, {len(rounder.means)} biases corrected"


def trained(
    rounding_inputs: WeightRounding, rounder: Rounder, samples: Samples, clock: Clock
) -> tuple[Rounder, RangeTable]:
    """Quantization-aware training of the rounded weights, where the recipe requests it.

    It trains the candidate with the most int8 kernels. Gives the rounder and the ranges of all later plans.

    Raises:
        ConfigError: torch is missing, the model is too large, or settings do not fit it.
        ModelError: the quantized graph has operators that cannot be trained.
    """
    settings = rounding_inputs.recipe.quantize.tune
    if settings is None:
        return rounder, rounding_inputs.table
    if rounding_inputs.large:
        raise ConfigError("quantize.tune: a large model is never in memory as a whole; remove the key")
    from edgepack.training.quantization_aware import train_integers  # noqa: PLC0415  # an extra that most builds do without
    from edgepack.training.train import TrainingRun  # noqa: PLC0415

    with clock.stage("tune int8") as notes:
        plan = rounding_inputs.widest(rounder.low_bit)
        run = TrainingRun(
            rounding_inputs.recipe.seed,
            os.cpu_count() or 1,
            on_step=lambda done, total, text: clock.progress(f"tune int8: {text}", done, total),
        )
        found = train_integers(
            rounding_inputs.model,
            plan,
            rounding_inputs.table.ranges,
            rounder,
            samples,
            settings,
            run,
        )
        notes.extend(found.notes)
        notes.curve = found.notes.curve
        table = replace(rounding_inputs.table, ranges=found.ranges)
        after = replace(rounding_inputs, table=table).widest(rounder.low_bit)
        stored = _of_these_scales(found.stored, plan, after)
        if len(stored) < len(found.stored):
            notes.append(f"{len(found.stored) - len(stored)} weights get other scales, and are rounded again")
    return with_trained(rounder, after, stored), table


def _of_these_scales(stored: Mapping[str, Rounded], plan: QuantPlan, after: QuantPlan) -> dict[str, Rounded]:
    """The trained weights whose scales the plan ``after`` training keeps; biases enlarge some scales."""
    before, now = ({u.group.name: u.weight for u in p.groups} for p in (plan, after))

    def same(name: str) -> bool:
        a, b = before[name], now[name]
        return a is not None and b is not None and np.array_equal(a.scale, b.scale)

    return {name: found for name, found in stored.items() if same(name)}
