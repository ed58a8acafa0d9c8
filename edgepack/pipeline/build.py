"""The line: from a model and samples to a measured package. The only module that knows the order."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgepack import __version__
from edgepack.benchmark.bench import Latency, bench
from edgepack.benchmark.devices.timing import DeviceTiming
from edgepack.benchmark.environment import environment
from edgepack.benchmark.unit_figures import NOTHING_MEASURED, UnitFigures, measure_units, unit_rows
from edgepack.calibration.ranges import RangeTable, load_ranges
from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Recipe
from edgepack.config.target import Target
from edgepack.data.samples import Samples
from edgepack.data.splits import Parts, open_parts
from edgepack.errors import ConfigError
from edgepack.evaluation.check import Baseline, baseline, check, check_together
from edgepack.evaluation.gate import judge, keeps_half
from edgepack.evaluation.metrics import resolve_metric
from edgepack.export.artifacts import Artifacts, figures_of, outdated, require_runtimes, write_artifacts
from edgepack.export.epk import export_epk
from edgepack.export.inputs import Material, digest_of, facts_of
from edgepack.export.tflite.export import tensors_for
from edgepack.files.atomic import publish, scratch_folder
from edgepack.graph.compact import names_of
from edgepack.graph.constant_names import restore_constant_names
from edgepack.graph.half_precision import float32_bytes, refuse_bfloat16
from edgepack.graph.prepare import prepare
from edgepack.ir.arrays import Feeds
from edgepack.ir.files import load_model, require_float, save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.model import LARGE_BYTES
from edgepack.ir.scheme import Granularity
from edgepack.pack.epk import Packed
from edgepack.pipeline.limits import as_wished, floor_of, kept_measurements, limits, search_task
from edgepack.pipeline.passes import PassMaterial, run_passes
from edgepack.pipeline.progress import Clock, Progress
from edgepack.pipeline.stage_breakdown import check_steps, pack_steps, waterfall
from edgepack.pipeline.weights import ROUNDING_SAMPLES, Storing, round_all, rounding_note, trained
from edgepack.quantization.groups import Unit, find_units
from edgepack.quantization.plan.plan import make_plan, requested_methods, tensors_to_observe
from edgepack.quantization.plan.preparation import WeightPreparation
from edgepack.quantization.plan.types import QuantPlan
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.cross_layer_equalization import equalize
from edgepack.quantization.weights.low_bit import bits_of_units
from edgepack.quantization.weights.rounding import Rounder
from edgepack.quantization.weights.saturation import Narrow, narrow_notes, outputs_that_saturate
from edgepack.report.html.render import write_page
from edgepack.report.text import text
from edgepack.results import BuildReport, DeviceRun, Fidelity
from edgepack.runtime.fused import what_the_runtime_did
from edgepack.selection.choose import Choice, choose
from edgepack.selection.trials import DEVICE_PROBES, Methods, TrialBench
from edgepack.training.require import require_torch

PROBES = 16
"""Calibration samples that candidates are timed and compared on."""
LARGE = (
    "a large model: its weights never are in memory as a whole, so they are rounded to nearest, and all is "
    "measured without laying them out anew for the CPU"
)
BENCH_SECONDS = 60.0
"""For timing all files of a package at the end, where fewer rounds can keep to it."""
EXPORT_PROBES = 3
"""Samples that an artifact in another format is compared on."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one build works on; everything is read and nothing is changed."""

    recipe: Recipe
    target: Target
    base: Path
    """Folder that ``module:function`` references are relative to."""
    command: str
    ranges: Path | None = None
    progress: Progress = lambda stage, done, total: None
    timing: DeviceTiming | None = None
    """The device that times forms and artifacts in the place of this host."""
    large: bool = False
    """Set by the build itself."""


def build(job: Job) -> tuple[BuildReport, Path]:
    """Run the whole line and write the package; gives its report and its folder.

    A build that fails or is killed leaves nothing in the output folder, and never touches its inputs. A
    gate that is not met is no failure here: the report says so in ``passed``.

    Raises:
        EdgepackError: see :mod:`edgepack.errors`.
    """
    job = replace(job, target=as_wished(job.target, job.recipe))
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
        write_page(package)
        publish(package, output, outdated(output, package))
    return report, output


def output_folder(recipe: Recipe, target: Target) -> Path:
    """The folder that the recipe names for ``target``.

    Raises:
        ConfigError: several targets would write to one folder.
    """
    if len(recipe.target) > 1 and "{target}" not in recipe.output:
        raise ConfigError(
            f"output {recipe.output!r}: several targets would write there; put {{target}} into the path"
        )
    return Path(recipe.output.replace("{target}", target.name))


