"""The build: all stages from a model and samples to a measured package, in their order."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgepack import __version__
from edgepack.benchmark.bench import Latency, bench
from edgepack.benchmark.environment import environment
from edgepack.benchmark.group_figures import NOTHING_MEASURED, GroupFigures, group_rows, measure_groups
from edgepack.calibration.ranges import RangeTable, load_ranges
from edgepack.calibration.run import calibrate
from edgepack.compression.pass_inputs import PassInputs
from edgepack.data.samples import Samples
from edgepack.data.splits import Splits, open_splits
from edgepack.evaluation.check import Baseline, baseline, check, check_together
from edgepack.evaluation.gate import judge, leaves_room
from edgepack.evaluation.metrics import resolve_metric
from edgepack.export.artifacts import Artifacts, figures_of, outdated, require_runtimes, write_artifacts
from edgepack.export.epk import export_epk
from edgepack.export.inputs import ExportInputs, digest_of, facts_of
from edgepack.export.tflite.export import tensors_for
from edgepack.files.atomic import publish, scratch_folder
from edgepack.graph.constant_names import restore_constant_names
from edgepack.graph.half_precision import float32_bytes, refuse_bfloat16
from edgepack.graph.prepare import prepare
from edgepack.ir.files import load_model, require_float, save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.model import LARGE_BYTES
from edgepack.ir.scheme import Granularity
from edgepack.pack.epk import Packed
from edgepack.pipeline.candidate_selection import Quantizable, choose_candidate
from edgepack.pipeline.job import PROBES, Job, counter, output_folder, probes, sparing
from edgepack.pipeline.limits import floor_of, limits, with_recipe_settings
from edgepack.pipeline.passes import run_passes
from edgepack.pipeline.progress import Clock
from edgepack.pipeline.stage_breakdown import check_steps, pack_steps, stage_breakdown
from edgepack.pipeline.weights import ROUNDING_SAMPLES, WeightRounding, round_all, rounding_note, trained
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import requested_precisions, tensors_to_observe
from edgepack.quantization.plan.types import QuantPlan
from edgepack.quantization.weights.cross_layer_equalization import equalize
from edgepack.quantization.weights.low_bit import bits_of_groups
from edgepack.quantization.weights.saturation import ReducedRange, outputs_that_saturate, reduced_range_notes
from edgepack.report.html.render import write_html
from edgepack.report.text import text
from edgepack.results import BuildReport, DeviceRun
from edgepack.runtime.fused import fusion_report
from edgepack.runtime.host import accuracy_notes, for_accuracy
from edgepack.selection.choose import Choice
from edgepack.selection.trials import DEVICE_PROBES
from edgepack.training.require import require_torch

LARGE = (
    "a large model: its weights are never in memory as a whole, so they are rounded to nearest, and times "
    "are measured without prepacked weights"
)
BENCH_SECONDS = 60.0
"""Most time for the final latencies of all files; slow models get fewer rounds."""
EXPORT_PROBES = 3
"""Samples on which artifacts of other formats are compared with the ``.onnx``."""


def build(job: Job) -> tuple[BuildReport, Path]:
    """Run all stages and write the package; gives its report and its folder.

    A build that fails or is killed leaves the output folder as it was, and never changes its inputs. A
    gate that is not met raises no error here; see ``passed`` of the report.

    Raises:
        EdgepackError: see :mod:`edgepack.errors`.
    """
    job = replace(job, target=with_recipe_settings(job.target, job.recipe))
    require_runtimes(job.target)
    if job.recipe.trains:
        require_torch()
    output = output_folder(job.recipe, job.target)
    with scratch_folder(output) as scratch:
        package = scratch / "package"
        package.mkdir()
        clock = Clock(job.progress)
        report = _measure(_make(job, clock, package, scratch), clock, scratch)
        (package / "report.json").write_text(report.to_json(), encoding="utf-8")
        (package / "report.txt").write_text(text(report), encoding="utf-8")
        write_html(package)
        publish(package, output, outdated(output, package))
    return report, output


Groups = tuple[FusionGroup, ...]


@dataclass(frozen=True, slots=True)
class _Made:
    """What a build has made, to be checked, timed and reported."""

    job: Job
    original: ir.Model
    model: ir.Model
    """Normalized, after all passes."""
    notes: tuple[str, ...]
    """Notes for readers of the figures."""
    data: Splits
    reference: Baseline
    steps: Mapping[str, Path]
    """The model's file after each pass."""
    table: RangeTable
    choice: Choice
    artifacts: Artifacts
    packed: Mapping[str, Packed]
    packed_steps: Mapping[str, Packed]
    digests: Mapping[str, str]


