"""The passes of a recipe, one after another, and a file of the model after each."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgepack.compression.material import PassInputs
from edgepack.compression.table import PASSES
from edgepack.config.passes import Pass, step_names
from edgepack.config.strict_yaml import Strict
from edgepack.config.training import Tune
from edgepack.graph.tied_embeddings import one_copy
from edgepack.ir.files import save_model
from edgepack.results import Notes

Stage = Callable[[str], AbstractContextManager[Notes]]
"""Opens a stage of the build; gives a list for what it has to say."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """The model after all passes, and a file of the model after each by the name of the step."""

    model: ir.Model
    files: dict[str, Path]


def run_passes(
    model: ir.Model, passes: tuple[Pass, ...], material: PassInputs, stage: Stage, folder: Path
) -> Compressed:
    """Carry out ``passes`` on ``model``, which is not changed; files go to ``folder``.

    Raises:
        ConfigError: settings that name what the model does not have.
        CalibrationError: the model fails on a sample.
    """
    files, original = {}, model
    for place, (name, entry) in enumerate(zip(step_names(passes), passes, strict=True)):
        clusters = next((p.cluster for p in passes[place + 1 :] if p.cluster is not None), None)
        with stage(name) as notes:
            model, told = _run(model, entry.settings, replace(material, clusters=clusters), original)
            notes.extend(told)
            notes.curve = told.curve
            files[name] = folder / f"after_{name.replace(' ', '_')}.onnx"
            save_model(one_copy(model), files[name])
    return Compressed(model, files)


def _run(
    model: ir.Model, settings: Strict, material: PassInputs, original: ir.Model
) -> tuple[ir.Model, Notes]:
    """One pass: a new model, and what there is to say of it."""
    if isinstance(settings, Tune):
        return _tune(model, settings, material, original)
    made, told = PASSES[type(settings)](model, settings, material)
    return made, Notes(told)


def _tune(
    model: ir.Model, settings: Tune, material: PassInputs, original: ir.Model
) -> tuple[ir.Model, Notes]:
    from edgepack.training.require import require_torch  # noqa: PLC0415  # an extra that most builds do without

    require_torch()
    from edgepack.training.report import curve_of, told  # noqa: PLC0415
    from edgepack.training.train import TrainingRun, tune  # noqa: PLC0415

    asked = _liked_by(material, settings)
    run = TrainingRun(material.seed, material.threads)
    made = tune(model, original, material.training, asked, run)
    return made.model, Notes(told(made), curve_of(made))


def _liked_by(material: PassInputs, settings: Tune) -> Tune:
    """Training that takes channels out leaves as many as the target's kernels like, unless told otherwise."""
    share, like = settings.sparsify, material.multiples
    if share is None or share.pattern != "channels" or share.multiple is not None:
        return settings
    told = share.model_copy(update={"multiple": max(like.dense, like.depthwise)})
    return settings.model_copy(update={"sparsify": told})
