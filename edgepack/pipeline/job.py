"""What one build works on."""

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
"""Calibration samples that candidates are timed and compared on."""


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


def sparing(job: Job) -> Job:
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


def counter(job: Job, stage: str, samples: Samples) -> Callable[[], None]:
    """Tells the job's progress how many samples a stage has seen, one at each call."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        job.progress(stage, done, len(samples))

    return step


def probes(samples: Samples, count: int = PROBES) -> list[Feeds]:
    """The feeds of a few samples, evenly spread."""
    return [sample.feeds for sample in samples.spread(count)]
