"""The command ``edgepack tune``: trains a model file."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgepack.config.recipe import Recipe
from edgepack.config.strict_yaml import parse
from edgepack.config.training import Tune
from edgepack.data.samples import open_samples
from edgepack.errors import ConfigError
from edgepack.ir.files import load_model, require_float, save_model
from edgepack.ir.inputs import input_specs
from edgepack.training.train import TrainingRun, Tuned, tune
from edgepack.training.workers import joined


def tune_file(
    recipe: Recipe,
    base: Path,
    teacher: Path,
    output: Path,
    given: Mapping[str, Any],
    checkpoints: Path | None,
    progress: Callable[[str, int, int], None],
) -> Tuned | None:
    """Train the recipe's model and write it to ``output``; ``given`` overrides the recipe's settings.

    Returns ``None`` on workers other than the first; only the first writes the model.

    Raises:
        ConfigError: no samples, or the settings do not fit the model.
        ModelError: the model or its teacher cannot be read, or has operators without a gradient.
        ExportError: ``output`` cannot be written.
    """
    model, master = load_model(recipe.model), load_model(teacher)
    require_float(model, recipe.model)
    data = recipe.training_data or recipe.calibration_data
    if data is None:
        raise ConfigError("no samples: give them with --data, or as `training_data:` in the recipe")
    if output.resolve() in (recipe.model.resolve(), teacher.resolve()):
        raise ConfigError(f"{output}: is an input; inputs are never changed, choose another output file")
    samples = open_samples(data, "training", input_specs(model), recipe.images, base=base)
    asked = next((entry.tune for entry in recipe.passes if entry.tune is not None), Tune())
    settings = parse(Tune, {**asked.model_dump(exclude_unset=True), **given}, "tune")

    def on_step(done: int, total: int, text: str) -> None:
        progress(f"tune: {text}", done, total)

    with joined() as workers:
        threads = max(1, (os.cpu_count() or 1) // workers.local)
        run = TrainingRun(recipe.seed, threads, checkpoints, on_step, workers)
        made = tune(model, master, samples, settings, run)
    if not workers.first:
        return None
    output.parent.mkdir(parents=True, exist_ok=True)
    save_model(made.model, output)
    return made