@dataclass(frozen=True, slots=True)
class _Made:
    """What a build has made, to be checked, timed and told of."""

    job: Job
    original: ir.Model
    model: ir.Model
    """Normalized, after all passes."""
    notes: tuple[str, ...]
    """What the figures must be read with."""
    data: Parts
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
        data = open_parts(recipe, job.target, job.base, original)
        metric = resolve_metric(recipe.metric, job.base) if recipe.metric else None
        notes.extend(data.notes)
        if large := float32_bytes(original) > LARGE_BYTES:
            notes.append(LARGE)
            job = _sparing(job)
    with clock.stage("normalize") as notes:
        model, prepared = prepare(original, job.target)
        widened = prepared.widened.lines()
        notes.extend((*(f"{rule}: {count}" for rule, count in prepared.applied.items()), *widened))
    with clock.stage("check original"):
        on_sample = _counter(job, "check original", data.evaluation)
        reference = baseline(recipe.model, data.evaluation, job.target.runtime, metric, on_sample)
    passed = run_passes(model, recipe.passes, _material(job, data, reference, scratch), clock.stage, scratch)
    model, steps = _equalized(job, clock, passed.model, data.calibration), passed.files
    units = find_units(model, job.target.kernels)
    with clock.stage("calibrate") as notes:
        table = _ranges(job, model, units, data.calibration)
        notes.append(f"{len(table.ranges)} tensors, {table.samples} samples, {table.observer}")
    units = _renamed(job, model, original, units)
    narrow = _narrow(job, clock, model, units, table, data.calibration)
    with clock.stage("round") as notes:
        bits = bits_of_units(model, units, recipe.quantize, job.target)
        some = data.calibration.spread(ROUNDING_SAMPLES)
        storing = Storing(recipe, job.target, model, units, table, narrow, bits, large)
        rounder = round_all(storing, some, scratch, _counter(job, "round", some))
        notes.extend((*bits.notes, rounding_note(rounder, large=large)))
    rounder, table = trained(storing, rounder, data.training, clock)
    table.save(package / "ranges.json")
    with clock.stage("choose") as notes:
        choice = _choose(job, model, units, table, narrow, rounder, data, reference, scratch)
        notes.extend((f"{len(choice.candidates)} forms measured", *choice.notes, *narrow_notes(choice.plan)))
    with clock.stage("export") as notes:
        facts = facts_of(job.target.name, digests, table)
        keeps = _keeps(job, reference)
        fixed = _requested(job, units)
        material = Material(
            recipe.model, model, choice, fixed, table, rounder, reference.shapes, facts, keeps,
            recipe.keep_names,
        )  # fmt: skip
        artifacts = write_artifacts(material, job.target, _probes(data.evaluation, EXPORT_PROBES), package)
        notes.extend(f"{refusal.file} not built: {refusal.reason}" for refusal in artifacts.refused)
        packed = export_epk(artifacts.files, package, scratch, ship="epk" in job.target.formats, large=large)
        packed_steps = pack_steps(recipe.model, steps, scratch, large=large)
    made = (steps, table, choice, artifacts, packed, packed_steps, digests)
    return _Made(job, original, model, widened, data, reference, *made)


def _measure(made: _Made, clock: Clock, scratch: Path) -> BuildReport:
    """Check, time and judge what was made."""
    job, data, choice, artifacts, steps = made.job, made.data, made.choice, made.artifacts, made.steps
    recipe, reference = job.recipe, made.reference
    with clock.stage("check"):
        on_sample = _counter(job, "check", data.evaluation)
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
        waterfall=waterfall(models, steps, clock.notes, at_steps, made.packed_steps, latencies),
        gate=gate,
        candidates=tuple(choice.candidates),
        units=unit_rows(choice.plan, made.model, figures),
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
        notes=made.notes,
        fingerprints={
            "model": fingerprint(made.original),
            "calibration": made.table.samples_fingerprint,
            **made.digests,
        },
    )


def _look_inside(
    job: Job, model: ir.Model, plan: QuantPlan, built: Path, data: Parts, folder: Path
) -> tuple[dict[str, object], UnitFigures]:
    """What the runtime made of the ``.onnx`` and, but for a large model, what each unit of it costs."""
    runtime = job.target.runtime
    fused = what_the_runtime_did(built, runtime).as_dict()
    if job.large:
        return fused, NOTHING_MEASURED
    return fused, measure_units(model, built, plan, data.calibration.spread(PROBES), runtime, folder)


def _material(job: Job, data: Parts, reference: Baseline, scratch: Path) -> PassMaterial:
    """What passes work with; their models are checked as the built one will be."""

    def accurate(model: ir.Model) -> bool:
        save_model(model, path := scratch / "accurate.onnx")
        found = check(path, reference)
        return keeps_half(limits(job.recipe, job.target, reference.metric), reference.fidelity, found)

    return PassMaterial(
        job.target, data.calibration, data.training, os.cpu_count() or 1, job.recipe.seed, accurate
    )


