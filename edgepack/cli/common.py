"""The application, and shared parts of its commands: options, the recipe, the progress bar."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepack import __version__
from edgepack.errors import ConfigError

if TYPE_CHECKING:
    from edgepack.config.recipe import Recipe
    from edgepack.pipeline.progress import Progress

app = typer.Typer(
    name="edgepack",
    help="Quantize an ONNX model to int8 for an edge device, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take most of the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_RECIPE = Path("edgepack.yaml")

ModelPath = Annotated[Path | None, typer.Argument(help="The float ONNX model. Default: the recipe's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TargetName = Annotated[
    str | None,
    typer.Option("--target", "-t", metavar="NAME", help="A target (see `edgepack targets`) or a .yaml file."),
]
RecipePath = Annotated[
    Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="Recipe. Default: ./edgepack.yaml.")
]
MetricName = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", help="The metric: top1, accuracy, auc, or module:function."),
]


def recipe_of(path: Path | None, changes: dict[str, Any], model: Path | None) -> tuple["Recipe", Path]:
    """The recipe and the folder that its references are relative to.

    Without ``path`` and ``model``, ``./edgepack.yaml`` is read. It is not read for a given ``model``: its
    data and limits may belong to another model.

    Raises:
        ConfigError: the recipe is wrong, or is given in the place of a model.
    """
    from edgepack.config.recipe import load_recipe

    if model is not None and model.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{model} is a recipe, not a model: give it with --recipe {model}")
    if path is None and model is None and DEFAULT_RECIPE.is_file():
        path = DEFAULT_RECIPE
    return load_recipe(path, changes), path.parent if path else Path()


def model_path(model: Path | None) -> Path:
    """``model``, or the recipe's."""
    if model is not None:
        return model
    return recipe_of(None, {}, None)[0].model


def is_recipes_own(model: Path) -> bool:
    """Whether ``./edgepack.yaml`` is the recipe of ``model``."""
    if not (DEFAULT_RECIPE.is_file() and model.exists()):
        return False
    own = recipe_of(None, {}, None)[0].model
    return own.exists() and own.samefile(model)


def first_target(recipe: "Recipe") -> str:
    """The recipe's first target, or x86-cpu."""
    return next(iter(recipe.target), "x86-cpu")


def data_of(path: str | None, samples: int | None) -> dict[str, Any] | None:
    """Sample data of the command line in the recipe's format."""
    changes = {"path": path, "samples": samples}
    return {k: v for k, v in changes.items() if v is not None} or None


@contextmanager
def progress_bar(quiet: bool) -> Iterator["Progress"]:
    """A progress bar on a terminal; none where standard error is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        row = bars.add_task("start", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bars.update(row, description=stage, completed=done, total=total or None)

        yield show


def _version(wanted: bool) -> None:
    if wanted:
        print(f"edgepack {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
