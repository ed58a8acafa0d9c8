"""What zeros cost: agreement with the float original of each method of pruning, before quantization.

    python benchmarks/pruning.py SUITE_FOLDER [--sparsity 0.3 0.5] [--scope measured]

No training; biases are corrected with every method. Prints a table.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import yaml
from suite import recipe_for

from edgepack.compression.pass_inputs import some_samples
from edgepack.compression.prune import prune
from edgepack.config.passes import Prune
from edgepack.config.recipe import Recipe
from edgepack.config.target import load_target
from edgepack.data.samples import open_samples
from edgepack.evaluation.check import baseline, check
from edgepack.evaluation.metrics import resolve_metric
from edgepack.graph.prepare import prepare
from edgepack.ir.files import load_model, save_model
from edgepack.ir.inputs import input_specs
from edgepack.quantization.groups import find_fusion_groups
from edgepack.runtime.host import for_accuracy

METHODS = ("l1", "wanda", "second_order")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--task", default="efficientnet_lite0")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--views", type=int, default=0, help="augmented copies of each image for the moments")
    parser.add_argument("--scope", default="global", help="rates by layer: global, measured or layer")
    arguments = parser.parse_args()
    recipe = Recipe.model_validate(yaml.safe_load(recipe_for(arguments.suite, arguments.task)))
    target, base = load_target("x86-cpu"), Path(__file__).parent
    assert recipe.calibration_data is not None
    assert recipe.evaluation_data is not None
    model, _ = prepare(load_model(recipe.model), target)
    inputs, groups = input_specs(model), find_fusion_groups(model, target.kernels)
    calibration = open_samples(recipe.calibration_data, "calibration", inputs, recipe.images, base=base)
    evaluation = open_samples(recipe.evaluation_data, "evaluation", inputs, recipe.images, base=base)
    metric = resolve_metric(recipe.metric or "top1", base)
    reference = baseline(recipe.model, evaluation, for_accuracy(target), metric)
    some, threads = some_samples(calibration), os.cpu_count() or 1
    print(f"{arguments.task}: {metric.name} {reference.fidelity.metric:.4f}, {len(evaluation)} samples")
    print("| zeros | method | agreement | metric | dB | seconds |\n|---|---|---|---|---|---|")
    for sparsity in arguments.sparsity:
        for method in arguments.methods:
            config = Prune.model_validate(
                {"sparsity": sparsity, "method": method, "scope": arguments.scope, "views": arguments.views}
            )
            started = time.perf_counter()
            sparse, rows = prune(model, groups, some, config, threads=threads, seed=0)
            seconds = time.perf_counter() - started
            with tempfile.TemporaryDirectory() as folder:
                save_model(sparse, path := Path(folder) / "m.onnx")
                found = check(path, reference)
            zeros = sum(r.zeros for r in rows) / sum(r.values for r in rows)
            print(
                f"| {zeros:.1%} | {method} | {found.agreement:.3f} | {found.metric:.4f} "
                f"| {found.sqnr_db:.1f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
