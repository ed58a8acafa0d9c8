"""Runs the passes of a recipe in order, and writes the model after each."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgepack.compression.pass_inputs import PassInputs
from edgepack.compression.table import PASSES
from edgepack.config.passes import Pass, step_names
from edgepack.config.strict_yaml import Strict
from edgepack.config.training import Tune
from edgepack.graph.tied_embeddings import one_copy
from edgepack.ir.files import save_model
from edgepack.results import Notes

Stage = Callable[[str], AbstractContextManager[Notes]]
"""Opens a stage of the build; gives a list for its notes."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """The model after all passes, and its file after each, by step name."""

    model: ir.Model
    files: dict[str, Path]


def run_passes(
    model: ir.Model, passes: tuple[Pass, ...], inputs: PassInputs, stage: Stage, folder: Path
) -> Compressed:
    """Run ``passes`` on ``model``, which is not changed; files go to ``folder``.

    Raises:
        ConfigError: settings name a node or tensor that the model does not have.
        CalibrationError: the model fails on a sample.
    """
    files, original = {}, model
    for place, (name, entry) in enumerate(zip(step_names(passes), passes, strict=True)):
        clusters = next((p.cluster for p in passes[place + 1 :] if p.cluster is not None), None)
        with stage(name) as notes:
            model, found = _run(model, entry.settings, replace(inputs, clusters=clusters), original)
            notes.extend(found)
            notes.curve = found.curve
            files[name] = folder / f"after_{name.replace(' ', '_')}.onnx"
            save_model(one_copy(model), files[name])
    return Compressed(model, files)


def _run(model: ir.Model, settings: Strict, inputs: PassInputs, original: ir.Model) -> tuple[ir.Model, Notes]:
    """Run one pass; return the new model and its notes for the report."""
    if isinstance(settings, Tune):
        return _tune(model, settings, inputs, original)
    made, lines = PASSES[type(settings)](model, settings, inputs)
    return made, Notes(lines)


def _tune(model: ir.Model, settings: Tune, inputs: PassInputs, original: ir.Model) -> tuple[ir.Model, Notes]:
    from edgepack.training.require import require_torch  # noqa: PLC0415  # an extra that most builds do without

    require_torch()
    from edgepack.training.report import curve_of, notes_of  # noqa: PLC0415
    from edgepack.training.train import TrainingRun, tune  # noqa: PLC0415

    settings = _with_target_multiple(inputs, settings)
    run = TrainingRun(inputs.seed, inputs.threads)
    made = tune(model, original, inputs.training, settings, run)
    return made.model, Notes(notes_of(made), curve_of(made))


def _with_target_multiple(inputs: PassInputs, settings: Tune) -> Tune:
    """``settings`` with the channel multiple that the target's kernels prefer, where it is unset."""
    share, like = settings.sparsify, inputs.multiples
    if share is None or share.pattern != "channels" or share.multiple is not None:
        return settings
    sparsify = share.model_copy(update={"multiple": max(like.dense, like.depthwise)})
    return settings.model_copy(update={"sparsify": sparsify})
