"""Weights of low-bit weights, activations in float: round to nearest against the default preset, on one task.

    python benchmarks/weight_bits.py SUITE_FOLDER TASK [--bits 4] [--target x86-cpu] [--samples 1000]

Both are made by the stages of a build with `quantize: {method: weight_only, weight_bits: BITS}`. Prints a
table in Markdown: dB and the share of samples whose argmax is the original's, and the task's metric, over
the evaluation samples; bytes of the .onnx.
"""

import argparse
import time
from pathlib import Path

import onnx_ir as ir
from ablation import ROUNDING_SAMPLES, cell, measured, read, spread

from edgepack.config.recipe import Quantize
from edgepack.config.target import Target, load_target
from edgepack.data.samples import Samples
from edgepack.evaluation.check import Baseline, baseline
from edgepack.evaluation.metrics import Metric, resolve_metric
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.weights.low_bit import LowBit, bits_of_groups
from edgepack.quantization.weights.rounding import Rounder, round_weights
from edgepack.runtime.host import for_accuracy

HERE = Path(__file__).parent


def weight_only_plan(
    model: ir.Model, groups: tuple[FusionGroup, ...], target: Target, low_bit: dict[str, LowBit]
) -> QuantPlan:
    methods = {u.name: Request(Precision.WEIGHT_ONLY) for u in groups}
    return make_plan(model, groups, {}, target, methods, WeightPreparation(low_bit=low_bit))


def row(
    name: str,
    model: ir.Model,
    plan: QuantPlan,
    rounder: Rounder,
    samples: Samples,
    target: Target,
    reference: Baseline,
    metric: Metric | None,
) -> str:
    found, size_bytes = measured(model, plan, rounder, samples, target, reference, metric)
    agreement = "" if found.agreement is None else f"{found.agreement:.3f}"
    return f"| {name} | {cell(found)} | {agreement} | {size_bytes:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("task")
    parser.add_argument("--bits", type=int, choices=(4, 6, 8), default=4)
    parser.add_argument("--target", default="x86-cpu")
    parser.add_argument("--samples", type=int, default=1000, help="evaluation samples, at most")
    arguments = parser.parse_args()
    target = load_target(arguments.target).model_copy(update={"min_opset": 21})
    recipe, model, calibration, evaluation = read(arguments.suite, arguments.task, target, arguments.samples)
    metric = resolve_metric(recipe.metric, HERE) if recipe.metric else None
    reference = baseline(recipe.model, evaluation, for_accuracy(target), metric)
    groups = find_fusion_groups(model, target.kernels)
    wanted = Quantize(method="weight_only", weight_bits=arguments.bits)
    plan = weight_only_plan(
        model, groups, target, dict(bits_of_groups(model, groups, wanted, target).low_bit)
    )
    head = f"{arguments.task}, weights of {arguments.bits} bits, {len(evaluation)} samples"
    print(f"| {head} | dB{'' if metric is None else f' / {metric.name}'} | agreement | bytes |")
    print("|---|---|---|---|")
    print(row("nearest", model, plan, Rounder(model), evaluation, target, reference, metric), flush=True)
    started = time.perf_counter()
    rounder = round_weights(
        model,
        plan,
        spread(calibration, ROUNDING_SAMPLES),
        gptq=True,
        threads=target.runtime.threads,
        seed=recipe.seed,
    )
    took_s = time.perf_counter() - started
    ours = weight_only_plan(model, groups, target, dict(rounder.low_bit))
    print(row("edgepack", model, ours, rounder, evaluation, target, reference, metric))
    print(f"\nRounding took {took_s:.0f} s on {target.runtime.threads} thread.")
    if reference.fidelity.metric is not None:
        print(f"The original: {reference.fidelity.metric:.4f}")


if __name__ == "__main__":
    main()
