"""The commands build, inspect and plan."""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.cli import options
from edgepack.cli.common import (
    Json,
    MetricName,
    ModelPath,
    RecipePath,
    TargetName,
    app,
    data_of,
    first_target,
    model_path,
    progress_bar,
    recipe_of,
)
from edgepack.errors import ConfigError, GateFailed

if TYPE_CHECKING:
    from edgepack.pipeline.job import Job
    from edgepack.results import BuildReport


@app.command()
def build(
    model: ModelPath = None,
    target: options.Targets = None,
    recipe: RecipePath = None,
    calibration_data: options.CalibrationData = None,
    evaluation_data: options.EvaluationData = None,
    metric: MetricName = None,
    output: options.Output = None,
    method: options.MethodName = None,
    preset: options.Preset = None,
    budget: options.Budget = None,
    observer: options.ObserverName = None,
    samples: options.SampleCount = None,
    ranges: options.Ranges = None,
    on_device: options.OnDevice = None,
    device_python: options.DevicePython = "python3",
    as_json: Json = False,
) -> None:
    """Quantize a model, measure it and write the package.

    Reads ./edgepack.yaml, unless MODEL is given. With --json prints the report as an object, or the reports
    of several targets as a list.
    """
    from edgepack.config.target import load_target

    changes = {
        "model": str(model) if model else None,
        "target": target or None,
        "output": output,
        "metric": metric,
        "preset": preset,
        "calibration_data": data_of(calibration_data, samples),
        "evaluation_data": data_of(evaluation_data, None),
        "search": {"budget_s": _seconds(budget)},
        "quantize": {"method": method},
        "calibration": {"observer": observer},
    }
    loaded, base = recipe_of(recipe, changes, model)
    if not loaded.target:
        raise ConfigError(f"no target: choose one with --target ({', '.join(_target_names())})")
    chosen = [load_target(name) for name in loaded.target]

    from edgepack.benchmark.devices.timing import DeviceTiming
    from edgepack.pipeline.job import Job

    command = shlex.join(["edgepack", *sys.argv[1:]])
    timing = DeviceTiming(on_device, device_python) if on_device else None
    _build_all([Job(loaded, device, base, command, ranges, timing=timing) for device in chosen], as_json)


def _build_all(jobs: Sequence["Job"], as_json: bool) -> None:
    """Build one package after another and show their reports.

    Raises:
        GateFailed: a package misses a limit of its gate; all packages are written.
    """
    from edgepack.pipeline.build import build as build_package

    reports = []
    for job in jobs:
        with progress_bar(as_json) as progress:
            report, folder = build_package(replace(job, progress=progress))
        reports.append(report)
        _show(report, folder, as_json)
    if as_json:
        written = [report.to_json().rstrip() for report in reports]
        print(written[0] if len(written) == 1 else f"[{', '.join(written)}]")
    if not all(report.passed for report in reports):
        raise GateFailed("the gate is not met; the package is kept, see the lines marked FAIL")


def _show(report: "BuildReport", folder: Path, as_json: bool) -> None:
    """Warn of files that were not built; without ``as_json`` print the report and the files."""
    from edgepack.report.text import text

    for refusal in report.refused:
        print(f"edgepack: warning: {refusal.file} is not built: {refusal.reason}", file=sys.stderr)
    if not as_json:
        print(text(report), end="")
        print(f"\nfiles in {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


@app.command()
def inspect(model: ModelPath = None, target: TargetName = None, as_json: Json = False) -> None:
    """Show the contents of a model.

    Operators, parameters and bytes, before and after normalization; with --target the plan too.
    """
    from edgepack.config.target import load_target
    from edgepack.pipeline.inspection import inspect_model, inspection_text

    path = model_path(model)
    found = inspect_model(path, load_target(target) if target else None)
    print(
        json.dumps(found.as_dict(), indent=1) if as_json else inspection_text(found),
        end="\n" if as_json else "",
    )


@app.command()
def plan(model: ModelPath = None, target: TargetName = None, as_json: Json = False) -> None:
    """Show which operators run in int8, and why others do not.

    Needs no data. Default target: the recipe's, or x86-cpu where MODEL is given.
    """
    from edgepack.config.target import load_target
    from edgepack.pipeline.inspection import plan_rows, plan_text

    loaded, _ = recipe_of(None, {"model": str(model) if model else None}, model)
    rows = plan_rows(loaded.model, load_target(target or first_target(loaded)))
    print(json.dumps(rows, indent=1) if as_json else plan_text(rows), end="\n" if as_json else "")


def _seconds(text: str | None) -> float | None:
    """``90``, ``90s`` or ``5m`` in seconds.

    Raises:
        ConfigError: the text is none of these.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|)", text)
    if found is None:
        raise ConfigError(f"--budget {text}: give seconds or minutes, as 90s or 5m")
    return float(found[1]) * (60 if found[2] == "m" else 1)


def _target_names() -> list[str]:
    from edgepack.config.target import list_targets

    return sorted(list_targets())
