"""What a pass works with, besides the model and its own settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import onnx_ir as ir

from edgepack.compression.structured import Multiples
from edgepack.config.passes import Cluster
from edgepack.config.target import Target
from edgepack.data.samples import Samples

FEWEST_SAMPLES = 32
MOST_SAMPLES = 512
SAMPLE_VALUES = 128 * 3 * 224 * 224
"""Input values that passes look at. A product sees one row in a sample, a convolution many positions: the
small inputs of nets with large products need more samples to tell as much."""


@dataclass(frozen=True)
class PassInputs:
    """What every pass gets."""

    target: Target
    samples: Samples
    """For calibration; a pass looks at :attr:`some` of them."""
    training: Samples
    threads: int
    seed: int
    accurate: Callable[[ir.Model], bool] = lambda model: True
    """Whether a model meets the gate and leaves room for what follows."""
    clusters: Cluster | None = None
    """How weights are clustered by a later pass."""

    @cached_property
    def some(self) -> Samples:
        """The samples to look at."""
        return some_samples(self.samples)

    @property
    def multiples(self) -> Multiples:
        """Numbers of channels that the target's kernels like."""
        like = self.target.quantization
        return Multiples(like.pruned_channels_multiple, like.depthwise_channels_multiple)


def some_samples(samples: Samples) -> Samples:
    """The samples that passes look at, evenly spread: more where each holds little."""
    size = sum(prod(array.shape) for array in next(iter(samples)).feeds.values())
    return samples.spread(min(max(SAMPLE_VALUES // max(size, 1), FEWEST_SAMPLES), MOST_SAMPLES))
