"""The splits of a build: samples to calibrate with, to train on, and to evaluate with."""

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgepack.config.recipe import Recipe
from edgepack.config.target import Target
from edgepack.data.feeds import open_dims, with_sizes
from edgepack.data.samples import Samples, check_disjoint, open_samples
from edgepack.errors import ConfigError, did_you_mean
from edgepack.ir.inputs import InputSpec, input_specs

HELD_OUT = 5
"""Without evaluation data one calibration sample in this many is held out for evaluation."""


@dataclass(frozen=True, slots=True)
class Splits:
    """The samples of a build; evaluation shares none with the other splits."""

    calibration: Samples
    training: Samples
    evaluation: Samples
    notes: tuple[str, ...]


def open_splits(recipe: Recipe, target: Target, base: Path, model: ir.Model) -> Splits:
    """The samples of ``recipe`` for ``model``; ``module:function`` is relative to ``base``.

    Raises:
        ConfigError: no calibration data, labels are missing, or a size is given for a dimension that is not
        dynamic.
        SamplesError: the data are missing, broken, or do not fit the model.
    """
    inputs = _inputs(recipe, target, model)
    if recipe.calibration_data is None:
        raise ConfigError(
            "no calibration data: give sample inputs with --calibration-data FOLDER_OR_FILE, or "
            "`calibration_data:` in the recipe"
        )
    calibration = open_samples(recipe.calibration_data, "calibration", inputs, recipe.images, base=base)
    if recipe.evaluation_data is not None:
        evaluation = open_evaluation(recipe, target, base, model)
        check_disjoint(calibration, evaluation)
        return Splits(calibration, _training(recipe, inputs, base, calibration, evaluation), evaluation, ())
    if recipe.metric:
        raise ConfigError("the recipe names a metric but no evaluation_data with labels")
    if len(calibration) < 2:
        raise ConfigError(
            f"{calibration.source}: holds one sample; without evaluation data at least two are needed, one "
            "to calibrate and one to check"
        )
    kept = calibration.indices[HELD_OUT - 1 :: HELD_OUT] or calibration.indices[-1:]
    rest = tuple(i for i in calibration.indices if i not in set(kept))
    note = f"no evaluation data: {len(kept)} of {len(calibration)} calibration samples kept for the check"
    calibration, evaluation = replace(calibration, indices=rest), replace(calibration, indices=kept)
    training = _training(recipe, inputs, base, calibration, evaluation)
    return Splits(calibration, training, evaluation, (note,))


def _training(
    recipe: Recipe, inputs: tuple[InputSpec, ...], base: Path, calibration: Samples, evaluation: Samples
) -> Samples:
    """The samples to train on: those of ``training_data``, or the calibration samples."""
    if recipe.training_data is None:
        return calibration
    training = open_samples(recipe.training_data, "training", inputs, recipe.images, base=base)
    check_disjoint(training, evaluation)
    return training


def open_evaluation(recipe: Recipe, target: Target, base: Path, model: ir.Model) -> Samples:
    """The evaluation samples of a build with ``recipe``.

    Raises:
        ConfigError, SamplesError: see :func:`open_splits`; calibration data are needed only if the evaluation
            samples are taken from them.
    """
    if recipe.evaluation_data is None:
        return open_splits(recipe, target, base, model).evaluation
    inputs = _inputs(recipe, target, model)
    return open_samples(recipe.evaluation_data, "evaluation", inputs, recipe.images, base=base)


def _inputs(recipe: Recipe, target: Target, model: ir.Model) -> tuple[InputSpec, ...]:
    """The specification of samples; if a ``.tflite`` is built, with the fixed sizes of ``tflite.dims``."""
    inputs = input_specs(model)
    if target.tflite is None or "tflite" not in target.formats:
        return inputs
    known = open_dims(inputs)
    for name in recipe.tflite.dims:
        if name not in known:
            raise ConfigError(
                f"tflite.dims: the model has no open dimension {name!r}, {did_you_mean(name, known)}"
            )
    return with_sizes(inputs, target.tflite.dims)
