"""The command line: one command is one library call; only this module prints."""

import json
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepack import __version__
from edgepack.errors import ConfigError, EdgepackError, GateFailed

if TYPE_CHECKING:
    from edgepack.build import Progress
    from edgepack.config import Recipe

app = typer.Typer(
    name="edgepack",
    help="From an ONNX model and sample data to a measured int8 package for an edge device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes longer than all else that --help needs
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_RECIPE = Path("edgepack.yaml")
STOPPING = (signal.SIGINT, signal.SIGTERM)

ModelPath = Annotated[Path | None, typer.Argument(help="The float ONNX model; by default the recipe's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TargetName = Annotated[
    str | None,
    typer.Option("--target", "-t", metavar="NAME", help="A target (`edgepack targets`), or a .yaml file."),
]
RecipePath = Annotated[
    Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="Default: ./edgepack.yaml.")
]
MetricName = Annotated[
    str | None, typer.Option("--metric", metavar="NAME", help="top1, accuracy, auc, or module:function.")
]


@app.command()
def build(
    model: ModelPath = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME",
            help="A target (`edgepack targets`), or a .yaml file; repeatable.",
        ),
    ] = None,
    recipe: RecipePath = None,
    calibration_data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Folder of images, .npz or .npy; one .npz or .npy; module:function."
        ),
    ] = None,
    evaluation_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="The same, for the check; other samples.")
    ] = None,
    metric: MetricName = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help="Default: dist/{target}.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="WORD", help="auto, static, dynamic, weight_only or float.")
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="WORD", help="fast, balanced or best.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="For preset best: how long to search, as 90s or 5m; 120s."),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(metavar="WORD", help="minmax, moving_average, percentile, entropy or mse."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Calibrate on at most this many samples.")
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The ranges.json of an earlier build, instead of calibration."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, check, measure and judge the package.

    Reads ./edgepack.yaml, unless a model is named. With --json one report is an object, the reports of
    several targets are a list.
    """
    from edgepack.target import load_target

    changes = {
        "model": str(model) if model else None,
        "target": target or None,
        "output": output,
        "metric": metric,
        "preset": preset,
        "calibration_data": _data(calibration_data, samples),
        "evaluation_data": _data(evaluation_data, None),
        "search": {"budget_s": _seconds(budget)},
        "quantize": {"method": method},
        "calibration": {"observer": observer},
    }
    loaded, base = _recipe(recipe, changes, model)
    if not loaded.target:
        raise ConfigError(f"no target: choose one with --target ({', '.join(_target_names())})")
    chosen = [load_target(name) for name in loaded.target]

    from edgepack.build import Job
    from edgepack.build import build as build_package
    from edgepack.report import text

    command = shlex.join(["edgepack", *sys.argv[1:]])
    reports = []
    for device in chosen:
        with _progress(as_json) as progress:
            report, folder = build_package(Job(loaded, device, base, command, ranges, progress))
        reports.append(report)
        for refusal in report.refused:
            print(f"edgepack: warning: {refusal.file} is not built: {refusal.reason}", file=sys.stderr)
        if not as_json:
            print(text(report), end="")
            print(f"\nfiles in {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")
    if as_json:
        written = [report.to_json().rstrip() for report in reports]
        print(written[0] if len(written) == 1 else f"[{', '.join(written)}]")
    if not all(report.passed for report in reports):
        raise GateFailed("the gate is not met; the package is kept, see the lines marked FAIL")


@app.command()
def inspect(model: ModelPath = None, target: TargetName = None, as_json: Json = False) -> None:
    """Show what is in a model; with a target, its plan too.

    Operators, parameters and bytes, before and after normalization.
    """
    from edgepack.inspect import inspect_model, inspection_text
    from edgepack.target import load_target

    path = _model_path(model)
    found = inspect_model(path, load_target(target) if target else None)
    print(
        json.dumps(found.as_dict(), indent=1) if as_json else inspection_text(found),
        end="\n" if as_json else "",
    )


@app.command()
def plan(model: ModelPath = None, target: TargetName = None, as_json: Json = False) -> None:
    """Show what will be integer, and why the rest won't.

    Needs no data. The target is by default the recipe's, or x86-cpu for a model given by name.
    """
    from edgepack.inspect import plan_rows, plan_text
    from edgepack.target import load_target

    loaded, _ = _recipe(None, {"model": str(model) if model else None}, model)
    rows = plan_rows(loaded.model, load_target(target or _first_target(loaded)))
    print(json.dumps(rows, indent=1) if as_json else plan_text(rows), end="\n" if as_json else "")


@app.command()
def check(
    original: Annotated[Path, typer.Argument(help="The float model.")],
    built: Annotated[list[Path], typer.Argument(help="One or more built models.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Evaluation samples; by default the recipe's.")
    ] = None,
    metric: MetricName = None,
    target: TargetName = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", "-r", metavar="FILE", help="Default: ./edgepack.yaml, if it is of this model."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare built models with the original.

    Fidelity (signal to noise), agreement, and the metric. The target, by default the recipe's or x86-cpu,
    says how the runtime is set up.
    """
    from edgepack.compare import check_models, check_text
    from edgepack.target import load_target

    changes = {"model": str(original), "metric": metric, "evaluation_data": _data(data, None)}
    loaded, base = _recipe(recipe, changes, None if _is_recipes_own(original) else original)
    chosen = load_target(target or _first_target(loaded))
    with _progress(as_json) as progress:
        rows = check_models(original, built, loaded, base, chosen, progress)
    print(json.dumps(rows, indent=1) if as_json else check_text(rows), end="\n" if as_json else "")


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Models; the first is the yardstick.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Sample inputs; by default the recipe's, or random, batch 1."),
    ] = None,
    target: TargetName = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", "-r", metavar="FILE", help="For samples and images; by default none."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Default: the target's.", min=1)
    ] = None,
    runs: Annotated[
        int, typer.Option(metavar="COUNT", help="Rounds in which every model runs once.", min=1)
    ] = 50,
    ops: Annotated[bool, typer.Option("--ops", help="Also the time per operator type.")] = False,
    as_json: Json = False,
) -> None:
    """Time models side by side, taking turns.

    p50, p90, min, cold start, peak memory, and with --ops where the time goes. The target, by default the
    recipe's or x86-cpu, says how the runtime is set up.
    """
    from edgepack.compare import bench_models, bench_text
    from edgepack.target import load_target

    changes = {"model": str(models[0]), "calibration_data": _data(data, None)}
    loaded, base = _recipe(recipe, changes, models[0])
    chosen = load_target(target or _first_target(loaded))
    samples = loaded.calibration_data
    rows = bench_models(models, samples, loaded.images, base, chosen, threads=threads, runs=runs, ops=ops)
    print(json.dumps(rows, indent=1) if as_json else bench_text(rows), end="\n" if as_json else "")


