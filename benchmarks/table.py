"""The README's table: suite tasks built by edgepack and by onnxruntime's own quantizer, in one run.

    python benchmarks/table.py SUITE_FOLDER [TASK ...] [--work DIR]

For each task: `edgepack build --target x86-cpu`, the stock quantizer in its static (per channel, u8 × s8,
MinMax, after its own preprocessing) and dynamic form on the same calibration samples, then all of them
checked on the evaluation data and timed taking turns. Prints Markdown.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from suite import HERE, recipe_for

from edgepack.config import Recipe, load_recipe
from edgepack.data import Samples, open_samples
from edgepack.errors import EdgepackError
from edgepack.measure.bench import bench
from edgepack.measure.check import Baseline, baseline, check
from edgepack.measure.environment import environment
from edgepack.metrics import Metric, resolve_metric
from edgepack.model import input_specs, load_model, model_bytes
from edgepack.target import Target, load_target

TASKS = ("efficientnet_lite0", "fastestdet", "ppocrv4_rec", "minilm_sst2", "dscnn_fsdd", "dlrm_ml100k")
RUNS = 60


def stock_static(model: Path, samples: Samples, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples: Iterator[Any] = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            sample = next(self.samples, None)
            return None if sample is None else sample.feeds

    prepared = out.with_suffix(".pre.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), Reader(), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def stock_dynamic(model: Path, samples: Samples, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    quantize_dynamic(str(model), str(out), per_channel=True, weight_type=QuantType.QInt8)


RIVALS: dict[str, Callable[[Path, Samples, Path], None]] = {
    "onnxruntime static": stock_static,
    "onnxruntime dynamic": stock_dynamic,
}


def rows_of(suite: Path, task: str, work: Path) -> list[str]:
    """Markdown rows of one task: the original, edgepack's model, the rivals' models or what they say."""
    target = load_target("x86-cpu")
    folder = work / task
    call = [sys.executable, str(HERE / "suite.py"), str(suite), task, "-o", str(folder)]
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    recipe = _recipe(suite, task, work)
    inputs = input_specs(load_model(recipe.model))
    assert recipe.calibration_data is not None
    assert recipe.evaluation_data is not None
    calibration = open_samples(recipe.calibration_data, "calibration", inputs, recipe.images, base=HERE)
    evaluation = open_samples(recipe.evaluation_data, "evaluation", inputs, recipe.images, base=HERE)
    models = {"original": recipe.model, "edgepack": folder / "model.onnx"}
    failures = {}
    for name, quantize in RIVALS.items():
        out = folder / f"{name.replace(' ', '_')}.onnx"
        try:
            quantize(recipe.model, calibration, out)
            models[name] = out
        except Exception as error:  # noqa: BLE001  # whatever a rival raises is its result
            failures[name] = f"fails: {type(error).__name__}"
    metric = resolve_metric(recipe.metric or "", HERE)
    return _measure(task, models, failures, evaluation, metric, target)


def _measure(
    task: str,
    models: dict[str, Path],
    failures: dict[str, str],
    evaluation: Samples,
    metric: Metric,
    target: Target,
) -> list[str]:
    reference = baseline(models["original"], evaluation, target.runtime, metric)
    sound = {}
    for name, path in models.items():
        try:
            sound[name] = _accuracy(name, path, evaluation, reference, metric, target)
        except EdgepackError:
            failures[name] = "invalid: onnxruntime refuses the file"
    feeds = [sample.feeds for _, sample in zip(range(16), evaluation, strict=False)]
    times = bench({n: models[n] for n in sound}, target.runtime, feeds, warmup=5, runs=RUNS)
    original = model_bytes(models["original"])
    rows = [
        f"| {task} | {name} | {accuracy} | {original / model_bytes(models[name]):.2f}× | "
        f"{times[name].p50_ms:.3f} | {times[name].speedup:.2f}× |"
        for name, accuracy in sound.items()
    ]
    return rows + [f"| {task} | {name} | {why} | | | |" for name, why in failures.items()]


def _accuracy(
    name: str, path: Path, samples: Samples, reference: Baseline, metric: Metric, target: Target
) -> str:
    if name == "original":
        return f"{reference.fidelity.metric:.4f} | "
    found = check(path, samples, target.runtime, reference, metric)
    level = "equal" if found.sqnr_db is None else f"{found.sqnr_db:.1f}"
    return f"{found.metric:.4f} | {level}"


def _recipe(suite: Path, task: str, work: Path) -> Recipe:
    file = work / f"{task}.yaml"
    file.write_text(recipe_for(suite, task), encoding="utf-8")
    return load_recipe(file, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    os.environ["EDGEPACK_SUITE"] = str(args.suite.absolute())
    work = args.work or Path(tempfile.mkdtemp(prefix="edgepack-table-"))
    work.mkdir(parents=True, exist_ok=True)
    print("| task | model | metric | SQNR dB | smaller | ms | as fast |\n|---|---|---|---|---|---|---|")
    for task in args.tasks:
        print("\n".join(rows_of(args.suite, task, work)), flush=True)
    where = environment()
    print(
        f"\n{where['cpu']} ({', '.join(where['flags'])}), one thread, onnxruntime {where['onnxruntime']}, "
        f"{RUNS} rounds taking turns"
    )


if __name__ == "__main__":
    main()
