"""Training after strong compression, on the unlabelled calibration samples of one task of a suite.

    python benchmarks/tune_classifier.py SUITE_FOLDER TASK pruned [--views 4] [--seeds 0 1 2] [--folder DIR]
    python benchmarks/tune_classifier.py SUITE_FOLDER TASK quantized [--seeds 0 1 2]

pruned: OBS pruning, then distillation; agreement with the original in float and as int8. With a
folder, a run that was stopped goes on from what is there.
quantized: int8 with one scale a weight, by rounding alone and after quantization-aware training that starts
from what GPTQ has rounded to.
More settings of training go behind as KEY=VALUE. Prints one JSON object a line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from suite import recipe_file

from edgepack.calibration.ranges import Range
from edgepack.calibration.run import calibrate
from edgepack.compression.pass_inputs import some_samples
from edgepack.compression.prune import prune
from edgepack.config.passes import Prune
from edgepack.config.recipe import Calibration, load_recipe
from edgepack.config.strict_yaml import parse
from edgepack.config.target import Target, load_target
from edgepack.config.training import AwareTune, Tune
from edgepack.data.samples import Samples, open_samples
from edgepack.graph.prepare import prepare
from edgepack.ir.files import load_model, save_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.scheme import Granularity
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder, round_weights, with_trained
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import open_model
from edgepack.training.quantization_aware import train_integers
from edgepack.training.train import TrainingRun, Tuned, tune


class Task:
    """A classifier, its samples and the decisions of the original."""

    def __init__(self, suite: Path, name: str, threads: int) -> None:
        with recipe_file(suite, name) as file:
            self.recipe = load_recipe(file, {})
        self.threads = threads
        self.target = load_target("x86-cpu")
        original = load_model(self.recipe.model)
        self.model, _ = prepare(original, self.target)
        assert self.recipe.calibration_data is not None
        assert self.recipe.evaluation_data is not None
        inputs, images, base = input_specs(original), self.recipe.images, Path()
        self.calibration = open_samples(
            self.recipe.calibration_data, "calibration", inputs, images, base=base
        )
        self.evaluation = open_samples(self.recipe.evaluation_data, "evaluation", inputs, images, base=base)
        self.reference = self.decisions(original)

    def decisions(self, model: ir.Model) -> list[int]:
        """The class of each evaluation sample."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_model(model, path)
            runner = open_model(path, for_accuracy(self.target))
            return [int(np.argmax(next(iter(runner.run(s.feeds).values())))) for s in self.evaluation]

    def scores(self, model: ir.Model) -> dict[str, float]:
        """Agreement with the original, and the share of right labels of both where there are labels."""
        found, labels = self.decisions(model), self.evaluation.labels
        scores = {"agreement": float(np.mean(np.equal(found, self.reference)))}
        if labels is not None:
            scores["top1"] = float(np.mean([a == b for a, b in zip(found, labels, strict=True)]))
            scores["top1_original"] = float(
                np.mean([a == b for a, b in zip(self.reference, labels, strict=True)])
            )
        return {name: round(score, 4) for name, score in scores.items()}

    def ranges(self, model: ir.Model, target: Target) -> Mapping[str, Range]:
        """Ranges of all values that can be int8."""
        names = tensors_to_observe(find_fusion_groups(model, target.kernels))
        return calibrate(model, self.calibration, names, Calibration(), threads=self.threads).ranges

    def plan(self, model: ir.Model, target: Target, ranges: Mapping[str, Range]) -> QuantPlan:
        """Every fusion group in int8."""
        groups = find_fusion_groups(model, target.kernels)
        return make_plan(model, groups, ranges, target, {u.name: Request(Precision.STATIC) for u in groups})

    def rounded(self, model: ir.Model, target: Target, seed: int) -> ir.Model:
        """The int8 model with GPTQ, as in a build."""
        plan = self.plan(model, target, self.ranges(model, target))
        some: Samples = some_samples(self.calibration)
        rounder = round_weights(model, plan, some, gptq=True, threads=self.threads, seed=seed)
        return apply_plan(model, plan, rounder(plan))


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def ended(made: Tuned) -> dict[str, object]:
    last = made.log[-1]
    return {"steps": last.step, "train_s": last.elapsed_s, "loss": [made.log[0].loss, last.loss]}


