"""What each technique of the default preset is worth on one task: all of them, then each one left out.

    python benchmarks/techniques.py SUITE_FOLDER TASK [--form static] [--target x86-cpu] [--samples 1000]

All fusion groups that support the precision use it. Prints a table in Markdown: dB over the evaluation
samples, the task's metric on them, and how many dB the technique is worth.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from ablation import ROUNDING_SAMPLES, cell, measured, read, spread
from suite import HERE

from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration
from edgepack.config.target import Target, load_target
from edgepack.data.samples import Samples
from edgepack.evaluation.check import baseline
from edgepack.evaluation.metrics import resolve_metric
from edgepack.ir.scheme import Granularity
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import DYNAMIC_OPS, Precision, QuantPlan, Request
from edgepack.quantization.weights.cross_layer_equalization import equalize
from edgepack.quantization.weights.rounding import Rounder, round_weights
from edgepack.runtime.host import for_accuracy


def variants(
    model: ir.Model, samples: Samples, target: Target, form: Precision, seed: int
) -> Iterator[tuple[str, QuantPlan, Rounder]]:
    """Every row of the table: what is left out, and the plan and the rounder without it."""
    groups = find_fusion_groups(model, target.kernels)
    # Operators without a dynamic kernel are static in both.
    methods = {u.name: Request(form if u.op_type in DYNAMIC_OPS else Precision.STATIC) for u in groups}
    names, threads = tensors_to_observe(groups), target.runtime.threads
    mse, minmax = (
        calibrate(model, samples, names, Calibration(observer=observer), threads=threads).ranges
        for observer in ("mse", "minmax")
    )
    few = spread(samples, ROUNDING_SAMPLES)

    def rounder_for(device: Target, gptq: bool) -> Rounder:
        widest = make_plan(model, groups, mse, device, {u.name: Request(Precision.STATIC) for u in groups})
        return round_weights(model, widest, few, gptq=gptq, threads=threads, seed=seed)

    full, corrected = rounder_for(target, True), rounder_for(target, False)
    plan = make_plan(model, groups, mse, target, methods, WeightPreparation(full.smoothing))
    plain = make_plan(model, groups, mse, target, methods)
    yield "nothing", plan, full
    yield (
        "ranges by squared error (minmax)",
        make_plan(model, groups, minmax, target, methods, WeightPreparation(full.smoothing)),
        full,
    )
    yield "GPTQ (nearest)", plan, corrected
    yield "bias correction", plan, replace(full, means={})
    yield "GPTQ and bias correction", plan, Rounder(model)
    if form is Precision.DYNAMIC:
        yield "smoothing", plain, full
    whole = target.quantization.model_copy(update={"weight_granularity": Granularity.PER_TENSOR})
    device = target.model_copy(update={"quantization": whole})
    coarse = rounder_for(device, True)
    one_scale = make_plan(model, groups, mse, device, methods, WeightPreparation(coarse.smoothing))
    yield "a scale per channel (per tensor)", one_scale, coarse
    yield "a scale per channel, GPTQ", one_scale, rounder_for(device, False)
    yield "a scale per channel, GPTQ, bias correction", one_scale, Rounder(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("task")
    parser.add_argument("--form", choices=("static", "dynamic"), default="static")
    parser.add_argument("--target", default="x86-cpu")
    parser.add_argument(
        "--equalize", action="store_true", help="cross-layer equalization first; useful per tensor"
    )
    parser.add_argument("--samples", type=int, default=1000, help="evaluation samples, at most")
    arguments = parser.parse_args()
    target = load_target(arguments.target)
    recipe, model, calibration, evaluation = read(arguments.suite, arguments.task, target, arguments.samples)
    if arguments.equalize:
        some = spread(calibration, ROUNDING_SAMPLES)
        model, _ = equalize(model, some, threads=target.runtime.threads)
    metric = resolve_metric(recipe.metric, HERE) if recipe.metric else None
    reference = baseline(recipe.model, evaluation, for_accuracy(target), metric)
    head = f"{arguments.task}, {arguments.form}, {len(evaluation)} samples: without"
    print(f"| {head} | dB{'' if metric is None else f' / {metric.name}'} | worth, dB |\n|---|---|---|")
    all_db = None
    for name, plan, rounder in variants(model, calibration, target, Precision(arguments.form), recipe.seed):
        found, _ = measured(model, plan, rounder, evaluation, target, reference, metric)
        all_db = found.sqnr_db if all_db is None else all_db
        worth = "" if None in (all_db, found.sqnr_db) else f"{all_db - found.sqnr_db:.1f}"  # type: ignore[operator]
        print(f"| {name} | {cell(found)} | {worth} |", flush=True)
    if reference.fidelity.metric is not None:
        print(f"\nThe original: {reference.fidelity.metric:.4f}")


if __name__ == "__main__":
    main()
