"""tune."""

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
        Path | None, typer.Option(metavar="FILE", help="The model to learn from; by default the recipe's.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Samples, as for build; labels are not needed.")
    ] = None,
    recipe: RecipePath = None,
    budget: Annotated[float | None, typer.Option(metavar="SECONDS", help="Time to train; 600.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="COUNT", help="End after so many steps.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="COUNT", help="Samples in a step; 10.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="At its highest, as a share of a channel's size; 0.001."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="COUNT", help="By default all cores.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Log and checkpoints; a killed run goes on."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model's weights to answer as its teacher does.

    For a pruned or clustered model, whose zeros and shared values stay, or for a smaller model. Settings that
    have no option are those of `tune:` in the recipe's passes. Started by torchrun, or with the environment
    variables that it sets, several processes or hosts divide the samples of each step.
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
    if made is None:  # what a worker made the first one tells of
        return
    told = json.dumps(facts(made, str(output)), indent=1) if as_json else text(made, str(output))
    print(told, end="\n" if as_json else "")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
