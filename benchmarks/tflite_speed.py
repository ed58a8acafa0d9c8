"""The .tflite of suite tasks: conversion, partitions, latency beside a rival's, parity with the .onnx.

    python benchmarks/tflite_speed.py SUITE_FOLDER [TASK ...] [--work DIR] [--rival FILE.tflite]

For each task: `edgepack build --target mobile`; then the conversion again in a process of its own, for its
seconds and memory; then the .tflite under LiteRT and the int8 .onnx under onnxruntime taking turns. With
--rival, a .tflite that another tool made of the first task's network takes turns too (images as NHWC), as by

    onnx2tf -i model.onnx -o out -ois image:1,3,224,224 -oiqt -qt per-channel -cind image calib.npy 0 1

ppocrv4_rec_320 is the reader of text lines at a fixed width. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from suite import HERE, recipe_for

from edgepack.benchmark.bench import SESSIONS, measure
from edgepack.benchmark.environment import environment
from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.data.samples import open_samples
from edgepack.errors import GateFailed
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.runtime.litert import LitertRunner, open_tflite
from edgepack.runtime.runner import Runner, open_model

TASKS = ("efficientnet_lite0", "fastestdet", "dscnn_fsdd", "ppocrv4_rec_320")
ROUNDS = 12
"""In each of the sets of sessions."""
NHWC = (0, 2, 3, 1)


def convert(recipe_file: Path, ranges: Path, out: Path) -> None:
    """Only the step from a normalized model and its ranges to the file, in this process; prints JSON."""
    from edgepack.calibration.ranges import load_ranges  # noqa: PLC0415
    from edgepack.export.tflite.export import export_tflite, plan_tflite  # noqa: PLC0415
    from edgepack.graph.prepare import prepare  # noqa: PLC0415
    from edgepack.quantization.weights.rounding import Rounder  # noqa: PLC0415

    recipe, target = load_recipe(recipe_file, {}), load_target("mobile")
    model, _ = prepare(load_model(recipe.model), target)
    table = load_ranges(ranges)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    started = time.perf_counter()
    plan = plan_tflite(model, table.ranges, target, {})
    export_tflite(model, plan, Rounder(model)(plan), out, io="float", dims=dict(_sizes(out)), facts={})
    seconds = time.perf_counter() - started
    peak = resident_bytes("VmHWM")
    print(json.dumps({"seconds": seconds, "added_bytes": peak - before, "peak_bytes": peak}))


def _sizes(out: Path) -> dict[str, int]:
    sizes: dict[str, int] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return sizes


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(x for x in status.splitlines() if x.startswith(field)).split()[1]) * 1024


def conversion(recipe_file: Path, built: Path, work: Path) -> dict[str, float]:
    """Seconds and bytes of the conversion alone."""
    out = work / "again.tflite"
    sizes = {
        f"{spec.name}[{axis}]": size
        for spec in open_tflite(built / "model.tflite", 1).inputs
        for axis, size in enumerate(spec.shape or ())
    }
    out.with_suffix(".json").write_text(json.dumps(sizes), encoding="utf-8")
    call = [sys.executable, __file__, "--convert", str(recipe_file), str(built / "ranges.json"), str(out)]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def foreign(path: Path, like: LitertRunner) -> LitertRunner:
    """A file that another tool wrote: its one input and output under our names, images as NHWC."""
    runner = open_tflite(path, 1)
    own, ours = runner.entries[0], like.entries[0]
    entry = replace(own, name=ours.name, order=NHWC, shape=ours.shape)
    return replace(runner, entries=(entry,), results=(replace(runner.results[0], name=like.results[0].name),))


def latencies(
    paths: dict[str, Path], rival: Path | None, feeds: list[Feeds]
) -> dict[str, tuple[float, float]]:
    """Median milliseconds, and how many times as long as the first, over several sets of sessions."""
    runtime = load_target("mobile").runtime
    best, walls = [], []
    for _ in range(SESSIONS):
        runners: list[Runner] = [open_model(path, runtime) for path in paths.values()]
        if rival is not None:
            runners.append(foreign(rival, open_tflite(paths["tflite"], 1)))
        rounds = measure(runners, feeds, ROUNDS)
        best.append(rounds.best)
        walls.append([float(np.median(calls)) for calls in rounds.calls])
    ratios = np.median(np.concatenate(best) / np.concatenate(best)[:, :1], axis=0)
    names = [*paths, *(["rival"] if rival is not None else [])]
    medians = np.median(np.asarray(walls), axis=0) * 1e3
    return {name: (float(ms), float(r)) for name, ms, r in zip(names, medians, ratios, strict=True)}


def task_lines(suite: Path, task: str, work: Path, rival: Path | None) -> list[str]:
    built = work / task
    call = [sys.executable, str(HERE / "suite.py"), str(suite), task, "-o", str(built), "--target", "mobile"]
    if subprocess.run(call, check=False, stdout=subprocess.DEVNULL).returncode not in (
        0,
        GateFailed.exit_code,
    ):
        raise SystemExit(f"the build of {task} failed")
    report: dict[str, Any] = json.loads((built / "report.json").read_text(encoding="utf-8"))
    if report["refused"]:
        return [f"\n{task}: {report['refused'][0]['reason']}"]
    recipe_file = work / f"{task}.yaml"
    recipe_file.write_text(recipe_for(suite, task), encoding="utf-8")
    recipe = load_recipe(recipe_file, {})
    assert recipe.evaluation_data is not None
    specs = input_specs(load_model(recipe.model))
    samples = open_samples(recipe.evaluation_data, "evaluation", specs, recipe.images, base=HERE)
    feeds = [sample.feeds for _, sample in zip(range(8), samples, strict=False)]
    cost = conversion(recipe_file, built, work)
    paths = {"tflite": built / "model.tflite", "onnx": built / "model.onnx", "float onnx": recipe.model}
    times = latencies(paths, rival, feeds)
    taken = report["runtime"]["tflite"]["xnnpack"]
    lines = [
        f"\n### {task}",
        f"conversion {cost['seconds']:.2f} s, {cost['added_bytes'] / 1e6:.0f} MB more (peak of the process "
        f"{cost['peak_bytes'] / 1e6:.0f} MB); XNNPACK takes {taken['delegated']} of {taken['operators']} "
        f"operators in {taken['partitions']} piece(s)",
        "",
        "| | ms | times the .tflite's |",
        "|---|---|---|",
        *(f"| {name} | {ms:.3f} | {ratio:.2f} |" for name, (ms, ratio) in times.items()),
        "",
        *parity_table(report),
    ]
    return lines


def parity_table(report: dict[str, Any]) -> list[str]:
    """The report's own figures."""
    pairs = {(p["name"], p["against"]): p for p in report["parity"]}
    lines = ["| | metric | dB to original | dB to .onnx | agreement with it |", "|---|---|---|---|---|"]
    for model in report["models"]:
        fidelity, pair = model["fidelity"], pairs.get((model["name"], "onnx"))
        to_onnx = ("", "") if pair is None else (_db(pair["sqnr_db"]), f"{pair['agreement'] or 0:.4f}")
        own = "" if model["name"] == "original" else _db(fidelity["sqnr_db"])
        lines.append(f"| {model['name']} | {fidelity['metric']:.4f} | {own} | {to_onnx[0]} | {to_onnx[1]} |")
    return lines


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def main() -> None:
    if sys.argv[1:2] == ["--convert"]:
        convert(*map(Path, sys.argv[2:5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rival", type=Path)
    args = parser.parse_args()
    os.environ["EDGEPACK_SUITE"] = str(args.suite.absolute())
    work = args.work or Path(tempfile.mkdtemp(prefix="edgepack-tflite-"))
    work.mkdir(parents=True, exist_ok=True)
    for index, task in enumerate(args.tasks):
        rival = args.rival if index == 0 else None
        print("\n".join(task_lines(args.suite, task, work, rival)), flush=True)
    where = environment()
    print(f"\n{where['cpu']}, one thread, onnxruntime {where['onnxruntime']}, {where['litert']}")


if __name__ == "__main__":
    main()
