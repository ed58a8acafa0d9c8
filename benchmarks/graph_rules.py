"""Our rules of normalization beside onnxslim and the rewriter of onnxscript.

    python benchmarks/graph_rules.py SUITE_FOLDER [--tests] [--rules-only]

Three tables, in Markdown. Whole tools: nodes left, seconds, and the largest difference of an output from the
original's relative to its largest value, in onnxruntime with its own optimizations off and on. Then nodes
left by ``normalize`` without each single rule. Then, where onnxscript has a counterpart of a rule, nodes left
with the counterpart in its place; with --tests also how many tests of the rules fail then that pass
otherwise. onnxslim is left out where it is not installed.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
import onnxscript.optimizer
import onnxscript.rewriter
from onnxscript.rewriter.rules import common
from suite import HERE, recipe_for

from edgepack.config.recipe import load_recipe
from edgepack.data.samples import open_samples
from edgepack.graph import normalize as module
from edgepack.graph.notes import Log
from edgepack.graph.rules import affine, cleanup, einsum, fusions, gelu, indexing, resize, selection, softmax
from edgepack.graph.rules.rule import DONE, Outcome, Rule
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.files import load_model
from edgepack.ir.inputs import input_specs
from edgepack.ir.model import walk_nodes

TASKS = ("dlrm_ml100k", "dscnn_fsdd", "efficientnet_lite0", "fastestdet", "minilm_sst2", "ppocrv4_rec")
EXPORTS = HERE.parent / "tests" / "exports"
TESTS = [str(HERE.parent / "tests" / "graph" / name) for name in ("rules", "test_normalize.py")]
TABLES = (
    cleanup.BEFORE_FOLDING, cleanup.AFTER_FOLDING, cleanup.CLEANING, fusions.ACTIVATIONS, fusions.PADDING,
    einsum.EINSUM, gelu.GELU, affine.FOLDING, indexing.INDEXING, selection.SELECTION, softmax.TURNED,
    resize.RESIZING, affine.GEMM, softmax.ROWS,
)  # fmt: skip
RULES = tuple(rule for table in TABLES for rule in table)
COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "drop_no_op": (
        "mul_by_1_rule", "add_0_rule", "sub_0_rule", "div_by_1_rule", "dropout_zero_rule",
        "dropout_inference_rule", "no_op_cast_rule", "no_op_expand_rule", "no_op_transpose_rule",
    ),
    "merge_transposes": ("transpose_transpose_rule",),
    "merge_reshapes": ("reshape_reshape_rule",),
    "constant_reshape": ("materialize_reshape_shape_rule",),
    "merge_clips": (
        "successive_clip_relu_rule", "successive_relu_clip_rule", "successive_relu_rule",
        "successive_clip_rule",
    ),
    "hard_swish": ("fuse_hardswish_rules",),
    "hard_sigmoid": ("fuse_hardswish_rules",),
    "explicit_pads": ("normalize_pad_format_conv_rule",),
    "fold_pad": ("fuse_pad_into_conv_rule",),
    "fold_after": (
        "fuse_batchnorm_into_conv_rule", "fuse_batchnorm_into_conv_transpose_rule",
        "fuse_batchnorm_into_gemm_rule", "conv_affine_fusion_rule",
    ),
    "fold_before": ("affine_conv_fusion_rule",),
    "matmul_add_to_gemm": ("matmul_add_to_gemm_rule",),
    "flatten_of_reshape": ("flatten_to_reshape_rule", "reshape_reshape_rule"),
}  # fmt: skip
"""Rules of onnxscript that rewrite some of what ours does."""
ROUNDS = 8
Model = tuple[str, Path, list[Feeds]]


def models(suite: Path) -> Iterator[Model]:
    """Name, file and samples: calibration data of the suite, random numbers for the small exports."""
    for task in TASKS:
        recipe_file = HERE / f".recipe-{task}.yaml"
        recipe_file.write_text(recipe_for(suite, task), encoding="utf-8")
        try:
            recipe = load_recipe(recipe_file, {})
        finally:
            recipe_file.unlink()
        assert recipe.calibration_data is not None
        specs = input_specs(load_model(recipe.model))
        samples = open_samples(recipe.calibration_data, "calibration", specs, recipe.images, base=HERE)
        yield task, recipe.model, [s.feeds for _, s in zip(range(4), samples, strict=False)]
    rng = np.random.default_rng(0)
    for path in sorted(EXPORTS.glob("*.onnx")):
        specs = input_specs(load_model(path))
        shapes = {s.name: [d if isinstance(d, int) else 8 for d in s.shape or ()] for s in specs}
        yield path.stem, path, [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}]


def ours(path: Path) -> ir.Model:
    """``normalize``, as for a target that wants opset 13 at least."""
    return module.normalize(load_model(path), min_opset=13, max_opset=21)[0]


def scripts(path: Path) -> ir.Model:
    """The optimizer of onnxscript and the default rules of its rewriter."""
    model = load_model(path)
    with module._quiet_onnxscript():
        onnxscript.optimizer.optimize(model)
        rewritten: ir.Model = onnxscript.rewriter.rewrite(model)
    return rewritten


def slim(path: Path) -> ir.Model:
    """onnxslim with its defaults."""
    import onnxslim  # noqa: PLC0415  # no dependency

    with redirect_stdout(io.StringIO()):
        slimmed: onnx.ModelProto = onnxslim.slim(onnx.load_model(str(path)))
    return ir.from_proto(slimmed)


def tools() -> dict[str, Callable[[Path], ir.Model]]:
    found: dict[str, Callable[[Path], ir.Model]] = {"normalize": ours, "onnxscript": scripts}
    return found | ({"onnxslim": slim} if find_spec("onnxslim") else {})


def nodes(model: ir.Model) -> int:
    return sum(1 for _ in walk_nodes(model.graph))


def outputs(model: ir.Model, samples: Sequence[Feeds], *, optimized: bool) -> list[list[Array]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(feeds)) for feeds in samples]


def difference(model: ir.Model, path: Path, samples: Sequence[Feeds], *, optimized: bool) -> float:
    """The largest of any output, relative to the largest value of the original's."""
    pairs = zip(
        outputs(load_model(path), samples, optimized=optimized),
        outputs(model, samples, optimized=optimized),
        strict=True,
    )
    worst = 0.0
    for a, b in ((a, b) for left, right in pairs for a, b in zip(left, right, strict=True)):
        wide, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.abs(wide - other).max() / max(np.abs(wide).max(), 1e-12)))
    return worst


