"""The line: from a model and samples to a measured package. The only module that knows the order."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgepack import __version__
from edgepack.artifacts import (
    Material,
    as_wished,
    figures_of,
    outdated,
    require_runtimes,
    write_artifacts,
)
from edgepack.calibrate.ranges import RangeTable, load_ranges
from edgepack.calibrate.run import calibrate
from edgepack.choose import Choice, choose
from edgepack.config import Prune, Recipe
from edgepack.data import Samples
from edgepack.errors import ConfigError
from edgepack.explain import NOTHING_MEASURED, measure_units, unit_rows
from edgepack.export.tflite import tensors_for
from edgepack.feeds import Feeds
from edgepack.gate import judge
from edgepack.measure.bench import Latency, bench
from edgepack.measure.check import Baseline, baseline, check, check_together
from edgepack.measure.environment import environment, machine
from edgepack.measure.fused import what_the_runtime_did
from edgepack.measurements import Measurements, cache_folder
from edgepack.metrics import Metric
from edgepack.model import (
    LARGE_BYTES,
    fingerprint,
    load_model,
    require_float,
    weight_bytes,
)
from edgepack.parts import Parts, open_parts, spread
from edgepack.passes.prune import PrunedWeight, prune
from edgepack.prepare import prepare
from edgepack.quantize.apply import apply_plan
from edgepack.quantize.mapped import round_to_files
from edgepack.quantize.plan import Method, QuantPlan, make_plan, requested_methods, tensors_to_observe
from edgepack.quantize.rounding import Rounder, round_weights
from edgepack.quantize.units import Unit, find_units
from edgepack.report import BuildReport, Fidelity, StageReport, text
from edgepack.report_formats import Parity
from edgepack.scratch import publish, scratch_folder
from edgepack.search import Task
from edgepack.target import Gate, Target
from edgepack.trials import Floor, Methods, TrialBench

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all (0 when unknown)."""

PROBES = 16
"""Calibration samples that candidates are timed and compared on."""
ROUNDING_SAMPLES = 32
"""Samples that second moments are measured on; more change the result by less than its noise."""
LARGE = (
    "a large model: its weights never are in memory as a whole, so they are rounded to nearest, and all is "
    "measured without laying them out anew for the CPU"
)
REPAIR_SECONDS = 30.0
"""For finding which units keep the cheapest form from being accurate, where one is not."""
LEAST_UNLABELLED_DB = 15.0
"""Least fidelity where nothing else is asked for: below it a metric has been lost on every model tried."""
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
    large: bool = False
    """Set by the build itself."""


