"""What each observer and each way of rounding gives on one task: SQNR against the original, and the metric.

    python benchmarks/ablation.py SUITE_FOLDER TASK [--target x86-cpu] [--samples 1000]

All fusion groups that can run in int8 do. Prints a table in Markdown: dB over the evaluation
samples, and the task's metric on them.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
from suite import HERE, recipe_file

from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration, Observer, Recipe, load_recipe
from edgepack.config.target import Target, load_target
from edgepack.data.samples import Samples, open_samples
from edgepack.evaluation.check import Baseline, baseline, check
from edgepack.evaluation.metrics import Metric, resolve_metric
from edgepack.export.onnx import export_onnx
from edgepack.graph.compact import names_of
from edgepack.graph.prepare import prepare
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder, round_weights
from edgepack.results import Fidelity
from edgepack.runtime.host import for_accuracy

ROUNDING_SAMPLES = 32
COLUMNS = ("nearest", "bias corrected", "GPTQ, bias corrected")


def spread(samples: Samples, count: int) -> Samples:
    """At most ``count`` samples, evenly spread."""
    picked = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)
    return replace(samples, indices=tuple(samples.indices[i] for i in picked))


def read(suite: Path, task: str, target: Target, count: int) -> tuple[Recipe, ir.Model, Samples, Samples]:
    """The task's recipe, its normalized model, and its calibration and evaluation samples."""
    with recipe_file(suite, task) as file:
        recipe = load_recipe(file, {})
    original = load_model(recipe.model)
    inputs = input_specs(original)
    assert recipe.calibration_data is not None
    assert recipe.evaluation_data is not None
    calibration = open_samples(recipe.calibration_data, "calibration", inputs, recipe.images, base=HERE)
    evaluation = open_samples(recipe.evaluation_data, "evaluation", inputs, recipe.images, base=HERE)
    model, _ = prepare(original, target)
    return recipe, model, calibration, spread(evaluation, count)


def static_plan(
    model: ir.Model,
    groups: tuple[FusionGroup, ...],
    samples: Samples,
    target: Target,
    calibration: Calibration,
) -> QuantPlan:
    names = tensors_to_observe(groups)
    table = calibrate(model, samples, names, calibration, threads=target.runtime.threads)
    return make_plan(model, groups, table.ranges, target, {u.name: Request(Precision.STATIC) for u in groups})


def rounders(model: ir.Model, plan: QuantPlan, samples: Samples, target: Target, seed: int) -> list[Rounder]:
    few = spread(samples, ROUNDING_SAMPLES)
    threads = target.runtime.threads
    return [
        Rounder(model),
        *(round_weights(model, plan, few, gptq=gptq, threads=threads, seed=seed) for gptq in (False, True)),
    ]


def cell(fidelity: Fidelity) -> str:
    """What the table says of one model: dB, and the metric where the task has one."""
    sqnr = "inf" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.2f}"
    return sqnr if fidelity.metric is None else f"{sqnr} / {fidelity.metric:.4f}"


def measured(
    model: ir.Model,
    plan: QuantPlan,
    rounder: Rounder,
    samples: Samples,
    target: Target,
    reference: Baseline,
    metric: Metric | None,
) -> tuple[Fidelity, int]:
    """The SQNR and metric of a candidate, and the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(apply_plan(model, plan, rounder(plan)), path, {}, names_of(model))
        return check(path, reference), path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("task")
    parser.add_argument("--target", default="x86-cpu")
    parser.add_argument("--samples", type=int, default=1000, help="evaluation samples, at most")
    arguments = parser.parse_args()
    target = load_target(arguments.target)
    recipe, model, calibration, evaluation = read(arguments.suite, arguments.task, target, arguments.samples)
    metric = resolve_metric(recipe.metric, HERE) if recipe.metric else None
    reference = baseline(recipe.model, evaluation, for_accuracy(target), metric)
    groups = find_fusion_groups(model, target.kernels)
    units_of_cells = "dB" if metric is None else f"dB / {metric.name}"
    head = f"{arguments.task}, {len(evaluation)} samples, {units_of_cells}"
    print(f"| {head} | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    # Which weights are rounded how does not depend on the ranges of activations: rounded once, used by all.
    made: list[Rounder] = []
    for observer in get_args(Observer):
        plan = static_plan(model, groups, calibration, target, Calibration(observer=observer))
        made = made or rounders(model, plan, calibration, target, recipe.seed)
        cells = [cell(measured(model, plan, r, evaluation, target, reference, metric)[0]) for r in made]
        print(f"| {observer} | {' | '.join(cells)} |", flush=True)
    if reference.fidelity.metric is not None:
        print(f"\nThe original: {reference.fidelity.metric:.4f}")


if __name__ == "__main__":
    main()