def whole(all_models: Sequence[Model]) -> None:
    print("| model | nodes | tool | left | seconds | difference, plain | difference, optimized |")
    print("|---|---|---|---|---|---|---|")
    for name, path, samples in all_models:
        before = nodes(load_model(path))
        for tool, call in tools().items():
            call(path)  # imports
            started = time.perf_counter()
            try:
                model = call(path)
                seconds = time.perf_counter() - started
                far = [difference(model, path, samples, optimized=o) for o in (False, True)]
            except Exception as error:  # noqa: BLE001  # what a tool makes of a model is a result
                print(f"| {name} | {before} | {tool} | {type(error).__name__}: {str(error)[:90]!r} |||||")
                continue
            left = f"{nodes(model)} | {seconds:.2f} | {far[0]:.1e} | {far[1]:.1e}"
            print(f"| {name} | {before} | {tool} | {left} |", flush=True)


@contextmanager
def without(rule: str, *instead: str) -> Iterator[None]:
    """``normalize`` with one rule off, or with rules of onnxscript in its place."""
    apply = module._apply

    def patched(model: ir.Model, log: Log, rules: tuple[Rule, ...]) -> None:
        kept = tuple(r for r in rules if r.name != rule)
        for _ in range(ROUNDS):
            apply(model, log, kept)
            done = library(model, instead) if len(kept) < len(rules) else 0
            log.applied[rule] += done
            if not done:
                break

    with patch.object(module, "_apply", patched):
        yield


def library(model: ir.Model, names: Sequence[str]) -> int:
    """Apply rules of onnxscript; how often they applied."""
    done = 0
    for name in names:
        found: Any = getattr(common, name)
        rules = list(found()) if callable(found) else [found]
        with module._quiet_onnxscript():
            done += onnxscript.rewriter.RewriteRuleSet(rules).apply_to_model(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return done


@contextmanager
def observed(applied: set[str]) -> Iterator[None]:
    """``normalize`` that notes which rules apply."""
    apply = module._apply

    def watched(rule: Rule) -> Rule:
        def once(main: ir.Graph, node: ir.Node) -> Outcome:
            outcome = rule.apply(main, node)
            applied.update({rule.name} if outcome == DONE else ())
            return outcome

        return replace(rule, apply=once)

    def patched(model: ir.Model, log: Log, rules: tuple[Rule, ...]) -> None:
        apply(model, log, tuple(map(watched, rules)))

    with patch.object(module, "_apply", patched):
        yield


def counted(all_models: Sequence[Model]) -> dict[str, int | str]:
    """Nodes left of each model, or what is wrong with it."""
    found: dict[str, int | str] = {}
    for name, path, samples in all_models:
        try:
            model = ours(path)
            far = difference(model, path, samples, optimized=False)
            found[name] = nodes(model) if far < 1e-3 else f"{nodes(model)}, {far:.0e} off"
        except Exception as error:  # noqa: BLE001  # as above
            found[name] = type(error).__name__
    return found


def changes(found: dict[str, int | str], base: dict[str, int | str]) -> str:
    return ", ".join(f"{n} {base[n]} → {found[n]}" for n in found if found[n] != base[n]) or "none"


def failing() -> set[str]:
    """Tests of the rules that fail in this process."""
    import pytest  # noqa: PLC0415  # no dependency of a benchmark otherwise

    class Plugin:
        failed: set[str]

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.failed.add(report.nodeid)

    plugin = Plugin()
    plugin.failed = set()
    with redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-p", "no:cacheprovider", *TESTS], plugins=[plugin])
    return plugin.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--rules-only", action="store_true", help="without the table of whole tools")
    known = parser.parse_args()
    all_models = list(models(known.suite))
    if not known.rules_only:
        whole(all_models)
    if not find_spec("onnxslim"):
        print("\nonnxslim is not installed: left out")
    base: dict[str, int | str] = {}
    applied: dict[str, set[str]] = {}
    for model in all_models:
        applied[model[0]] = set[str]()
        with observed(applied[model[0]]):
            base |= counted([model])
    print("\n| rule | applies to | nodes left without it |\n|---|---|---|")
    for rule in RULES:
        used = [model for model in all_models if rule.name in applied[model[0]]]
        with without(rule.name):
            print(f"| {rule.name} | {len(used)} models | {changes(counted(used), base)} |", flush=True)
    known_failures = failing() if known.tests else set()
    print("\n| rule | nodes left with onnxscript's in its place | tests that fail then |\n|---|---|---|")
    for name, instead in COUNTERPARTS.items():
        with without(name, *instead):
            found = changes(counted(all_models), base)
            tests = str(len(failing() - known_failures)) if known.tests else "–"
        print(f"| {name} | {found} | {tests} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
