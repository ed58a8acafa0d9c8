"""Static quantization of one model by edgepack and by onnxruntime's own quantizer: seconds and memory.

    python benchmarks/calibration.py SUITE_FOLDER [--task efficientnet_lite0] [--observer percentile]

Each side runs in a process of its own on the same calibration samples and all cores. Both read them, run
the float model over them, find ranges with the same kind of observer, quantize per channel and save. The
stock side's preprocessing is done before its clock starts. The whole `edgepack build`, with rounding by
GPTQ, the choice between candidates, check and bench, is timed besides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from suite import HERE, recipe_for

from edgepack.benchmark.environment import environment
from edgepack.errors import GateFailed

GATE_FAILED = GateFailed.exit_code
"""The package is complete and was measured all the same."""
STOCK_OBSERVERS = {"percentile": "Percentile", "entropy": "Entropy", "minmax": "MinMax"}


def edgepack_side(recipe_file: Path, observer: str, out: Path) -> None:
    """Normalize, calibrate, plan, round to nearest, apply, save."""
    from edgepack.calibration.run import calibrate  # noqa: PLC0415
    from edgepack.config.recipe import load_recipe  # noqa: PLC0415
    from edgepack.config.target import load_target  # noqa: PLC0415
    from edgepack.data.samples import open_samples  # noqa: PLC0415
    from edgepack.graph.prepare import prepare  # noqa: PLC0415
    from edgepack.ir.files import load_model, save_model  # noqa: PLC0415
    from edgepack.ir.inputs import input_specs  # noqa: PLC0415
    from edgepack.quantization.groups import find_fusion_groups  # noqa: PLC0415
    from edgepack.quantization.plan.plan import make_plan, tensors_to_observe  # noqa: PLC0415
    from edgepack.quantization.plan.types import Precision, Request  # noqa: PLC0415
    from edgepack.quantization.rewrite.apply import apply_plan  # noqa: PLC0415
    from edgepack.quantization.weights.rounding import Rounder  # noqa: PLC0415

    recipe, target = load_recipe(recipe_file, {"calibration": {"observer": observer}}), load_target("x86-cpu")
    original = load_model(recipe.model)
    assert recipe.calibration_data is not None
    samples = open_samples(
        recipe.calibration_data, "calibration", input_specs(original), recipe.images, base=HERE
    )
    model, _ = prepare(original, target)
    groups = find_fusion_groups(model, target.kernels)
    table = calibrate(
        model, samples, tensors_to_observe(groups), recipe.calibration, threads=os.cpu_count() or 1
    )
    plan = make_plan(model, groups, table.ranges, target, {u.name: Request(Precision.STATIC) for u in groups})
    save_model(apply_plan(model, plan, Rounder(model)(plan)), out)


def stock_side(recipe_file: Path, observer: str, out: Path) -> None:
    """onnxruntime.quantization.quantize_static on its own preprocessed model."""
    from onnxruntime import quantization  # noqa: PLC0415

    from edgepack.config.recipe import load_recipe  # noqa: PLC0415
    from edgepack.data.samples import open_samples  # noqa: PLC0415
    from edgepack.ir.files import load_model  # noqa: PLC0415
    from edgepack.ir.inputs import input_specs  # noqa: PLC0415

    recipe = load_recipe(recipe_file, {})
    assert recipe.calibration_data is not None
    samples = open_samples(
        recipe.calibration_data,
        "calibration",
        input_specs(load_model(recipe.model)),
        recipe.images,
        base=HERE,
    )
    feeds = (sample.feeds for sample in samples)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> object:
            return next(feeds, None)

    quantization.quantize_static(
        str(out.with_suffix(".pre.onnx")), str(out), Reader(), per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod[STOCK_OBSERVERS[observer]],
    )  # fmt: skip


def prepare(recipe_file: Path, out: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    from edgepack.config.recipe import load_recipe  # noqa: PLC0415

    model = load_recipe(recipe_file, {}).model
    quant_pre_process(str(model), str(out.with_suffix(".pre.onnx")), skip_symbolic_shape=True)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) * 1024


def side(name: str, recipe_file: Path, observer: str, out: Path) -> None:
    """One side, in this process; prints seconds and peak resident memory as JSON."""
    started = time.perf_counter()
    {"edgepack": edgepack_side, "stock": stock_side}[name](recipe_file, observer, out)
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}))


def measured(name: str, recipe_file: Path, observer: str, out: Path) -> dict[str, float]:
    call = [sys.executable, __file__, "--side", name, str(recipe_file), observer, str(out)]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def whole_build(suite: Path, task: str, observer: str, out: Path) -> dict[str, float]:
    """Seconds of `edgepack build`, and the peak resident memory of its largest process."""
    call = [sys.executable, str(HERE / "suite.py"), str(suite), task, "-o", str(out), "--observer", observer]
    started = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL)
    # Unlike RUSAGE_CHILDREN this counts one child and what it waited for, not the sides measured before.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, GATE_FAILED):
        raise SystemExit(f"edgepack build of {task} failed with exit code {process.returncode}")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[2], Path(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--task", default="efficientnet_lite0")
    parser.add_argument("--observer", default="percentile", choices=sorted(STOCK_OBSERVERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepack-calibration-") as folder:
        work = Path(folder)
        recipe_file = work / f"{args.task}.yaml"
        recipe_file.write_text(recipe_for(args.suite, args.task), encoding="utf-8")
        prepare(recipe_file, work / "stock.onnx")
        rows = {
            f"edgepack, {args.observer}": measured(
                "edgepack", recipe_file, args.observer, work / "ours.onnx"
            ),
            f"onnxruntime, {args.observer}": measured(
                "stock", recipe_file, args.observer, work / "stock.onnx"
            ),
            "edgepack build, all of it": whole_build(args.suite, args.task, args.observer, work / "build"),
        }
    print("| | seconds | peak memory, MB |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} |")
    ours, stock, _ = rows.values()
    print(f"\n{stock['seconds'] / ours['seconds']:.1f} times as fast, "
          f"{stock['peak_bytes'] / ours['peak_bytes']:.1f} times less memory")  # fmt: skip
    where = environment()
    print(f"{where['cpu']}, {where['cores']} cores, onnxruntime {where['onnxruntime']}")


if __name__ == "__main__":
    main()
