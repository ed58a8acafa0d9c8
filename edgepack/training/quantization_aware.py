"""Quantization-aware training (QAT) as a stage of a build: trains the integer weights that a plan stores."""

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
from edgepack.training.learned_scales import Scales, learned_ranges
from edgepack.training.parameters import Parameters
from edgepack.training.report import curve_of, notes_of
from edgepack.training.start import start_from
from edgepack.training.train import TrainingRun, tune
from edgepack.training.weights import trainables


@dataclass(frozen=True, slots=True, eq=False)
class TrainedIntegers:
    """Result of QAT: integer weights by fusion group, activation ranges, and notes for the report."""

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
    """Train the quantized graph of ``plan`` to reproduce the outputs of the float ``model`` (its teacher).

    ``plan`` was made from ``ranges``; training starts from the integers of ``rounding``. Weights and biases
    of fusion groups with static int8 precision are trained. Float weights are not, because all candidates
    share them; neither is an embedding table tied to a MatMul, because both use one stored copy.

    Raises:
        ConfigError: the settings do not fit the model, or no weight is quantized statically.
        ModelError: the quantized graph has operators without a gradient; all are listed.
        CalibrationError: the model fails on a sample.
    """
    given = rounding(plan)
    start = start_from(model, plan, given)
    keep = _others(start.model, plan)
    students: list[QuantizedStudent] = []

    def make_student(begun: ir.Model, parameters: Parameters) -> QuantizedStudent:
        students.append(QuantizedStudent(begun, parameters, plan, start, learn_ranges=settings.learn_ranges))
        return students[-1]

    training = settings.model_copy(update={"keep": (*settings.keep, *keep)})
    made = tune(start.model, model, samples, training, run, make_student)
    stored = start.stored(made.model)
    changed = sum(int((stored[n].integers != given[n].integers).sum()) for n in stored)
    values = sum(stored[n].integers.size for n in stored)
    share = f"{changed / max(values, 1):.1%} of {values} stored weights differ from those of rounding"
    scales = students[-1].scales
    notes = Notes([*notes_of(made), share, *_scales_note(scales, made.apart)], curve_of(made))
    return TrainedIntegers(stored, learned_ranges(plan, ranges, scales, made.apart), notes)


def _scales_note(scales: Scales, content: Mapping[str, Array]) -> list[str]:
    if not scales:
        return []
    ratios = [scale.ratio(content[scale.key]) for scale in scales.values()]
    low, high = min(ratios), max(ratios)
    return [f"{len(ratios)} activation scales trained, now {low:.2f} to {high:.2f} times the calibrated ones"]


def _others(model: ir.Model, plan: QuantPlan) -> list[str]:
    """Name patterns of the trainable constants that do not belong to exactly one static int8 group."""
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
            "quantize.tune: no weight of this model runs in static int8 on this target; remove the key"
        )
    # Exporters write brackets in names; fnmatch would read them as a character set.
    return [key.replace("[", "[[]") for key in found if key not in own]