def _make(job: Job, clock: Clock, package: Path, scratch: Path) -> _Made:
    """From the recipe's files to the artifacts: every stage that decides the content of the package."""
    recipe = job.recipe
    digests = {"recipe": digest_of(recipe.settings_json()), "target": digest_of(job.target.model_dump_json())}
    with clock.stage("load") as notes:
        original = load_model(recipe.model)
        require_float(original, recipe.model)
        refuse_bfloat16(original, recipe.model)
        data = open_splits(recipe, job.target, job.base, original)
        metric = resolve_metric(recipe.metric, job.base) if recipe.metric else None
        notes.extend(data.notes)
        if large := float32_bytes(original) > LARGE_BYTES:
            notes.append(LARGE)
            job = sparing(job)
    with clock.stage("normalize") as notes:
        model, prepared = prepare(original, job.target)
        half_precision = prepared.half_precision.lines()
        notes.extend((*(f"{rule}: {count}" for rule, count in prepared.applied.items()), *half_precision))
    with clock.stage("check original"):
        on_sample = counter(job, "check original", data.evaluation)
        reference = baseline(recipe.model, data.evaluation, for_accuracy(job.target), metric, on_sample)
    passed = run_passes(
        model, recipe.passes, _pass_inputs(job, data, reference, scratch), clock.stage, scratch
    )
    model, steps = _equalized(job, clock, passed.model, data.calibration), passed.files
    groups = find_fusion_groups(model, job.target.kernels)
    with clock.stage("calibrate") as notes:
        table = _ranges(job, model, groups, data.calibration)
        notes.append(f"{len(table.ranges)} tensors, {table.samples} samples, {table.observer}")
    groups = _renamed(job, model, original, groups)
    reduced_range = _reduced_range(job, clock, model, groups, table, data.calibration)
    with clock.stage("round") as notes:
        bits = bits_of_groups(model, groups, recipe.quantize, job.target)
        some = data.calibration.spread(ROUNDING_SAMPLES)
        rounding_inputs = WeightRounding(recipe, job.target, model, groups, table, reduced_range, bits, large)
        rounder = round_all(rounding_inputs, some, scratch, counter(job, "round", some))
        notes.extend((*bits.notes, rounding_note(rounder, large=large)))
    rounder, table = trained(rounding_inputs, rounder, data.training, clock)
    table.save(package / "ranges.json")
    with clock.stage("choose") as notes:
        fixed = requested_precisions(groups, recipe.quantize.overrides)
        made = Quantizable(model, groups, table, reduced_range, rounder)
        choice = choose_candidate(job, made, fixed, data.calibration, reference, scratch)
        notes.extend(
            (
                f"{len(choice.candidates)} candidates measured",
                *choice.notes,
                *reduced_range_notes(choice.plan),
            )
        )
    with clock.stage("export") as notes:
        facts = facts_of(job.target.name, digests, table)
        keeps = _keeps(job, reference)
        inputs = ExportInputs(
            recipe.model, model, choice, fixed, table, rounder, reference.shapes, facts, keeps,
            recipe.keep_names,
        )  # fmt: skip
        artifacts = write_artifacts(inputs, job.target, probes(data.evaluation, EXPORT_PROBES), package)
        notes.extend(f"{refusal.file} not built: {refusal.reason}" for refusal in artifacts.refused)
        packed = export_epk(artifacts.files, package, scratch, ship="epk" in job.target.formats, large=large)
        packed_steps = pack_steps(recipe.model, steps, scratch, large=large)
    files = (steps, table, choice, artifacts, packed, packed_steps, digests)
    return _Made(job, original, model, half_precision, data, reference, *files)


def _measure(made: _Made, clock: Clock, scratch: Path) -> BuildReport:
    """Check and time the artifacts, and apply the gate."""
    job, data, choice, artifacts, steps = made.job, made.data, made.choice, made.artifacts, made.steps
    recipe, reference = job.recipe, made.reference
    with clock.stage("check"):
        on_sample = counter(job, "check", data.evaluation)
        fidelity, parity = check_together(artifacts.files, reference, on_sample)
        at_steps = check_steps(steps, reference)
    with clock.stage("bench"):
        latencies, devices = _bench(job, {**artifacts.files, **steps}, data.evaluation)
    with clock.stage("units"):
        fused, figures = _group_figures(job, made.model, choice.plan, artifacts.files["onnx"], data, scratch)
    models = figures_of(
        recipe.model, artifacts.files, latencies, {"original": reference.fidelity, **fidelity}, made.packed
    )
    gate = judge(limits(recipe, job.target, reference.metric), models, asked_for=recipe.gate is not None)
    return BuildReport(
        edgepack_version=__version__,
        model=recipe.model.name,
        target=job.target.name,
        command=job.command,
        passed=all(line.passed for line in gate),
        models=models,
        refused=artifacts.refused,
        parity=parity,
        waterfall=stage_breakdown(models, steps, clock.notes, at_steps, made.packed_steps, latencies),
        gate=gate,
        candidates=tuple(choice.candidates),
        units=group_rows(choice.plan, made.model, figures),
        sensitivity=choice.sensitivity,
        runtime={
            **fused,
            "conversions_us": round(figures.conversions_us, 2),
            "weighed_without": list(job.target.runtime.absent_optimizers),
            **({"tflite": artifacts.tflite} if artifacts.tflite else {}),
        },
        stages=tuple(clock.stages),
        environment={**environment(), "threads": job.target.runtime.threads},
        devices=devices,
        notes=(*accuracy_notes(job.target), *made.notes),
        fingerprints={
            "model": fingerprint(made.original),
            "calibration": made.table.samples_fingerprint,
            **made.digests,
        },
    )


