"""Quantization-aware training as a stage of a build: the integers that a plan stores are trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.config.training import AwareTune
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError
from edgepack.ir.arrays import Array
from edgepack.ir.model import name_of
from edgepack.quantization.plan.types import Precision, QuantPlan
from edgepack.quantization.weights.rounding import Rounded
from edgepack.results import Notes
from edgepack.training.fake_quant import QuantizedStudent
from edgepack.training.held import Parameters
from edgepack.training.learned_scales import Scales, learned_ranges
from edgepack.training.report import curve_of, told
from edgepack.training.start import start_from
from edgepack.training.train import TrainingRun, tune
from edgepack.training.weights import trainables


@dataclass(frozen=True, slots=True, eq=False)
class TrainedIntegers:
    """What is stored after training, by group, the ranges that go with it, and what there is to say."""

    stored: Mapping[str, Rounded]
    ranges: Mapping[str, Range]
    notes: Notes


def train_integers(
    model: ir.Model,
    plan: QuantPlan,
    ranges: Mapping[str, Range],
    rounding: Callable[[QuantPlan], dict[str, Rounded]],
    samples: Samples,
    settings: AwareTune,
    run: TrainingRun,
) -> TrainedIntegers:
    """Train the integer graph of ``plan``, made of ``ranges``, from what ``rounding`` stores, to answer as
    ``model`` does.

    Weights and biases of groups with an integer form are trained; what else computes in float stays, since
    other forms of the model share it. A table that a product shares stays as well: both store one copy.

    Raises:
        ConfigError: settings that do not fit the model, or no weight has an integer form.
        ModelError: the integer graph has operators that cannot be trained; all are listed.
        CalibrationError: the model fails on a sample.
    """
    given = rounding(plan)
    start = start_from(model, plan, given)
    keep = _others(start.model, plan)
    students: list[QuantizedStudent] = []

    def form(begun: ir.Model, held: Parameters) -> QuantizedStudent:
        students.append(QuantizedStudent(begun, held, plan, start, learn_ranges=settings.learn_ranges))
        return students[-1]

    training = settings.model_copy(update={"keep": (*settings.keep, *keep)})
    made = tune(start.model, model, samples, training, run, form)
    stored = start.stored(made.model)
    changed = sum(int((stored[n].integers != given[n].integers).sum()) for n in stored)
    values = sum(stored[n].integers.size for n in stored)
    share = f"{changed / max(values, 1):.1%} of {values} stored weights are others than rounding gave"
    scales = students[-1].scales
    notes = Notes([*told(made), share, *_scales_note(scales, made.apart)], curve_of(made))
    return TrainedIntegers(stored, learned_ranges(plan, ranges, scales, made.apart), notes)


def _scales_note(scales: Scales, content: Mapping[str, Array]) -> list[str]:
    if not scales:
        return []
    ratios = [scale.ratio(content[scale.key]) for scale in scales.values()]
    return [f"{len(ratios)} scales trained, now {min(ratios):.2f} to {max(ratios):.2f} of what they were"]


def _others(model: ir.Model, plan: QuantPlan) -> list[str]:
    """Patterns of the constants that no integer group stores alone."""
    nodes = {n.name: n for n in model.graph}
    own: set[str] = set()
    for group_plan in plan.of(Precision.STATIC):
        group = group_plan.group
        if group_plan.weight is None or group.table is not None:
            continue
        slots = (1, 2) if group.bias else (1,)
        read = (nodes[group.name].inputs[slot] for slot in slots)
        own |= {name_of(value) for value in read if value is not None}
    found = trainables(model)
    if own.isdisjoint(found):
        raise ConfigError(
            "quantize.tune: no weight of this model has an integer form on this target; remove the key"
        )
    # Names of exporters have brackets, which would be taken for a set of characters.
    return [key.replace("[", "[[]") for key in found if key not in own]