def _ranges(job: Job, model: ir.Model, units: Sequence[Unit], samples: Samples) -> RangeTable:
    names = tensors_to_observe(units)
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
        on_sample=_counter(job, "calibrate", samples),
    )


def _renamed(job: Job, model: ir.Model, original: ir.Model, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The units once constants have their original names, where the recipe asks for that.

    Not before ranges are measured, which belong to the model under the names that it has otherwise.
    """
    if not job.recipe.keep_names:
        return units
    restore_constant_names(model, original)
    return find_units(model, job.target.kernels)


def _equalized(job: Job, clock: Clock, model: ir.Model, samples: Samples) -> ir.Model:
    """Layers with one scale for a whole weight get channels of like ranges."""
    if job.large or job.target.quantization.weight_granularity is not Granularity.PER_TENSOR:
        return model
    with clock.stage("equalize") as notes:
        some = samples.spread(ROUNDING_SAMPLES)
        equal, count = equalize(model, some, threads=os.cpu_count() or 1)
        notes.append(f"{count} pairs of layers")
    return equal


def _narrow(
    job: Job, clock: Clock, model: ir.Model, units: Sequence[Unit], table: RangeTable, samples: Samples
) -> Narrow:
    if not job.target.quantization.saturates:
        return {}
    with clock.stage("saturation"):
        some = samples.spread(ROUNDING_SAMPLES)
        return outputs_that_saturate(model, units, table.ranges, job.target, some, seed=job.recipe.seed)


def _sparing(job: Job) -> Job:
    """The same for a large model: no form of it is opened that the runtime would hold in memory.

    Weights stored as int8 and used in float are such a form, since the runtime unfolds them; only where the
    recipe names it, it is built all the same. Rows of tables are unfolded one by one.
    """
    recipe, target = job.recipe, job.target
    named = {recipe.quantize.method, *(override.method for override in recipe.quantize.overrides)}
    kernels = target.kernels
    if "weight_only" not in named:
        tables = tuple(op for op in kernels.weight_only if op == "Gather")
        kernels = kernels.model_copy(update={"weight_only": tables, "folds_constants": False})
    changes = {"runtime": target.runtime.sparing(), "kernels": kernels}
    return replace(job, large=True, target=target.model_copy(update=changes))


def _counter(job: Job, stage: str, samples: Samples) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        job.progress(stage, done, len(samples))

    return step


def _probes(samples: Samples, count: int = PROBES) -> list[Feeds]:
    """The feeds of a few samples, evenly spread."""
    return [sample.feeds for sample in samples.spread(count)]


def _requested(job: Job, units: Sequence[Unit]) -> Methods:
    return requested_methods(units, job.recipe.quantize.overrides)


def _choose(
    job: Job,
    model: ir.Model,
    units: Sequence[Unit],
    table: RangeTable,
    narrow: Narrow,
    rounder: Rounder,
    data: Parts,
    reference: Baseline,
    scratch: Path,
) -> Choice:
    recipe, target = job.recipe, job.target
    device = target.model_copy(update={"runtime": target.runtime.as_on_device()})
    fixed = _requested(job, units)
    prepared = WeightPreparation(rounder.smoothing, narrow, rounder.few_bits)

    def form(methods: Methods) -> tuple[QuantPlan, ir.Model]:
        plan = make_plan(model, units, table.ranges, target, methods, prepared)
        return plan, apply_plan(model, plan, rounder(plan))

    def verify(path: Path) -> Fidelity:
        return check(path, reference)

    kept = kept_measurements(recipe, device, table)
    spoken, probes = names_of(model, constants=recipe.keep_names), _probes(data.calibration)
    return choose(
        units,
        TrialBench(recipe.model, device, probes, scratch, spoken, kept, timing=job.timing),
        form,
        fixed,
        floor_of(limits(recipe, target, reference.metric), reference.fidelity),
        verify,
        method=recipe.quantize.method,
        optimize_for=recipe.quantize.optimize_for,
        by_group=not target.runtime.absent_optimizers,
        task=None if recipe.preset == "fast" or job.large else search_task(recipe, model, job.progress),
        on_trial=lambda name: job.progress(f"try {name}", 0, 0),
    )


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
        found, device = job.timing.latencies(models, runtime, _probes(samples, DEVICE_PROBES), runs)
        return found, (device,)
    feeds = _probes(samples)
    return bench(models, runtime, feeds, warmup=settings.warmup, runs=runs, seconds=BENCH_SECONDS), ()
