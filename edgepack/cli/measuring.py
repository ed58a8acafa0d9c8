"""The commands check and bench."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli import options
from edgepack.cli.common import (
    Json,
    MetricName,
    TargetName,
    app,
    data_of,
    first_target,
    is_recipes_own,
    progress_bar,
    recipe_of,
)
from edgepack.errors import ConfigError

if TYPE_CHECKING:
    from edgepack.results import DeviceRun


@app.command()
def check(
    original: Annotated[Path, typer.Argument(help="The float model.")],
    built: Annotated[list[Path], typer.Argument(help="One or more built models.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Evaluation samples. Default: the recipe's.")
    ] = None,
    metric: MetricName = None,
    target: TargetName = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="FILE",
            help="Default: ./edgepack.yaml, if it names this model.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the outputs of built models with the original's.

    Prints fidelity (signal-to-quantization-noise ratio, SQNR), agreement and the metric. The target sets the
    runtime's options; default: the recipe's, or x86-cpu.
    """
    from edgepack.config.target import load_target
    from edgepack.pipeline.measuring import check_models, check_text

    changes = {"model": str(original), "metric": metric, "evaluation_data": data_of(data, None)}
    loaded, base = recipe_of(recipe, changes, None if is_recipes_own(original) else original)
    chosen = load_target(target or first_target(loaded))
    with progress_bar(as_json) as progress:
        rows = check_models(original, built, loaded, base, chosen, progress)
    print(json.dumps(rows, indent=1) if as_json else check_text(rows), end="\n" if as_json else "")


@app.command()
def bench(
    models: options.Models,
    data: options.BenchData = None,
    target: TargetName = None,
    recipe: options.BenchRecipe = None,
    threads: options.Threads = None,
    runs: options.Runs = 50,
    ops: options.Ops = False,
    device: options.MeasureThere = None,
    device_python: options.DevicePython = "python3",
    keep: options.Keep = False,
    web: options.InBrowser = False,
    host: options.Host = "127.0.0.1",
    port: options.Port = 0,
    as_json: Json = False,
) -> None:
    """Measure the latency of models, interleaved.

    Prints p50, p90, min, cold start, peak memory, and with --ops the time per operator type. The target sets
    the runtime's options; default: the recipe's, or x86-cpu. Figures of --device or --web are also added to
    the report of the measured package.
    """
    from edgepack.config.target import load_target

    if web and (device or ops):
        raise ConfigError("--web measures in a browser, without --device and without --ops")
    models = _models_of(models, web=web)
    changes = {"model": str(models[0]), "calibration_data": data_of(data, None)}
    loaded, base = recipe_of(recipe, changes, models[0])
    chosen = load_target(target or first_target(loaded))
    if web:
        from edgepack.benchmark.web.bench import Web
        from edgepack.pipeline.on_device import bench_web

        runtime = chosen.runtime.model_copy(update={} if threads is None else {"threads": threads})
        chosen = chosen.model_copy(update={"runtime": runtime})
        run = bench_web(Web(host, port), models, chosen, runs, loaded, base, _show_address)
        return _show_run(run, as_json)
    if device:
        from edgepack.benchmark.devices.bundle import Job
        from edgepack.pipeline.on_device import Request, bench_device

        job = Job(runs=runs, ops=ops)
        request = Request(device, tuple(models), chosen, threads, job, device_python, keep)
        return _show_run(bench_device(request, loaded, base), as_json)
    from edgepack.pipeline.measuring import bench_data, bench_models, bench_text

    rows = bench_models(models, bench_data(loaded, base), chosen, threads=threads, runs=runs, ops=ops)
    print(json.dumps(rows, indent=1) if as_json else bench_text(rows), end="\n" if as_json else "")


def _models_of(given: list[Path], *, web: bool) -> list[Path]:
    """The given models, a package's folder replaced by its models; for a browser by its ``.onnx`` only."""
    from edgepack.pipeline.on_device import files_of

    models = list(files_of(given))
    if web and any(path.is_dir() for path in given):
        return [path for path in models if path.suffix == ".onnx"]
    return models


def _show_address(address: str) -> None:
    """Print the address, and its QR code where the extra ``web`` is installed, on standard error."""
    print(f"open {address}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        return
    try:
        import segno
    except ImportError:
        return
    segno.make(address).terminal(out=sys.stderr, compact=True)


def _show_run(run: "DeviceRun", as_json: bool) -> None:
    """Add a run to the package's report, and print it."""
    from edgepack.pipeline.on_device import merge
    from edgepack.report.devices import device_lines

    changed = merge(run)
    if as_json:
        print(json.dumps(asdict(run), indent=1, allow_nan=False))
        return
    print("\n".join(device_lines([run])).lstrip("\n"))
    for folder in changed:
        print(f"added to the report in {folder}")
