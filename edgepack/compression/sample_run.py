"""The settings of a run on samples."""

from collections.abc import Callable
from dataclasses import dataclass

from edgepack.data.samples import Samples


@dataclass(frozen=True, slots=True)
class SampleRun:
    """Samples that a model runs on, one after another, with the settings of the run."""

    samples: Samples
    threads: int
    """Threads of the runtime."""
    seed: int
    """Seed of the choice of positions, if a sample has more than are used."""
    on_sample: Callable[[], None] = lambda: None
    """Called after each sample."""
