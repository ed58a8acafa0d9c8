"""Structured pruning measured: int8 builds with all channels, without some, and with the rest fitted anew.

    python benchmarks/structured.py cifar10 MODEL.onnx CIFAR10.zip [--macs 0.7] [-o DIR]
    python benchmarks/structured.py suite SUITE_FOLDER TASK [--macs 0.7] [-o DIR]

MODEL.onnx comes from ``benchmarks/train_cifar10.py`` and CIFAR10.zip is what that script takes; every tenth
picture of its training part is used for calibration, all of the test part for the accuracy. The three builds
are timed alternately in one run, on one thread; the ratio is the median over the rounds.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cifar10 import read, standardized
from suite import recipe_for

from edgepack.benchmark.bench import bench
from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.data.samples import open_samples
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.results import BuildReport

HERE = Path(__file__).parent
ROUNDS = 300


def part_of(archive: Path, part: str, step: int, output: Path) -> Path:
    """Every ``step``-th picture of a part of the archive, as the network takes them."""
    pictures, kinds = read(archive, part, step)
    np.savez(output, image=standardized(pictures)[:, None], label=kinds)
    return output


def cifar10_recipe(model: Path, archive: Path, folder: Path) -> dict[str, Any]:
    """What to build for the trained network."""
    calibration = part_of(archive, "train", 10, folder / "calibration.npz")
    evaluation = part_of(archive, "test", 1, folder / "evaluation.npz")
    return {
        "model": str(model.absolute()),
        "calibration_data": {"path": str(calibration)},
        "evaluation_data": {"path": str(evaluation), "labels": {"array": "label"}},
        "metric": "accuracy",
        "gate": {},
    }


def built(recipe: dict[str, Any], name: str, passes: list[Any], folder: Path) -> tuple[BuildReport, Path]:
    """One build; its report and its folder."""
    content = {**recipe, "passes": passes, "output": str(folder / name), "preset": "fast"}
    content["quantize"] = {"method": "static"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        loaded = load_recipe(Path(file.name), {})
        return build(Job(loaded, load_target("x86-cpu"), HERE, "benchmarks/structured.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["cifar10", "suite"])
    parser.add_argument("first", type=Path)
    parser.add_argument("second")
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--multiple", type=int)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.output or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if args.what == "cifar10":
            recipe = cifar10_recipe(args.first, Path(args.second), folder)
        else:
            os.environ["EDGEPACK_SUITE"] = str(args.first.absolute())
            recipe = yaml.safe_load(recipe_for(args.first, args.second))
        measure(recipe, args.macs, args.multiple, folder)
    return 0


def measure(recipe: dict[str, Any], macs: float, multiple: int | None, folder: Path) -> None:
    """Build, time and print."""
    settings: dict[str, Any] = {"macs": macs} | ({"multiple": multiple} if multiple else {})
    candidates: dict[str, list[Any]] = {
        "all channels": [],
        "cut": [{"structured": {**settings, "reconstruct": False}}],
        "cut and fitted": [{"structured": settings}],
    }
    reports = {
        name: built(recipe, name.replace(" ", "_"), passes, folder) for name, passes in candidates.items()
    }
    files = {name: path / "model.onnx" for name, (_, path) in reports.items()}
    latencies = bench(files, load_target("x86-cpu").runtime, probes(recipe), warmup=20, runs=ROUNDS)
    for name, (report, _) in reports.items():
        steps = {step.name: step for step in report.waterfall}
        before = steps.get("structured", steps["original"])
        after = steps["quantized"]
        print(
            f"{name:15} float: {metric(before.metric)}, {before.raw_bytes:,} bytes; "
            f"int8: {metric(after.metric)}, "
            f"{after.raw_bytes:,} bytes, {latencies[name].p50_ms:.3f} ms, "
            f"{latencies[name].speedup:.2f} times as fast as with all channels"
        )
        for note in before.notes:
            print(f"                {note}")


def metric(value: float | None) -> str:
    """For a table."""
    return "-" if value is None else f"{value:.4f}"


def probes(recipe: dict[str, Any]) -> list[Feeds]:
    """Samples to time on."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({**recipe, "target": "x86-cpu"}, file)
        file.flush()
        loaded = load_recipe(Path(file.name), {})
    specs = input_specs(load_model(loaded.model))
    assert loaded.calibration_data is not None
    return [
        s.feeds
        for s in open_samples(loaded.calibration_data, "calibration", specs, loaded.images, base=HERE).spread(
            4
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
