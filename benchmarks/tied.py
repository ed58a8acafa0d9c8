"""A language model with tied embeddings: one copy of the table in a file, compared with two.

    python benchmarks/tied.py FOLDER

FOLDER is that of ``train_words.py``. Its model is quantized in each precision, unchanged and with one value
of the last MatMul's weight changed, which needs two copies. Times are the least of many, of the CPU, one
thread, timed alternately.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration, Data
from edgepack.config.target import load_target
from edgepack.data.samples import Samples, open_samples
from edgepack.evaluation.check import baseline, check
from edgepack.graph.compact import compact, names_of
from edgepack.graph.normalize import normalize
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import load_model, save_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.model import constant, name_of, set_constant
from edgepack.pack.epk import pack
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precision, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import round_weights
from edgepack.runtime.fused import fusion_report
from edgepack.runtime.host import for_accuracy
from edgepack.selection.candidates import methods_of, whole_model_methods

TARGET = load_target("x86-cpu")
LOADS, RUNS = 7, 100


def nudge(model: ir.Model) -> None:
    """Change one value of the last MatMul's weight, in place."""
    product = next(n for n in reversed(list(model.graph)) if n.op_type == "MatMul")
    weight, array = product.inputs[1], constant(product.inputs[1])
    assert weight is not None
    assert array is not None
    nudged = array.copy()
    nudged[0, 0] += 1e-3
    set_constant(model, name_of(weight), nudged)


def samples_of(folder: Path, part: str, model: ir.Model) -> Samples:
    """``calib`` or ``eval``."""
    return open_samples(Data(path=str(folder / f"{part}.npz")), part, input_specs(model), {}, base=folder)


def candidates(folder: Path, copies: int) -> dict[str, Path]:
    """Files of all candidates by name."""
    original = load_model(folder / "model.onnx")
    model, _ = normalize(original, min_opset=TARGET.min_opset, max_opset=TARGET.max_opset)
    if copies == 2:
        nudge(model)
    groups = find_fusion_groups(model, TARGET.kernels)
    samples = samples_of(folder, "calib", original)
    ranges = calibrate(model, samples, tensors_to_observe(groups), Calibration(), threads=1).ranges
    widest = make_plan(model, groups, ranges, TARGET, {u.name: Request(Precision.STATIC) for u in groups})
    rounder = round_weights(model, widest, samples, gptq=True, threads=1, seed=0)
    found = {}
    for name, by_type in whole_model_methods(groups, TARGET).items():
        methods = methods_of(groups, name, by_type, {})
        plan = make_plan(model, groups, ranges, TARGET, methods, WeightPreparation(rounder.smoothing))
        found[str(name)] = folder / f"{name} {copies}.onnx"
        save_model(compact(apply_plan(model, plan, rounder(plan)), names_of(model)), found[str(name)])
    return found


def cpu_ms(files: Sequence[Path], feed: Feeds) -> list[tuple[float, float]]:
    """The least that loading and a run took of the CPU; a busy machine only adds to it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    loads: list[list[float]] = [[] for _ in files]
    runs: list[list[float]] = [[] for _ in files]
    for _ in range(LOADS):
        sessions = []
        for file, times in zip(files, loads, strict=True):
            started = time.process_time()
            sessions.append(ort.InferenceSession(str(file), options))
            times.append((time.process_time() - started) * 1e3)
    for _ in range(RUNS):
        for session, times in zip(sessions, runs, strict=True):
            started = time.thread_time()
            session.run(None, feed)
            times.append((time.thread_time() - started) * 1e3)
    return [(min(load), min(run)) for load, run in zip(loads, runs, strict=True)]


def main(folder: Path) -> None:
    """Print the table."""
    path = folder / "model.onnx"
    evaluation = samples_of(folder, "eval", load_model(path))
    reference = baseline(path, evaluation, for_accuracy(TARGET), None)
    feed = next(iter(evaluation)).feeds
    print("| precision | copies | bytes | packed | dB | load, ms | run, ms | int8 kernels |")
    print("|---|---|---|---|---|---|---|---|")
    made = {copies: candidates(folder, copies) for copies in (2, 1)}
    for name in made[1]:
        files = [made[copies][name] for copies in made]
        for copies, file, (load, run) in zip(made, files, cpu_ms(files, feed), strict=True):
            packed = pack(file, folder / "draft.epk", check=False).packed_bytes
            sqnr_db = check(file, reference).sqnr_db
            kernels = sum(fusion_report(file, TARGET.runtime).integer_kernels.values())
            size = f"{file.stat().st_size:,} | {packed:,}"
            print(f"| {name} | {copies} | {size} | {sqnr_db:.1f} | {load:.1f} | {run:.3f} | {kernels} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
