"""The inputs of one build."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack.benchmark.devices.timing import DeviceTiming
from edgepack.config.recipe import Recipe
from edgepack.config.target import Target
from edgepack.data.samples import Samples
from edgepack.errors import ConfigError
from edgepack.ir.arrays import Feeds
from edgepack.pipeline.progress import Progress

PROBES = 16
"""Probe samples: the calibration samples that candidates are timed and compared on."""


@dataclass(frozen=True, slots=True)
class Job:
    """The inputs of one build; none is changed."""

    recipe: Recipe
    target: Target
    base: Path
    """Folder that ``module:function`` references are relative to."""
    command: str
    ranges: Path | None = None
    progress: Progress = lambda stage, done, total: None
    timing: DeviceTiming | None = None
    """The device that candidates and artifacts are timed on; ``None``: this host."""
    large: bool = False
    """Whether the weights do not fit in memory; set by the build."""


def output_folder(recipe: Recipe, target: Target) -> Path:
    """The recipe's output folder for ``target``.

    Raises:
        ConfigError: several targets would write to one folder.
    """
    if len(recipe.target) > 1 and "{target}" not in recipe.output:
        raise ConfigError(
            f"output {recipe.output!r}: several targets would write there; put {{target}} into the path"
        )
    return Path(recipe.output.replace("{target}", target.name))


def sparing(job: Job) -> Job:
    """The job of a large model: without candidates that the runtime would hold in memory as float32.

    Weight-only int8 is one, since the runtime dequantizes its weights at load; it is kept only where the
    recipe requests it, and for embeddings, whose rows are dequantized one by one.
    """
    recipe, target = job.recipe, job.target
    named = {recipe.quantize.method, *(override.method for override in recipe.quantize.overrides)}
    kernels = target.kernels
    if "weight_only" not in named:
        tables = tuple(op for op in kernels.weight_only if op == "Gather")
        kernels = kernels.model_copy(update={"weight_only": tables, "folds_constants": False})
    changes = {"runtime": target.runtime.sparing(), "kernels": kernels}
    return replace(job, large=True, target=target.model_copy(update=changes))


def counter(job: Job, stage: str, samples: Samples) -> Callable[[], None]:
    """A function that reports one more sample of a stage to the job's progress."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        job.progress(stage, done, len(samples))

    return step


def probes(samples: Samples, count: int = PROBES) -> list[Feeds]:
    """The feeds of a few samples, evenly spread."""
    return [sample.feeds for sample in samples.spread(count)]
