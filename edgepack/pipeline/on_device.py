"""Benchmarks of models or of a package on a device, and their figures in the package's report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack.benchmark.devices.bench import bench_on
from edgepack.benchmark.devices.bundle import Job
from edgepack.benchmark.web.bench import Show, Web, bench_in_browser
from edgepack.config.recipe import Recipe
from edgepack.config.target import Target
from edgepack.errors import ConfigError
from edgepack.ir.files import load_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.pipeline.measuring import bench_data, bench_feeds
from edgepack.report.html.reading import REPORT, read_report
from edgepack.report.html.render import replace_file, write_html
from edgepack.results import DeviceRun, with_run
from edgepack.runtime.host import for_accuracy

FEEDS = 4
"""Samples that are sent to a device; the outputs of all of them come back."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure, and on which device."""

    device: str
    models: tuple[Path, ...]
    target: Target
    threads: int | None
    job: Job
    python: str = "python3"
    keep: bool = False


def files_of(paths: Sequence[Path]) -> tuple[Path, ...]:
    """``paths`` with a package's folder replaced by its models.

    Raises:
        ConfigError: a folder is no package, or has no model in it.
    """
    found: list[Path] = []
    for path in paths:
        found += _files_of_package(path) if path.is_dir() else [path]
    return tuple(found)


def _files_of_package(folder: Path) -> list[Path]:
    report = read_report(folder)
    built = [folder / m.file for m in report.models[1:] if (folder / m.file).suffix != ".epk"]
    files = [path for path in built if path.is_file()]
    if not files:
        raise ConfigError(f"{folder}: the files of its report are not there; build again")
    return files


def bench_device(request: Request, recipe: Recipe, base: Path) -> DeviceRun:
    """Measure on the device, on a few samples of the recipe or on random inputs.

    Raises:
        EdgepackError: see :func:`edgepack.benchmark.devices.bench.bench_on`.
    """
    threads = {} if request.threads is None else {"threads": request.threads}
    runtime = for_accuracy(request.target).model_copy(update=threads)
    feeds = bench_feeds(request.models, bench_data(recipe, base, FEEDS), runtime)
    return bench_on(
        request.device,
        request.models,
        runtime,
        feeds,
        request.job,
        python=request.python,
        keep=request.keep,
    )


def bench_web(
    web: Web, models: Sequence[Path], target: Target, runs: int, recipe: Recipe, base: Path, show: Show
) -> DeviceRun:
    """Measure the ``.onnx`` among ``models`` in a browser; ``show`` gets the address to open there.

    Raises:
        EdgepackError: see :func:`edgepack.benchmark.web.bench.bench_in_browser`.
    """
    runtime = for_accuracy(target)
    feeds = bench_feeds(models, bench_data(recipe, base, FEEDS), runtime)
    return bench_in_browser(web, models, runtime, feeds, runs, show)


def merge(run: DeviceRun) -> list[Path]:
    """Add ``run`` to the reports of the packages that measured files belong to; returns their folders.

    The package's original model is recognized by its fingerprint, in any folder.

    Raises:
        ConfigError, ExportError: a report cannot be read or written.
    """
    changed = []
    for folder in dict.fromkeys(Path(m.model).parent for m in run.models):
        if not (folder / REPORT).is_file():
            continue
        report = read_report(folder)
        names = {folder / m.file: m.name for m in report.models[1:]}
        if not any(Path(m.model) in names for m in run.models):
            continue
        for path in (Path(m.model) for m in run.models if Path(m.model) not in names):
            if path.suffix == ".onnx" and fingerprint(load_model(path)) == report.fingerprints["model"]:
                names[path] = report.models[0].name
        own = [replace(m, model=names[Path(m.model)]) for m in run.models if Path(m.model) in names]
        devices = with_run(report.devices, replace(run, models=tuple(own)))
        replace_file(folder / REPORT, replace(report, devices=devices).to_json())
        write_html(folder)
        changed.append(folder)
    return changed
