"""The line: from a model and samples to a measured package. The only module that knows the order."""

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
from edgepack.pipeline.choosing import Quantizable, choose_form
from edgepack.pipeline.job import PROBES, Job, counter, output_folder, probes, sparing
from edgepack.pipeline.limits import floor_of, limits, with_recipe_settings
from edgepack.pipeline.passes import run_passes
from edgepack.pipeline.progress import Clock
from edgepack.pipeline.stage_breakdown import check_steps, pack_steps, stage_breakdown
from edgepack.pipeline.weights import ROUNDING_SAMPLES, WeightRounding, round_all, rounding_note, trained
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import requested_methods, tensors_to_observe
from edgepack.quantization.plan.types import QuantPlan
from edgepack.quantization.weights.cross_layer_equalization import equalize
from edgepack.quantization.weights.low_bit import bits_of_groups
from edgepack.quantization.weights.saturation import ReducedRange, outputs_that_saturate, reduced_range_notes
from edgepack.report.html.render import write_html
from edgepack.report.text import text
from edgepack.results import BuildReport, DeviceRun
from edgepack.runtime.fused import what_the_runtime_did
from edgepack.runtime.host import accuracy_notes, for_accuracy
from edgepack.selection.choose import Choice
from edgepack.selection.trials import DEVICE_PROBES
from edgepack.training.require import require_torch

LARGE = (
    "a large model: its weights never are in memory as a whole, so they are rounded to nearest, and all is "
    "measured without laying them out anew for the CPU"
)
BENCH_SECONDS = 60.0
"""For timing all files of a package at the end, where fewer rounds can keep to it."""
EXPORT_PROBES = 3
"""Samples that an artifact in another format is compared on."""


def build(job: Job) -> tuple[BuildReport, Path]:
    """Run the whole line and write the package; gives its report and its folder.

    A build that fails or is killed leaves nothing in the output folder, and never touches its inputs. A
    gate that is not met is no failure here: the report says so in ``passed``.

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
    """What a build has made, to be checked, timed and told of."""

    job: Job
    original: ir.Model
    model: ir.Model
    """Normalized, after all passes."""
    notes: tuple[str, ...]
    """What the figures must be read with."""
    data: Splits
    reference: Baseline
    steps: Mapping[str, Path]
    """A file of the model after each pass."""
    table: RangeTable
    choice: Choice
    artifacts: Artifacts
    packed: Mapping[str, Packed]
    packed_steps: Mapping[str, Packed]
    digests: Mapping[str, str]


def _make(job: Job, clock: Clock, package: Path, scratch: Path) -> _Made:
    """From files to files: everything that decides what the package is."""
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
        fixed = requested_methods(groups, recipe.quantize.overrides)
        made = Quantizable(model, groups, table, reduced_range, rounder)
        choice = choose_form(job, made, fixed, data.calibration, reference, scratch)
        notes.extend(
            (f"{len(choice.candidates)} forms measured", *choice.notes, *reduced_range_notes(choice.plan))
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
    """Check, time and judge what was made."""
    job, data, choice, artifacts, steps = made.job, made.data, made.choice, made.artifacts, made.steps
    recipe, reference = job.recipe, made.reference
    with clock.stage("check"):
        on_sample = counter(job, "check", data.evaluation)
        fidelity, parity = check_together(artifacts.files, reference, on_sample)
        at_steps = check_steps(steps, reference)
    with clock.stage("bench"):
        latencies, devices = _bench(job, {**artifacts.files, **steps}, data.evaluation)
    with clock.stage("units"):
        fused, figures = _look_inside(job, made.model, choice.plan, artifacts.files["onnx"], data, scratch)
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
        notes=(*made.notes, *accuracy_notes(job.target)),
        fingerprints={
            "model": fingerprint(made.original),
            "calibration": made.table.samples_fingerprint,
            **made.digests,
        },
    )


def _look_inside(
    job: Job, model: ir.Model, plan: QuantPlan, built: Path, data: Splits, folder: Path
) -> tuple[dict[str, object], GroupFigures]:
    """What the runtime made of the ``.onnx`` and, but for a large model, what each group of it costs."""
    fused = what_the_runtime_did(built, job.target.runtime).as_dict()
    if job.large:
        return fused, NOTHING_MEASURED
    return fused, measure_groups(model, built, plan, data.calibration.spread(PROBES), job.target, folder)


def _pass_inputs(job: Job, data: Splits, reference: Baseline, scratch: Path) -> PassInputs:
    """What passes work with; their models are checked as the built one will be."""

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
        threads=os.cpu_count() or 1,  # the host's, not the target's: ranges do not depend on it
        on_sample=counter(job, "calibrate", samples),
    )


def _renamed(
    job: Job, model: ir.Model, original: ir.Model, groups: tuple[FusionGroup, ...]
) -> tuple[FusionGroup, ...]:
    """The groups once constants have their original names, where the recipe asks for that.

    Not before ranges are measured, which belong to the model under the names that it has otherwise.
    """
    if not job.recipe.keep_names:
        return groups
    restore_constant_names(model, original)
    return find_fusion_groups(model, job.target.kernels)


def _equalized(job: Job, clock: Clock, model: ir.Model, samples: Samples) -> ir.Model:
    """Layers with one scale for a whole weight get channels of like ranges."""
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
    """Whether a file keeps, on the evaluation data, the accuracy that the gate asks for."""
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
