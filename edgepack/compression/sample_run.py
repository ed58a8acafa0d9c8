"""How a model is run on samples: what every measurement on activations needs to know."""

from collections.abc import Callable
from dataclasses import dataclass

from edgepack.data.samples import Samples


@dataclass(frozen=True, slots=True)
class SampleRun:
    """Samples that a model runs on, one after another, and how."""

    samples: Samples
    threads: int
    """Of the runtime."""
    seed: int
    """Of the choice of positions, where a sample has more than are looked at."""
    on_sample: Callable[[], None] = lambda: None
    """Called after each sample."""
