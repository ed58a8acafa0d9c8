"""The command tune."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgepack.cli.common import Json, ModelPath, RecipePath, app, data_of, progress_bar, recipe_of
from edgepack.errors import ConfigError


@app.command()
def tune(
    model: ModelPath = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The trained model.")] = Path(
        "tuned.onnx"
    ),
    teacher: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model to learn from. Default: the recipe's.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Training samples, as for build; labels are not needed."),
    ] = None,
    recipe: RecipePath = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Training time. Default: 600.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="COUNT", help="Maximum number of steps.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="COUNT", help="Samples per step. Default: 10.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Peak learning rate, relative to a channel's weights. Default: 0.001."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Number of threads. Default: all cores.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the log and checkpoints; a killed run resumes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model by knowledge distillation from a teacher.

    For a pruned or clustered model, whose zeros and shared values are kept, or for a smaller model. Settings
    without an option come from `tune:` in the recipe's passes. Under torchrun (or with its environment
    variables) several processes or hosts share the samples of each step.
    """
    from edgepack.training.require import require_torch

    require_torch()
    given = {
        "budget_s": budget,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "threads": threads,
    }
    changes = {
        "model": str(model) if model else None,
        "training_data": data_of(data, None),
    }
    loaded, base = recipe_of(recipe, changes, model)
    chosen = teacher or (loaded.model if model is None else None)
    if chosen is None:
        raise ConfigError("no teacher: name the model to learn from with --teacher FILE")

    from edgepack.training.command import tune_file
    from edgepack.training.report import facts, text

    with progress_bar(as_json) as progress:
        made = tune_file(loaded, base, chosen, output, _given(given), checkpoints, progress)
    if made is None:  # a worker process: the first one prints the result
        return
    result = json.dumps(facts(made, str(output)), indent=1) if as_json else text(made, str(output))
    print(result, end="\n" if as_json else "")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