class _Clock:
    """Collects one StageReport per stage."""

    def __init__(self, progress: Progress) -> None:
        self.stages: list[StageReport] = []
        self.progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Time what is inside; gives a list for what the stage has to say."""
        self.progress(name, 0, 0)
        notes: list[str] = []
        started = time.perf_counter()
        yield notes
        self.stages.append(StageReport(name, round(time.perf_counter() - started, 3), tuple(notes)))


def build(job: Job) -> tuple[BuildReport, Path]:
    """Run the whole line and write the package; gives its report and its folder.

    A build that fails or is killed leaves nothing in the output folder, and never touches its inputs. A
    gate that is not met is no failure here: the report says so in ``passed``.

    Raises:
        EdgepackError: see :mod:`edgepack.errors`.
    """
    job = replace(job, target=as_wished(job.target, job.recipe))
    require_runtimes(job.target)
    output = output_folder(job.recipe, job.target)
    with scratch_folder(output) as scratch:
        package = scratch / "package"
        package.mkdir()
        report = _build_into(job, package, scratch)
        (package / "report.json").write_text(report.to_json(), encoding="utf-8")
        (package / "report.txt").write_text(text(report), encoding="utf-8")
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


def _build_into(job: Job, package: Path, scratch: Path) -> BuildReport:
    recipe, clock = job.recipe, _Clock(job.progress)
    digests = {"recipe": _digest(recipe.settings_json()), "target": _digest(job.target.model_dump_json())}
    with clock.stage("load") as notes:
        original = load_model(recipe.model)
        require_float(original, recipe.model)
        data = open_parts(recipe, job.target, original, job.base)
        notes.extend(data.notes)
        if large := weight_bytes(original) > LARGE_BYTES:
            notes.append(LARGE)
            job = _sparing(job)
    with clock.stage("normalize") as notes:
        model, applied = prepare(original, job.target)
        notes.extend(f"{rule}: {count}" for rule, count in applied.items())
    units = find_units(model, job.target.kernels)
    if recipe.prune is not None:
        with clock.stage("prune") as notes:
            model, pruned = _prune(job, recipe.prune, model, units, data.calibration)
            zeros, values = sum(p.zeros for p in pruned), sum(p.values for p in pruned)
            notes.append(f"{zeros / values:.1%} of {values} weights in {len(pruned)} units are zero")
    with clock.stage("calibrate") as notes:
        table = _ranges(job, model, units, data.calibration)
        table.save(package / "ranges.json")
        notes.append(f"{len(table.ranges)} tensors, {table.samples} samples, {table.observer}")
    with clock.stage("round") as notes:
        rounder = _rounder(job, model, units, table, data.calibration, scratch if large else None)
        second_order = 0 if large else len(rounder.rounded)
        notes.append(f"{second_order} weights by second order, {len(rounder.means)} biases corrected")
    with clock.stage("check original"):
        on_sample = _counter(job, "check original", data.evaluation)
        reference = baseline(recipe.model, data.evaluation, job.target.runtime, data.metric, on_sample)
    with clock.stage("choose") as notes:
        choice = _choose(job, model, units, table, rounder, data, reference, scratch)
        notes.extend([f"{len(choice.candidates)} forms measured", *choice.notes])
    with clock.stage("export") as notes:
        facts = {"target": job.target.name, **_facts(digests, table)}
        material = Material(model, choice, _requested(job, units), table, rounder, reference.shapes, facts)
        artifacts = write_artifacts(material, job.target, _probes(data.evaluation, EXPORT_PROBES), package)
        notes.extend(f"{refusal.file} not built: {refusal.reason}" for refusal in artifacts.refused)
    fidelity, parity, latencies = _measure(job, clock, artifacts.files, data, reference)
    with clock.stage("units") as notes:
        probes = spread(data.calibration, PROBES)
        runtime = job.target.runtime
        built = artifacts.files["onnx"]
        fused = what_the_runtime_did(built, runtime).as_dict()
        figures = NOTHING_MEASURED
        if not large:
            figures = measure_units(model, built, choice.plan, probes, runtime, scratch)
    models = figures_of(
        recipe.model, artifacts.files, latencies, {"original": reference.fidelity, **fidelity}
    )
    gate = judge(_limits(job, data.metric), models, asked_for=recipe.gate is not None)
    return BuildReport(
        edgepack_version=__version__,
        model=recipe.model.name,
        target=job.target.name,
        command=job.command,
        passed=all(line.passed for line in gate),
        models=models,
        refused=artifacts.refused,
        parity=parity,
        gate=gate,
        candidates=tuple(choice.candidates),
        units=unit_rows(choice.plan, model, figures),
        sensitivity=choice.sensitivity,
        runtime={
            **fused,
            "conversions_us": round(figures.conversions_us, 2),
            **({"tflite": artifacts.tflite} if artifacts.tflite else {}),
        },
        stages=tuple(clock.stages),
        environment={**environment(), "threads": runtime.threads},
        fingerprints={
            "model": fingerprint(original),
            "calibration": table.samples_fingerprint,
            **digests,
        },
    )


def _prune(
    job: Job, config: Prune, model: ir.Model, units: Sequence[Unit], samples: Samples
) -> tuple[ir.Model, tuple[PrunedWeight, ...]]:
    return prune(
        model,
        units,
        spread(samples, ROUNDING_SAMPLES),
        config,
        threads=os.cpu_count() or 1,
        seed=job.recipe.seed,
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


def _rounder(
    job: Job, model: ir.Model, units: Sequence[Unit], table: RangeTable, samples: Samples, folder: Path | None
) -> Rounder:
    """Round every weight that some form may store; the forms differ in where they use them.

    With a ``folder`` the integers are kept there instead of in memory.
    """
    widest = {u.name: (Method.STATIC, "") for u in units}
    plan = make_plan(model, units, table.ranges, job.target, widest)
    if folder is not None:
        return round_to_files(model, plan, folder)
    return round_weights(
        model,
        plan,
        spread(samples, ROUNDING_SAMPLES),
        second_order=job.recipe.preset != "fast",
        threads=os.cpu_count() or 1,  # the host's, not the target's: ranges do not depend on it
        seed=job.recipe.seed,
        on_sample=_counter(job, "round", spread(samples, ROUNDING_SAMPLES)),
    )


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
        kernels = kernels.model_copy(update={"weight_only": tables})
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
    return [sample.feeds for sample in spread(samples, count)]


def _requested(job: Job, units: Sequence[Unit]) -> Methods:
    return requested_methods(units, job.recipe.quantize.overrides)


def _choose(
    job: Job,
    model: ir.Model,
    units: Sequence[Unit],
    table: RangeTable,
    rounder: Rounder,
    data: Parts,
    reference: Baseline,
    scratch: Path,
) -> Choice:
    recipe, target = job.recipe, job.target
    fixed = _requested(job, units)
    limits = _limits(job, data.metric)

    def form(methods: Methods) -> tuple[QuantPlan, ir.Model]:
        plan = make_plan(model, units, table.ranges, target, methods, rounder.smoothing)
        return plan, apply_plan(model, plan, rounder(plan))

    def verify(path: Path) -> Fidelity | None:
        if data.metric is None or limits.max_metric_drop is None:
            return None
        return check(path, data.evaluation, target.runtime, reference, data.metric)

    return choose(
        units,
        TrialBench(recipe.model, target, _probes(data.calibration), scratch, _kept(job, table)),
        form,
        fixed,
        Floor(limits.min_sqnr_db, limits.min_agreement, limits.max_metric_drop, reference.fidelity.metric),
        verify,
        method=recipe.quantize.method,
        optimize_for=recipe.quantize.optimize_for,
        task=_task(job, model),
        on_trial=lambda name: job.progress(f"try {name}", 0, 0),
    )


def _limits(job: Job, metric: Metric | None) -> Gate:
    """The gate; where no metric tells a collapse, and no limit either, fidelity has to."""
    gate = job.recipe.gate or job.target.gate
    if metric is not None or gate.min_sqnr_db is not None or gate.min_agreement is not None:
        return gate
    return gate.model_copy(update={"min_sqnr_db": LEAST_UNLABELLED_DB})


def _task(job: Job, model: ir.Model) -> Task | None:
    """What single units may do: nothing, be repaired, or be searched through."""
    recipe = job.recipe
    if recipe.preset == "fast" or job.large:
        return None
    elements = {v.name: _elements(v.shape) for n in model.graph for v in n.outputs if v.name}
    best = recipe.preset == "best"
    return Task(recipe.search.budget_s if best else REPAIR_SECONDS, best, elements, job.progress)


def _elements(shape: ir.Shape | None) -> int:
    """Values of a tensor, unknown dimensions counted as one."""
    return math.prod(d if isinstance(d, int) else 1 for d in shape or (0,))


def _kept(job: Job, table: RangeTable) -> Measurements:
    """Measurements of earlier searches with this model, these samples and this machine."""
    if job.recipe.preset != "best":
        return Measurements()
    facts = [table.model_fingerprint, table.samples_fingerprint, job.target.runtime.model_dump_json()]
    name = _digest(" ".join([*facts, json.dumps(machine())]))
    return Measurements(cache_folder() / "search" / f"{name[:32]}.jsonl")


def _measure(
    job: Job, clock: _Clock, files: Mapping[str, Path], data: Parts, reference: Baseline
) -> tuple[dict[str, Fidelity], tuple[Parity, ...], dict[str, Latency]]:
    """What the files compute, and how fast."""
    runtime = job.target.runtime
    with clock.stage("check"):
        on_sample = _counter(job, "check", data.evaluation)
        fidelity, parity = check_together(files, data.evaluation, runtime, reference, data.metric, on_sample)
    with clock.stage("bench"):
        latencies = _bench(job, files, data.evaluation)
    return fidelity, parity, latencies


def _bench(job: Job, files: Mapping[str, Path], samples: Samples) -> dict[str, Latency]:
    models = {"original": job.recipe.model, **files}
    settings = job.recipe.bench
    return bench(models, job.target.runtime, _probes(samples), warmup=settings.warmup, runs=settings.runs)


def _facts(digests: Mapping[str, str], table: RangeTable) -> dict[str, object]:
    """What made the package, for the metadata of its files."""
    return {
        **{f"{name}_digest": digest for name, digest in digests.items()},
        "samples_digest": table.samples_fingerprint,
        "model_digest": table.model_fingerprint,
    }


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