def zeroed(task: Task, config: Prune, seed: int, folder: Path) -> ir.Model:
    """The pruned model, from the folder if it is there."""
    file = folder / f"pruned_{seed}.onnx"
    if file.exists():
        return load_model(file)
    groups = find_fusion_groups(task.model, task.target.kernels)
    started = time.perf_counter(), time.process_time()
    some = some_samples(task.calibration)
    sparse, rows = prune(task.model, groups, some, config, threads=task.threads, seed=seed)
    zeros = sum(r.zeros for r in rows) / sum(r.values for r in rows)
    s, cpu_s = (
        round(b - a) for a, b in zip(started, (time.perf_counter(), time.process_time()), strict=True)
    )
    tell(seed=seed, step="prune", s=s, cpu_s=cpu_s, zeros=round(zeros, 4))
    save_model(sparse, file)
    return sparse


def pruned(task: Task, settings: Tune, config: Prune, seeds: list[int], folder: Path) -> None:
    for seed in seeds:
        sparse = zeroed(task, config, seed, folder)
        tell(seed=seed, form="float", **task.scores(sparse))
        tell(seed=seed, form="int8", **task.scores(task.rounded(sparse, task.target, seed)))
        states = folder / f"states_{seed}"
        made = tune(
            sparse,
            task.model,
            task.calibration,
            settings,
            TrainingRun(seed, task.threads, states),
        )
        tell(seed=seed, step="tune", kept=made.kept_step, between=made.between, **ended(made))
        tell(seed=seed, form="float", **task.scores(made.model))
        tell(seed=seed, form="int8", **task.scores(task.rounded(made.model, task.target, seed)))


def quantized(task: Task, settings: AwareTune, seeds: list[int]) -> None:
    arithmetic = task.target.quantization.model_copy(update={"weight_granularity": Granularity.PER_TENSOR})
    target = task.target.model_copy(update={"quantization": arithmetic})
    ranges = task.ranges(task.model, target)
    plan = task.plan(task.model, target, ranges)
    tell(form="int8, nearest", **task.scores(apply_plan(task.model, plan, Rounder(task.model)(plan))))
    some = some_samples(task.calibration)
    for seed in seeds:
        rounder = round_weights(task.model, plan, some, gptq=True, threads=task.threads, seed=seed)
        tell(seed=seed, form="int8, GPTQ", **task.scores(apply_plan(task.model, plan, rounder(plan))))
        found = train_integers(
            task.model, plan, ranges, rounder, task.calibration, settings, TrainingRun(seed, task.threads)
        )
        tell(seed=seed, step="tune", notes=found.notes)
        after = task.plan(task.model, target, found.ranges)
        trained = with_trained(rounder, after, found.stored)
        tell(seed=seed, form="int8, trained", **task.scores(apply_plan(task.model, after, trained(after))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("task")
    parser.add_argument("what", choices=["pruned", "quantized"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--scope", default="measured", help="of pruning, rates by layer")
    parser.add_argument("--views", type=int, default=4, help="augmented copies of each image for pruning")
    parser.add_argument("--folder", type=Path, help="for what is found on the way")
    parser.add_argument("--keep-type", action="append", default=[], help="operators that stay dense")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    known = parser.parse_intermixed_args()
    given = dict(pair.split("=", 1) for pair in known.settings)
    task = Task(known.suite, known.task, known.threads)
    if known.what == "pruned":
        config = Prune(
            sparsity=known.sparsity, scope=known.scope, views=known.views, keep_types=tuple(known.keep_type)
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = known.folder or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            pruned(task, parse(Tune, given, "command line"), config, known.seeds, folder)
    else:
        quantized(task, parse(AwareTune, given, "command line"), known.seeds)


if __name__ == "__main__":
    main()