def _group_figures(
    job: Job, model: ir.Model, plan: QuantPlan, built: Path, data: Splits, folder: Path
) -> tuple[dict[str, object], GroupFigures]:
    """What the runtime fused in the ``.onnx``, and the figures of each group; none for a large model."""
    fused = fusion_report(built, job.target.runtime).as_dict()
    if job.large:
        return fused, NOTHING_MEASURED
    return fused, measure_groups(model, built, plan, data.calibration.spread(PROBES), job.target, folder)


def _pass_inputs(job: Job, data: Splits, reference: Baseline, scratch: Path) -> PassInputs:
    """The inputs of passes; ``accurate`` checks a model on the evaluation data, as the built one is."""

    def accurate(model: ir.Model) -> bool:
        save_model(model, path := scratch / "accurate.onnx")
        found = check(path, reference)
        return leaves_room(limits(job.recipe, job.target, reference.metric), reference.fidelity, found)

    return PassInputs(
        job.target, data.calibration, data.training, os.cpu_count() or 1, job.recipe.seed, accurate
    )


def _ranges(job: Job, model: ir.Model, groups: Sequence[FusionGroup], samples: Samples) -> RangeTable:
    names = tensors_to_observe(groups)
    if "tflite" in job.target.formats:
        names = tensors_for(model, job.target)
    if job.ranges is not None:
        table = load_ranges(job.ranges)
        table.require(names, fingerprint(model), str(job.ranges))
        return table
    return calibrate(
        model,
        samples,
        names,
        job.recipe.calibration,
        threads=os.cpu_count() or 1,  # the host's: ranges do not depend on the target's
        on_sample=counter(job, "calibrate", samples),
    )


def _renamed(
    job: Job, model: ir.Model, original: ir.Model, groups: tuple[FusionGroup, ...]
) -> tuple[FusionGroup, ...]:
    """The groups after initializers got their original names back, where the recipe requests it.

    This runs after calibration, since saved ranges refer to the normalized model's names.
    """
    if not job.recipe.keep_names:
        return groups
    restore_constant_names(model, original)
    return find_fusion_groups(model, job.target.kernels)


def _equalized(job: Job, clock: Clock, model: ir.Model, samples: Samples) -> ir.Model:
    """Cross-layer equalization, for targets with per-tensor weight scales."""
    if job.large or job.target.quantization.weight_granularity is not Granularity.PER_TENSOR:
        return model
    with clock.stage("equalize") as notes:
        some = samples.spread(ROUNDING_SAMPLES)
        equal, count = equalize(model, some, threads=os.cpu_count() or 1)
        notes.append(f"{count} pairs of layers")
    return equal


def _reduced_range(
    job: Job,
    clock: Clock,
    model: ir.Model,
    groups: Sequence[FusionGroup],
    table: RangeTable,
    samples: Samples,
) -> ReducedRange:
    if not job.target.quantization.saturates:
        return {}
    with clock.stage("saturation"):
        some = samples.spread(ROUNDING_SAMPLES)
        return outputs_that_saturate(model, groups, table.ranges, job.target, some, seed=job.recipe.seed)


def _keeps(job: Job, reference: Baseline) -> Callable[[Path], bool]:
    """A function that tells whether a file keeps the gate's limits of accuracy on the evaluation data."""
    floor = floor_of(limits(job.recipe, job.target, reference.metric), reference.fidelity)
    return lambda path: not floor.limits_anything or floor.on_evaluation(check(path, reference))


def _bench(
    job: Job, files: Mapping[str, Path], samples: Samples
) -> tuple[dict[str, Latency], tuple[DeviceRun, ...]]:
    models = {"original": job.recipe.model, **files}
    settings = job.recipe.bench
    runtime, runs = job.target.runtime, settings.runs
    if job.timing is not None:
        few = probes(samples, DEVICE_PROBES)
        found, device = job.timing.latencies(models, for_accuracy(job.target), few, runs)
        return found, (device,)
    feeds = probes(samples)
    return bench(models, runtime, feeds, warmup=settings.warmup, runs=runs, seconds=BENCH_SECONDS), ()
