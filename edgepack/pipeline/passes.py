"""The passes of a recipe, one after another, and a file of the model after each."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from edgepack.compression.budget import packed_int8_bytes
from edgepack.compression.cluster import cluster
from edgepack.compression.compact import compact, compact_notes
from edgepack.compression.prune import Limits, prune
from edgepack.compression.share import share
from edgepack.compression.structured import Multiples, prune_structured, structured_notes
from edgepack.config.passes import Cluster, Compact, Pass, Prune, Share, Structured, step_names
from edgepack.config.strict_yaml import Strict
from edgepack.config.target import Target
from edgepack.config.training import Tune
from edgepack.data.samples import Samples
from edgepack.graph.tied_embeddings import one_copy
from edgepack.ir.files import save_model
from edgepack.quantization.groups import find_units
from edgepack.results import Notes

FEWEST_SAMPLES = 32
MOST_SAMPLES = 512
SAMPLE_VALUES = 128 * 3 * 224 * 224
"""Input values that passes look at. A product sees one row in a sample, a convolution many positions: the
small inputs of nets with large products need more samples to tell as much."""

Stage = Callable[[str], AbstractContextManager[Notes]]
"""Opens a stage of the build; gives a list for what it has to say."""


@dataclass(frozen=True, slots=True)
class PassMaterial:
    """What passes work with, besides the model and their settings."""

    target: Target
    samples: Samples
    training: Samples
    threads: int
    seed: int
    accurate: Callable[[ir.Model], bool] = lambda model: True
    """Whether a model meets the gate and leaves room for what follows."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """The model after all passes, and a file of the model after each by the name of the step."""

    model: ir.Model
    files: dict[str, Path]


def run_passes(
    model: ir.Model, passes: tuple[Pass, ...], material: PassMaterial, stage: Stage, folder: Path
) -> Compressed:
    """Carry out ``passes`` on ``model``, which is not changed; files go to ``folder``.

    Raises:
        ConfigError: settings that name what the model does not have.
        CalibrationError: the model fails on a sample.
    """
    files, original = {}, model
    for place, (name, entry) in enumerate(zip(step_names(passes), passes, strict=True)):
        clusters = next((p.cluster for p in passes[place + 1 :] if p.cluster is not None), None)
        with stage(name) as notes:
            model, told = _run(model, entry.settings, material, original, clusters)
            notes.extend(told)
            notes.curve = told.curve
            files[name] = folder / f"after_{name.replace(' ', '_')}.onnx"
            save_model(one_copy(model), files[name])
    return Compressed(model, files)


def _run(
    model: ir.Model,
    settings: Strict,
    material: PassMaterial,
    original: ir.Model,
    clusters: Cluster | None,
) -> tuple[ir.Model, Notes]:
    """One pass, and how weights are clustered after it: a new model, and what there is to say of it."""
    if isinstance(settings, Tune):
        return _tune(model, settings, material, original)
    made, told = _compressed(model, settings, material, clusters)
    return made, Notes(told)


def _compressed(
    model: ir.Model, settings: Strict, material: PassMaterial, clusters: Cluster | None
) -> tuple[ir.Model, list[str]]:
    units, some = find_units(model, material.target.kernels), some_samples(material.samples)
    threads, seed = material.threads, material.seed
    match settings:
        case Prune():
            limits = Limits(lambda w: packed_int8_bytes(model, units, w, clusters), material.accurate)
            sparse, rows = prune(model, units, some, settings, threads=threads, seed=seed, limits=limits)
            zeros, values = sum(r.zeros for r in rows), sum(r.values for r in rows)
            return sparse, [f"{zeros / values:.1%} of {values} weights in {len(rows)} units are zero"]
        case Cluster():
            few, weights = cluster(model, units, some, settings, threads=threads, seed=seed)
            total, most = sum(w.values for w in weights), max(w.codes for w in weights)
            return few, [f"{total} weights in {len(weights)} units take at most {most} values each"]
        case Share():
            tied, ties = share(model, settings)
            error = max((tie.error for tie in ties), default=0.0)
            return tied, [
                f"{len(ties)} constants replaced by others, at most {error:.3g} of their norm apart"
            ]
        case Structured():
            multiples = _multiples(material.target)
            slim, report = prune_structured(model, some, settings, multiples, threads=threads, seed=seed)
            return slim, structured_notes(report, settings)
        case Compact():
            small, left = compact(model, settings, _multiples(material.target))
            return small, compact_notes(left)
    raise AssertionError(f"no pass has settings of type {type(settings).__name__}")


def _multiples(target: Target) -> Multiples:
    like = target.quantization
    return Multiples(like.pruned_channels_multiple, like.depthwise_channels_multiple)


def _tune(
    model: ir.Model, settings: Tune, material: PassMaterial, original: ir.Model
) -> tuple[ir.Model, Notes]:
    from edgepack.training.require import require_torch  # noqa: PLC0415  # an extra that most builds do without

    require_torch()
    from edgepack.training.report import curve_of, told  # noqa: PLC0415
    from edgepack.training.train import TrainingRun, tune  # noqa: PLC0415

    asked = _liked_by(material.target, settings)
    run = TrainingRun(material.seed, material.threads)
    made = tune(model, original, material.training, asked, run)
    return made.model, Notes(told(made), curve_of(made))


def _liked_by(target: Target, settings: Tune) -> Tune:
    """Training that takes channels out leaves as many as the target's kernels like, unless told otherwise."""
    share, like = settings.sparsify, _multiples(target)
    if share is None or share.pattern != "channels" or share.multiple is not None:
        return settings
    told = share.model_copy(update={"multiple": max(like.dense, like.depthwise)})
    return settings.model_copy(update={"sparsify": told})


def some_samples(samples: Samples) -> Samples:
    """The samples that passes look at, evenly spread: more where each holds little."""
    size = sum(prod(array.shape) for array in next(iter(samples)).feeds.values())
    return samples.spread(min(max(SAMPLE_VALUES // max(size, 1), FEWEST_SAMPLES), MOST_SAMPLES))