@app.command()
def pack(
    models: Annotated[list[Path], typer.Argument(help="One model of any format, or several .onnx.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="FILE.epk; or a folder, which becomes a pool."),
    ],
    within: Annotated[
        float, typer.Option(metavar="ERROR", help="For a pool: also share tensors this near, as 0.01.")
    ] = 0.0,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Samples to compare a pool's outputs on; or random.")
    ] = None,
    min_sqnr_db: Annotated[
        float | None, typer.Option(metavar="DB", help="A pooled model below it keeps its own tensors; 30.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model into one file to ship, or several into a pool that stores what they share once."""
    from edgepack.pooling import facts, pack_models, text

    result = pack_models(models, output, within, data, min_sqnr_db)
    print(json.dumps(facts(result), indent=1) if as_json else text(result), end="\n" if as_json else "")


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="An .epk file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="File or folder; default: its name, beside."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore a packed model, byte for byte."""
    from edgepack.pack.epk import unpack as restore

    files = [str(path) for path in restore(packed, output)]
    print(json.dumps({"files": files}) if as_json else "\n".join(files))


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="Show this target; by default list all.")] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="KIND", help="The JSON schema of `target` or `recipe` files.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List targets, or show one; schemas for editors."""
    from edgepack.config import Recipe
    from edgepack.strict import Strict
    from edgepack.target import Target, list_targets, load_target

    if schema is not None:
        kinds: dict[str, type[Strict]] = {"target": Target, "recipe": Recipe}
        if schema not in kinds:
            raise ConfigError(f"--schema {schema}: known: target, recipe")
        print(json.dumps(kinds[schema].model_json_schema(), indent=1))
    elif name is not None:
        print(load_target(name).model_dump_json(indent=1))
    else:
        found = {n: load_target(str(path)) for n, path in list_targets().items()}
        if as_json:
            print(json.dumps({n: t.model_dump(mode="json") for n, t in found.items()}, indent=1))
        else:
            width = max(map(len, found), default=0)
            for n, t in found.items():
                print(f"{n.ljust(width)}  {t.description}  [{', '.join(t.formats)}]")


def _recipe(path: Path | None, changes: dict[str, Any], model: Path | None) -> tuple["Recipe", Path]:
    """The recipe and the folder that its references are relative to.

    ``./edgepack.yaml`` is read when no recipe is named, but not for a model given by name: another model's
    data and limits would be applied to it.
    """
    from edgepack.config import load_recipe

    if path is None and model is None and DEFAULT_RECIPE.is_file():
        path = DEFAULT_RECIPE
    return load_recipe(path, changes), path.parent if path else Path()


def _model_path(model: Path | None) -> Path:
    if model is not None:
        return model
    return _recipe(None, {}, None)[0].model


def _is_recipes_own(model: Path) -> bool:
    """Whether the recipe here is that of ``model``."""
    if not (DEFAULT_RECIPE.is_file() and model.exists()):
        return False
    own = _recipe(None, {}, None)[0].model
    return own.exists() and own.samefile(model)


def _first_target(recipe: "Recipe") -> str:
    return next(iter(recipe.target), "x86-cpu")


def _data(path: str | None, samples: int | None) -> dict[str, Any] | None:
    changes = {"path": path, "samples": samples}
    return {k: v for k, v in changes.items() if v is not None} or None


def _seconds(text: str | None) -> float | None:
    """``90``, ``90s`` or ``5m`` in seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|)", text)
    if found is None:
        raise ConfigError(f"--budget {text}: give seconds or minutes, as 90s or 5m")
    return float(found[1]) * (60 if found[2] == "m" else 1)


def _target_names() -> list[str]:
    from edgepack.target import list_targets

    return sorted(list_targets())


@contextmanager
def _progress(quiet: bool) -> Iterator["Progress"]:
    """A bar on a terminal; nothing elsewhere."""
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


def main() -> None:
    """Entry point: runs the command line; an edgepack error becomes one message and its exit code."""
    for number in STOPPING:
        signal.signal(number, _stop)
    sys.exit(run(app))


class Stopped(BaseException):
    """A signal to stop, raised where the program is, so that everything on the way out cleans up."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> None:
    for other in STOPPING:  # a second Ctrl-C must not end the cleaning up
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


DEFECT = 70
"""Exit code of a defect (EX_SOFTWARE): 1 would tell a script that the gate was not met."""


def run(command: Callable[[], None]) -> int:
    """The exit code of ``command``."""
    try:
        command()
    except EdgepackError as error:
        label = "gate" if isinstance(error, GateFailed) else "error"
        print(f"edgepack: {label}: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stop:
        print("edgepack: stopped; nothing half-written is left", file=sys.stderr)
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception:  # noqa: BLE001  # nothing is swallowed: the traceback is shown, with a code of its own
        traceback.print_exc()
        print("edgepack: this is a defect in edgepack, not in your model or data", file=sys.stderr)
        return DEFECT
    return 0


if __name__ == "__main__":
    main()
